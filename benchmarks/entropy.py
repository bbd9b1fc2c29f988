#!/usr/bin/env python
"""How small the levels of QSGD get: at fixed width, by Elias coding, by a range coder, and by their entropy.

On gradients of the two tasks of benchmarks/accuracy.py, of one rank, uncompressed training, at some of its steps:

    pip install 'constriction==0.5.0'         # the range coder; optional
    python benchmarks/entropy.py --output entropy

Every column counts whole payloads, scales among them, in bits a value, over all tensors that are compressed. The
entropy is that of the levels of a tensor as independent draws: a bound for coders that know no more than how often
each level comes. The range coder is given just that, and its table of counts (16 bits a level) is counted as well.
What it made is decoded again and compared. Prints a table, and writes it as JSON too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_members import MIN_ELEMENTS
from accuracy_tasks import Task, kjv, mnist
from torch.nn.functional import cross_entropy

from hvd_qsgd import EliasQSGD
from hvd_qsgd.kernels import kernels_for

#: bits and bucket size, as in the QSGD paper.
QUANTIZERS = ((2, 128), (4, 512), (8, 512))
COLUMNS = ("fixed width", "Elias", "range coder", "entropy")


def gradients(task: Task, steps: tuple[int, ...], ranks: int = 4) -> list[np.ndarray]:
    """Of the tensors that are compressed, of one rank, at the given steps of training."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(list(model.parameters()), True)
    found = []
    for step, (inputs, targets) in zip(range(max(steps) + 1), task.batches(0, ranks)):
        for rank in range(ranks):
            loss = cross_entropy(model(inputs[rank::ranks]).flatten(0, -2), targets[rank::ranks].flatten())
            (loss / ranks).backward()
            if rank == 0 and step in steps:
                for parameter in model.parameters():
                    if parameter.dim() >= 2 and parameter.numel() >= MIN_ELEMENTS:
                        assert parameter.grad is not None
                        found.append(ranks * parameter.grad.flatten().numpy())
        optimizer.step()
        optimizer.zero_grad()
    return found


def entropy_bytes(levels: np.ndarray) -> float:
    _, counts = np.unique(levels, return_counts=True)
    return float((counts * np.log2(len(levels) / counts)).sum() / 8)


def range_coded_bytes(levels: np.ndarray, largest: int) -> int:
    """Bytes of levels from -largest to largest by constriction's coder, and of the counts that its decoder needs.

    Raises:
        AssertionError: the decoder does not give them back.
    """
    from constriction import stream

    symbols = (levels + largest).astype(np.int32)
    counts = np.bincount(symbols, minlength=2 * largest + 1)
    # As the decoder gets them; no count is rounded to zero.
    table = np.ceil(counts * (65535 / counts.max())).clip(max=65535).astype("<u2")
    model = stream.model.Categorical((table / table.sum()).astype(np.float32), perfect=False)
    encoder = stream.queue.RangeEncoder()
    encoder.encode(symbols, model)
    coded = encoder.get_compressed()
    if not (stream.queue.RangeDecoder(coded).decode(model, len(symbols)) == symbols).all():
        raise AssertionError("The range coder did not give back what it was given.")
    return int(coded.nbytes + table.nbytes)


def measure(tensors: list[np.ndarray], codec: EliasQSGD) -> dict[str, float]:
    """Bits a value by column; without the range coder if it is not installed."""
    quantizer, values = codec.quantizer, sum(map(len, tensors))
    total = dict.fromkeys(COLUMNS, 0.0)
    if importlib.util.find_spec("constriction") is None:
        del total["range coder"]
    for key, x in enumerate(tensors):
        fixed = quantizer.encode(x, key)
        out = np.empty(codec.payload_size(len(x)), np.uint8)
        levels, scales = codec.levels_of(fixed, len(x)), 4 * quantizer.buckets(len(x))
        total["fixed width"] += len(fixed)
        total["Elias"] += kernels_for(codec, "numba").encode_into(x, out, key)
        total["entropy"] += scales + entropy_bytes(levels)
        if "range coder" in total:
            total["range coder"] += scales + range_coded_bytes(levels, quantizer.levels)
    return {column: 8 * size / values for column, size in total.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; in brackets, how many times fewer than float32."""
    lines = [f"| gradients | levels | {' | '.join(COLUMNS)} |", "|---|---|" + "--:|" * len(COLUMNS)]
    for row in rows:
        bits = row["bits_a_value"]
        cells = [f"{bits[c]:.2f} ({32 / bits[c]:.1f}x)" if c in bits else "not installed" for c in COLUMNS]
        lines.append(f"| {row['task']} | {row['levels']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="gradients of the first step alone")
    parser.add_argument("--output", type=Path, default=Path("entropy"), help="of .json, without the ending")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = (0,) if arguments.quick else (0, 20, 100)
    rows = []
    for task in (mnist(epochs=3), kjv(steps=200)):
        tensors = gradients(task, steps)
        for norm in ("max", "l2"):
            for bits, bucket_size in QUANTIZERS:
                result = measure(tensors, EliasQSGD(bits, bucket_size, norm))
                levels = f"{bits} bits, bucket {bucket_size}, {norm} norm"
                rows.append({"task": task.name, "levels": levels, "bits_a_value": result})
    print(table(rows))
    arguments.output.with_suffix(".json").write_text(json.dumps({"steps": steps, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
