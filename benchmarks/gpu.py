"""GPU kernels on your machine: are the bytes right, how near is the memory's bandwidth, what does the exchange take?

    python benchmarks/gpu.py             # all GPUs of this machine
    python benchmarks/gpu.py --smoke     # no GPU: tiny tensors, kernels interpreted on the CPU, times mean nothing

Correctness comes first, and what is wrong ends the run. Bandwidth is the bytes that a kernel must move over
its time, as a fraction of what copying the same tensor on the device reaches; the aim for encoding and decoding
is 0.8. With two GPUs or more, ``horovodrun`` then starts a rank for each and averages one tensor over NCCL:
float32, float16 and this package's exchanges in turns. Writes a table and a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exchange import result_of
from rich.console import Console
from rich.table import Table

from hvd_qsgd import QSGD, TopK
from hvd_qsgd.kernels import kernels_for, torch_backend
from hvd_qsgd.kernels.triton.probe import differs, hard_buckets

HERE = Path(__file__).resolve().parent
RANKS = 4
#: Bytes that are written before each time is taken.
FLUSHED = 2**29
CODECS = (QSGD(2), QSGD(4), QSGD(8), QSGD(4, norm="l2"), QSGD(7, 4096), QSGD(4, rounding="nearest"), TopK(0.01))

#: Bits, and the type of the gradient, of the kernels that are timed.
KINDS = [(2, torch.float32), (4, torch.float32), (8, torch.float32), (4, torch.float16), (4, torch.bfloat16)]


def check(backend: str, device: torch.device, length: int) -> int:
    """Compare what the device makes with the specification, bit for bit; returns the number of inputs."""
    rng = np.random.default_rng(1)
    inputs = [hard_buckets(512), rng.standard_normal(length).astype(np.float32), np.zeros(0, np.float32)]
    for codec in CODECS:
        for x in inputs:
            what = differs(codec, kernels_for(codec, backend), x, device)
            if what:
                raise SystemExit(f"{codec} on {device} by {backend}: {what} is not what the specification makes.")
    return len(CODECS) * len(inputs)


def kernel_calls(codec: QSGD, backend: str, x: torch.Tensor) -> dict[str, tuple[float, Callable[[], object]]]:
    """What is timed of a codec: the bytes that must move, and a call."""
    kernels: Any = kernels_for(codec, backend)
    size, out = codec.payload_size(len(x)), torch.empty_like(x)
    # Each payload begins where 16 bytes can be read at a time.
    stride = -(-size // 16) * 16
    message = torch.zeros(RANKS * stride, dtype=torch.uint8, device=x.device)
    spans = [(rank * stride, rank * stride + size) for rank in range(RANKS)]
    for start, stop in spans:
        kernels.encode_into(x, message[start:stop])
    agreed = torch.zeros(codec.agreement_length(len(x)), dtype=torch.int32, device=x.device)
    words = torch.zeros(codec.lanes_length(len(x), RANKS), dtype=torch.int32, device=x.device)
    kernels.agree_into(x, agreed)
    values, payload, lanes = x.element_size() * len(x), message[:size], 4 * len(words)
    return {
        "encode": (values + size, lambda: kernels.encode_into(x, payload)),
        "decode": (values + size, lambda: kernels.decode_into(payload, out)),
        "decode and add": (2 * values + size, lambda: kernels.decode_into(payload, out, "add")),
        f"average of {RANKS}": (values + RANKS * size, lambda: kernels.average_into(message, spans, out)),
        "to lanes": (values + lanes, lambda: kernels.to_lanes(x, agreed, RANKS, words)),
        "from lanes": (values + lanes, lambda: kernels.from_lanes(words, agreed, RANKS, out, RANKS)),
    }


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time, after two calls that compile and warm up; on a GPU with caches that hold something else."""
    times = []
    if device.type == "cuda":
        # Larger than any cache; and while it is filled, the host has time to start the kernels after it.
        other = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2 + repeats)]
        for start, end in events:
            other.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) / 1e3 for start, end in events]
    else:
        for _ in range(2 + repeats):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def bandwidth(backends: list[str], device: torch.device, length: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of what was timed; ``fraction`` is of the bandwidth of a copy."""
    x = torch.randn(length, device=device)
    copy = torch.empty_like(x)
    copied = 8 * length / seconds(lambda: copy.copy_(x), device, repeats)
    rows = []
    for backend in backends:
        for bits, dtype in KINDS:
            for what, (moved, call) in kernel_calls(QSGD(bits), backend, x.to(dtype)).items():
                taken = seconds(call, device, repeats)
                rate = moved / taken
                kind = {"backend": backend, "bits": bits, "dtype": str(dtype).removeprefix("torch."), "what": what}
                rows.append({**kind, "seconds": taken, "bytes_per_second": rate, "fraction": rate / copied})
    return rows


def exchange(ranks: int, elements: int, repeats: int) -> dict[str, Any]:
    """Method to its measurements, by one rank for each GPU."""
    methods = ["none", "fp16", "qsgd8", "qsgd4", "qsgd4-scatter", "qsgd4-allreduce"]
    worker = [sys.executable, str(HERE / "exchange_worker.py"), "--framework", "gpu", "--elements", str(elements)]
    command = ["horovodrun", "-np", str(ranks), *worker, "--repeats", str(repeats), "--methods", *methods]
    search = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    measured: dict[str, Any] = result_of(run)
    return measured


def show(result: dict[str, Any], console: Console) -> None:
    if result["kernels"]:
        table = Table(title=f"{result['device']}, {result['mib'] / 4:g} Mi values")
        for column in ("kernels", "bits", "of", "what", "ms", "GB/s", "of a copy"):
            table.add_column(column, justify="left" if column in ("kernels", "of", "what") else "right")
        for row in result["kernels"]:
            numbers = (f"{row['seconds'] * 1e3:.3f}", f"{row['bytes_per_second'] / 1e9:.0f}", f"{row['fraction']:.2f}")
            table.add_row(row["backend"], str(row["bits"]), row["dtype"], row["what"], *numbers)
        console.print(table)
    if result["exchange"]:
        table = Table(title=f"{result['ranks']} ranks, {result['elements'] / 1e6:g} M values")
        for column in ("method", "ms", "times faster"):
            table.add_column(column, justify="left" if column == "method" else "right")
        plain = result["exchange"]["none"]["seconds"]
        for method, found in result["exchange"].items():
            table.add_row(method, f"{found['seconds'] * 1e3:.2f}", f"{plain / found['seconds']:.2f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=256, help="size of the float32 tensor that kernels are timed on")
    parser.add_argument("--elements", type=int, default=25_000_000, help="of the tensor that is averaged over ranks")
    parser.add_argument("--ranks", type=int, help="of the exchange; as many as there are GPUs if not given")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="no GPU: show that everything runs")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    if arguments.smoke:
        # Before Triton is imported, which happens with its kernels.
        os.environ["TRITON_INTERPRET"] = "1"
        arguments.mib, arguments.elements, arguments.repeats = 2048 * 4 / 2**20, 20_000, 1
        arguments.ranks = arguments.ranks or 2
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here. --smoke shows on a CPU that everything runs.")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    backend = "triton" if arguments.smoke else torch_backend(torch.device("cuda", torch.cuda.current_device()))
    console = Console()
    length = int(arguments.mib * 2**18)
    compared = check(backend, device, 700 if arguments.smoke else 2**20 + 77)
    console.print(f"what {backend} kernels make of {compared} inputs is what the specification makes, bit for bit")
    ranks = arguments.ranks or torch.cuda.device_count()
    result = {
        "device": platform.machine() if arguments.smoke else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "backend": backend,
        "mib": arguments.mib,
        "compared": compared,
        "kernels": bandwidth(sorted({backend, "torch"}, reverse=True), device, length, arguments.repeats),
        "ranks": ranks,
        "elements": arguments.elements,
        "exchange": exchange(ranks, arguments.elements, arguments.repeats) if ranks > 1 else {},
    }
    show(result, console)
    arguments.output.write_text(json.dumps(result, indent=1))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
