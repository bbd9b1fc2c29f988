"""Compile every Triton kernel for GPUs that need not be here, and look at what the compiler made.

    python tools/compile_gpu_kernels.py                      # sm_80, sm_90 and gfx942
    python tools/compile_gpu_kernels.py --targets sm_90 --json kernels.json

The kernels are those that the package would launch: the launches are recorded and compiled for
another device. Prints registers, spills, shared memory, the widest loads and stores, and for 2^24 values (64 MiB of
float32) the time that moving the bytes takes at the memory's bandwidth; for NVIDIA's also the time that the
instructions take, and the share of the memory's sectors that is used, for which ``ptx_machine.py`` plays them. Fails if
a kernel spills, computes for far longer than it moves bytes, moves memory for nothing, or fewer than 16 bytes at a time
where most are; or if something would change bits: a fused multiply-add, flushed subnormals, an approximate division or
square root.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptx_machine
import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from hvd_qsgd import QSGD, TopK
from hvd_qsgd.kernels.triton import qsgd, topk
from hvd_qsgd.kernels.triton.launch import EXACT, warps_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes per second of device memory, by the vendors' data sheets: A100 80 GB SXM, H100 SXM, MI300X.
BANDWIDTH = {"sm_80": 2.04e12, "sm_90": 3.35e12, "gfx942": 5.3e12}
MIB = 64
#: Multiprocessors and their cycles per second, from the data sheets' peak rates of float32: A100 and H100 SXM.
CORES = {"sm_80": (108, 19.5e12 / (108 * 64 * 2)), "sm_90": (132, 67e12 / (132 * 128 * 2))}
#: Threads a cycle that a multiprocessor serves, by the table of throughputs in NVIDIA's CUDA C++ Programming Guide.
ISSUED = 128
PIPES = {
    "float": ({"FADD", "FMUL", "FFMA"}, {"sm_80": 64, "sm_90": 128}),
    "product": ({"IMAD"}, {"sm_80": 64, "sm_90": 64}),
    "double": ({"DADD", "DMUL", "DFMA"}, {"sm_80": 32, "sm_90": 64}),
    "special": ({"MUFU", "POPC", "F2F", "F2I", "I2F"}, {"sm_80": 16, "sm_90": 16}),
    "memory": (
        {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMG", "ATOMS", "RED"},
        {"sm_80": 32, "sm_90": 32},
    ),
    "integer": (set(), {"sm_80": 64, "sm_90": 64}),
}
#: What goes another way than through the pipe of integers, and is told by its name; uniform ones begin with U.
CONTROL = {"BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "BAR", "NOP", "WARPSYNC", "LDC", "S2R", "CS2R", "MOV"}
#: What each thread must move 16 bytes at a time, because most bytes are there: not what stands at odd addresses
#: (lanes, a tail) nor what the order of sums scatters (L2 norms).
WIDE = {
    "encode_buckets": "load",
    "bucket_scales": "load",
    "decode": "store",
    "decode_buckets": "store",
    "from_lanes": "store",
    "count_digits": "load",
    "count_chosen": "load",
    "write_chosen": "load",
}
AMD_WIDTHS = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
#: The last one's buckets are longer than the registers of a program.
CODECS = (QSGD(4), QSGD(7), QSGD(8), QSGD(4, norm="l2"), QSGD(4, 8192))
#: Of gradients; the last two for 4 bits only.
TYPES = {torch.float32: "", torch.float16: " float16", torch.bfloat16: " bfloat16"}
RANKS = 4


@dataclass
class Report:
    """What the compilers made of one kernel; widths in bytes, counts of instructions in its text."""

    kernel: str
    what: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    fused: int
    flushing: int
    approximate: int
    bytes_per_element: float
    #: By each thread, over the values that are its share; None where they stand in a loop, or are AMD's.
    instructions: float | None = None
    instructions_ms: float | None = None
    #: Of the sectors of 32 bytes that each program touches, the bytes that it touches.
    sectors_used: float | None = None

    @property
    def bytes_ms(self) -> float:
        return self.bytes_per_element * MIB * 2**18 / BANDWIDTH[self.target] * 1e3

    def faults(self) -> list[str]:
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        wide = WIDE.get(self.kernel, "") if not self.what.endswith(("tail", "l2 encode")) else ""
        width = {"load": self.widest_load, "store": self.widest_store}.get(wide, 16)
        # A wavefront of AMD has twice the threads, and each half of the work.
        if width < (8 if self.target.startswith("gfx") else 16):
            found.append(f"{wide}s at most {width} bytes")
        if wide and self.sectors_used is not None and self.sectors_used < 0.8:
            found.append(f"uses {self.sectors_used:.0%} of the memory that it moves")
        if wide and self.instructions_ms is not None and self.instructions_ms > 1.5 * self.bytes_ms:
            found.append(f"computes for {self.instructions_ms:.3f} ms, and moves bytes for {self.bytes_ms:.3f} ms")
        for count, name in (
            (self.fused, "fused multiply-adds"),
            (self.flushing, "instructions that flush subnormals"),
            (self.approximate, "approximate divisions or roots"),
        ):
            if count:
                found.append(f"{count} {name}")
        return found


class Elsewhere:
    """As much of a driver as compiling needs: a device that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def pretend(name: str) -> None:
    """Have Triton compile for a target from now on."""
    triton.runtime.driver.set_active(Elsewhere(TARGETS[name]))


