"""Starting a Triton kernel on the device and the stream of its tensors, with arithmetic that keeps bits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

#: A product and the sum it goes into must be rounded separately, as by the specification. What else would change
#: bits is decided by the functions that kernels call: division is ``div_rn``, and Triton flushes no subnormals.
EXACT = {"enable_fp_fusion": False}
#: Threads of a program, and bytes that each of them moves at a time.
WARPS, WIDTH = 4, 16
THREADS = 32 * WARPS


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...], *numbers: Any, **constants: Any
) -> None:
    """Run a kernel over a grid of programs; tensors come first among its arguments.

    Like an operation of torch, it goes to the current stream of the tensors' device and
    returns before it has run.
    """
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*tensors, *numbers, **constants, num_warps=warps_for(constants), **EXACT)


def warps_for(constants: dict[str, Any]) -> int:
    """How many warps have something to do in a tile.

    Where there are more threads than elements, Triton has several threads read each of them, and one write it: in
    several warps, one could read what another has already overwritten.
    """
    elements = constants.get("ROWS", 1) * constants.get("COLUMNS", THREADS)
    return int(min(max(elements // 32, 1), WARPS))


def tile(rows: int, columns: int, width: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of a tile over a matrix; a row that is longer is cut.

    ``width`` is the number of bytes of an element: a thread holds as many as make one load or store.
    """
    elements = THREADS * WIDTH // width
    wide = min(triton.next_power_of_2(max(columns, 1)), elements)
    return min(triton.next_power_of_2(max(rows, 1)), elements // wide), wide


def blocks(length: int, size: int) -> int:
    return -(-length // size)
