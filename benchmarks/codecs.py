"""How fast codecs encode and decode, as multiples of the time of a memcpy of the same tensor.

    python benchmarks/codecs.py            # 64 MiB of float32, one thread
    python benchmarks/codecs.py --quick    # a smoke test, under a minute

All are timed in turns in one run, and medians are compared, so that a busy machine slows all of
them alike. ``torch.Tensor.half`` and ``torch.topk`` are there for comparison, and bitsandbytes' blockwise
8-bit quantization if it is installed. Writes a table, a JSON file and a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hvd_qsgd import QSGD, Codec, TopK
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.kernels.threads import use_threads

Timed = dict[str, Callable[[], object]]


def codec_calls(name: str, codec: Codec, backend: str, x: np.ndarray) -> Timed:
    """Encode, decode and decode-and-add of one codec, with buffers given."""
    kernels = kernels_for(codec, backend)
    out = np.zeros(codec.payload_size(x.size), np.uint8)
    decoded = np.zeros_like(x)
    if backend == "torch":
        source, target, result = torch.from_numpy(x), torch.from_numpy(out), torch.from_numpy(decoded)
    else:
        source, target, result = x, out, decoded  # type: ignore[assignment]
    size = kernels.encode_into(source, target, 1)
    payload = target[:size]
    return {
        f"{name} encode": lambda: kernels.encode_into(source, target, 1),
        f"{name} decode": lambda: kernels.decode_into(payload, result, "set"),
        f"{name} decode and add": lambda: kernels.decode_into(payload, result, "add"),
    }


def calls(x: np.ndarray) -> Timed:
    copy = np.empty_like(x)
    tensor = torch.from_numpy(x)
    half = torch.empty(x.size, dtype=torch.float16)
    timed: Timed = {"memcpy": lambda: np.copyto(copy, x), "torch half": lambda: half.copy_(tensor)}
    for bits in (2, 4, 8):
        timed |= codec_calls(f"qsgd {bits} bits", QSGD(bits), "numba", x)
    timed |= codec_calls("topk 1 %", TopK(0.01), "numba", x)
    timed["torch.topk 1 %"] = lambda: tensor.abs().topk(x.size // 100, sorted=False)
    timed["qsgd 4 bits encode, torch operations"] = codec_calls("torch", QSGD(4), "torch", x)["torch encode"]
    try:
        from bitsandbytes.functional import quantize_blockwise

        quantize_blockwise(tensor)
        timed["bitsandbytes blockwise 8 bits"] = lambda: quantize_blockwise(tensor)
    except Exception as error:  # whatever an optional package without a CPU build may raise
        print(f"bitsandbytes is left out: {error}")
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=64, help="size of the float32 tensor")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the kernels; others have one")
    parser.add_argument("--quick", action="store_true", help="1 MiB, few repeats")
    parser.add_argument("--output", type=Path, default=Path("codecs"), help="of .json and .png, without the ending")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.mib, arguments.repeats = 1, 3
    torch.set_num_threads(1)
    use_threads(arguments.threads)
    x = np.random.default_rng(0).standard_normal(int(arguments.mib * 2**20 / 4)).astype(np.float32)
    timed = calls(x)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in tqdm(range(arguments.repeats), desc="rounds", disable=None):
        for name, call in timed.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    table = Table(title=f"{arguments.mib:g} MiB of float32, threads: {arguments.threads}")
    for column in ("what", "ms", "times memcpy"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:.2f}", f"{median / medians['memcpy']:.2f}")
    Console().print(table)
    arguments.output.with_suffix(".json").write_text(json.dumps({"mib": arguments.mib, "seconds": medians}, indent=1))
    plot({name: median / medians["memcpy"] for name, median in medians.items()}, arguments.output.with_suffix(".png"))
    print(f"wrote {arguments.output.with_suffix('.json')} and {arguments.output.with_suffix('.png')}")


def plot(ratios: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    axis.barh(list(ratios), list(ratios.values()), color="tab:blue")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="times the time of a memcpy")
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