def compile_for(name: str, codecs: tuple[QSGD, ...] = CODECS, options: dict[str, Any] = EXACT) -> list[Report]:
    """Reports of all kernels of the codecs, compiled for a target."""
    pretend(name)
    reports: list[Report] = []
    original = qsgd.launch
    try:
        kinds = [(codec, dtype) for codec in codecs for dtype in TYPES if dtype == torch.float32 or codec == QSGD(4)]
        for job in [job for kind in kinds for job in jobs(*kind)] + topk_jobs():
            qsgd.launch = topk.launch = functools.partial(record, reports, name, job, options)
            job.work()
    finally:
        qsgd.launch = topk.launch = original
    return reports


@dataclass
class Job:
    """Something that kernels do with ``length`` values: a name, the bytes that it moves for each, and a call."""

    what: str
    length: int
    moved: float
    work: Callable[[], object]


def record(
    reports: list[Report],
    target: str,
    job: Job,
    options: dict[str, Any],
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor, ...],
    *numbers: Any,
    **constants: Any,
) -> None:
    """Compile instead of :func:`hvd_qsgd.kernels.triton.launch.launch`."""
    warps = warps_for(constants)
    compiled = kernel.warmup(*tensors, *numbers, grid=grid, num_warps=warps, **options, **constants)
    if target.startswith("sm"):
        read = read_nvidia(compiled, target, math.prod(grid) * 32 * warps / job.length)
        if options == EXACT:
            read["sectors_used"] = ptx_machine.play(kernel, compiled, grid, (*tensors, *numbers)).used()
    else:
        read = read_amd(compiled)
    reports.append(Report(kernel.fn.__name__, job.what, target, bytes_per_element=job.moved, **read))


def jobs(codec: QSGD, dtype: torch.dtype = torch.float32) -> list[Job]:
    """What the kernels of a codec do."""
    length = 64 * codec.bucket_size
    kernels = qsgd.QSGDKernels(codec)
    x, size, value = torch.zeros(length, dtype=dtype), codec.payload_size(length), dtype.itemsize
    # Behind a header of 4 bytes, as in the messages of the exchanges.
    message = torch.zeros(4 + RANKS * (size + 4), dtype=torch.uint8)[4:]
    payload = message[:size]
    scales = torch.zeros(codec.agreement_length(length), dtype=torch.int32)
    lanes = torch.zeros(codec.lanes_length(length, RANKS), dtype=torch.int32)
    spans = [(rank * (size + 4), rank * (size + 4) + size) for rank in range(RANKS)]
    code, lane = size / length, 4 * len(lanes) / length
    name = (
        f"{codec.bits} bits"
        + (" long" if codec.bucket_size > qsgd.LONGEST else "")
        + (" l2" if codec.norm == "l2" else "")
        + TYPES[dtype]
    )
    found = [
        Job(
            f"{name} encode",
            length,
            (2 if codec.norm == "l2" else 1) * value + code,
            lambda: kernels.encode_into(x, payload),
        )
    ]
    if codec.norm == "l2":
        return found
    found += [
        Job(f"{name} decode", length, code + value, lambda: kernels.decode_into(payload, x)),
        Job(f"{name} decode, add", length, code + 2 * value, lambda: kernels.decode_into(payload, x, "add")),
        Job(
            f"{name} average of {RANKS}", length, RANKS * code + value, lambda: kernels.average_into(message, spans, x)
        ),
    ]
    if codec == QSGD(4):
        found += [
            Job(f"{name} scales", length, float(value), lambda: kernels.agree_into(x, scales)),
            Job(f"{name} to lanes", length, value + lane, lambda: kernels.to_lanes(x, scales, RANKS, lanes)),
            Job(f"{name} from lanes", length, lane + value, lambda: kernels.from_lanes(lanes, scales, RANKS, x, RANKS)),
            # A tail only: the kernel for buckets of any length.
            Job(f"{name} tail", 300, 2 * value + code, lambda: kernels.encode_into(x[:300], payload)),
        ]
    return found


def topk_jobs() -> list[Job]:
    """The same for selecting the largest, which reads everything once for each of three digits and twice more."""
    magnitudes = torch.zeros(2**15, dtype=torch.int32)
    kernels = topk.TopKKernels(TopK())
    return [Job("topk", len(magnitudes), 4.0, lambda: kernels.largest_positions(magnitudes, 300))]


def read_nvidia(compiled: Any, target: str, threads: float) -> dict[str, Any]:
    """Of the PTX, of what ptxas says of it, and of what it makes; ``threads`` is their number for each value."""
    text = compiled.asm["ptx"]
    ptxas = get_ptxas(TARGETS[target].arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        architecture = re.search(r"\.target (sm_\w+)", text)[1]  # type: ignore[index]
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={architecture}", str(source), "-o", f"{source}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        disassembler = [str(Path(ptxas).with_name("nvdisasm")), "-c", f"{source}.cubin"]
        machine_code = subprocess.run(disassembler, capture_output=True, text=True, check=True).stdout
    said = done.stderr
    names = straight_line(machine_code)
    # A division is made of a reciprocal and five fused operations; its rare cases stand behind the end.
    kernel = machine_code[: machine_code.rindex("EXIT")]
    fused = len(re.findall(r"\bFFMA\b", kernel)) - 5 * len(re.findall(r"\bMUFU\.RCP\b", kernel))
    return {
        "registers": number(r"Used (\d+) registers", said),
        "spilled_bytes": number(r"(\d+) bytes spill stores", said) + number(r"(\d+) bytes spill loads", said),
        "shared_bytes": compiled.metadata.shared,
        "widest_load": widest(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", text),
        "widest_store": widest(r"st\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", text),
        "fused": len(re.findall(r"\sfma\.", text)) + abs(fused),
        "flushing": len(re.findall(r"\.ftz\b", text)),
        "approximate": len(re.findall(r"\.(?:approx|full)\b", text)),
        "instructions": len(names) * threads if names else None,
        "instructions_ms": instructions_ms(names, target) * threads if names else None,
    }


def straight_line(machine_code: str) -> list[str]:
    """Names of the instructions up to the end, without the ways aside of divisions; none if there is a loop."""
    names = []
    for address, guard, name, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z]\w*)(.*)", machine_code):
        names.append(name)
        back = re.search(r"`\(\.L_x_(\d+)\)", rest) if name == "BRA" else None
        if back and machine_code.index(f".L_x_{back[1]}:") < machine_code.index(f"/*{address}*/"):
            return []
        if name == "EXIT" and not guard:
            break
    return names


def instructions_ms(names: list[str], target: str) -> float:
    """The least time of as many threads as there are values: of the pipe that is busy the longest."""
    cores, rate = CORES[target]
    cycles = {"issue": len(names) / ISSUED}
    left = collections.Counter(name for name in names if name not in CONTROL and not name.startswith("U"))
    for pipe, (members, served) in PIPES.items():
        mine = [name for name in left if name in members or not members]
        cycles[pipe] = sum(left.pop(name) for name in mine) / served[target]
    return max(cycles.values()) * MIB * 2**18 / (cores * rate) * 1e3


def read_amd(compiled: Any) -> dict[str, Any]:
    """Of the assembly; an exact division is made of five fused operations and a fix-up."""
    text = compiled.asm["amdgcn"]
    loads, stores = (
        [AMD_WIDTHS[width] for width in re.findall(rf"(?:buffer|global)_{what}_([a-z]+\d?)", text)]
        for what in ("load", "store")
    )
    spilled = number(r"\.vgpr_spill_count:\s+(\d+)", text) + number(r"\.sgpr_spill_count:\s+(\d+)", text)
    divisions = len(re.findall(r"v_div_fixup_f32", text))
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)", text),
        "spilled_bytes": 4 * spilled,
        "shared_bytes": compiled.metadata.shared,
        "widest_load": max(loads, default=0),
        "widest_store": max(stores, default=0),
        "fused": len(re.findall(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_f32", text)) - 5 * divisions,
        # 3 keeps the subnormals of inputs and of results.
        "flushing": len(re.findall(r"\.amdhsa_float_denorm_mode_(?:32|16_64) [0-2]", text)),
        "approximate": len(re.findall(r"v_rcp_f32|v_sqrt_f32", text)) - divisions,
    }


def number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])  # type: ignore[index]


def widest(pattern: str, text: str) -> int:
    """Bytes of the widest of some instructions, from their vector length and bits."""
    return max((int(count or 1) * int(bits) // 8 for count, bits in re.findall(pattern, text)), default=0)


def shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write the reports to a file")
    arguments = parser.parse_args()
    reports = [report for target in arguments.targets for report in compile_for(target)]
    table = Table(title=f"Triton {triton.__version__}")
    columns = ("target", "kernel", "for", "registers", "spills", "shared", "load", "store", "bytes/element", "ms")
    columns += ("used", "instructions/element", "ms")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for r in reports:
        numbers = (r.registers, r.spilled_bytes, r.shared_bytes, r.widest_load, r.widest_store)
        memory = (f"{r.bytes_per_element:.2f}", f"{r.bytes_ms:.3f}", shown(r.sectors_used, ".0%"))
        work = (shown(r.instructions, ".1f"), shown(r.instructions_ms, ".3f"))
        table.add_row(r.target, r.kernel, r.what, *map(str, numbers), *memory, *work)
    Console(width=160).print(table)
    print(f"ms: the least time for {MIB * 2**18} values ({MIB} MiB of float32), at the memory's bandwidth, and of")
    print("the instructions where they hold no loop. used: of the memory's sectors that are moved")
    if arguments.json:
        rows = [{**dataclasses.asdict(r), "bytes_ms": r.bytes_ms, "faults": r.faults()} for r in reports]
        arguments.json.write_text(json.dumps(rows, indent=1))
    faults = [f"{r.target} {r.kernel} ({r.what}): {fault}" for r in reports for fault in r.faults()]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
