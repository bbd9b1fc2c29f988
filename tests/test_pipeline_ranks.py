"""Pipelines over real ranks: the numbers of the simulation, checkpoints, replicas, and how failures end."""

from __future__ import annotations

import pytest
from launch import LAUNCHERS, Outcome, launch
from pipeline_worker import CASES

WORKER = "tests/pipeline_worker.py"

pytestmark = pytest.mark.slow


def lines(outcome: Outcome, text: str) -> int:
    assert outcome.status == 0, outcome.output
    return sum("RANK" in line and text in line for line in outcome.output.splitlines())


@pytest.mark.parametrize(("ranks", "launcher"), [(2, "mpi"), (4, "mpirun")])
def test_every_kind_of_compression_equals_the_simulation(ranks: int, launcher: str) -> None:
    outcome = launch([WORKER, "identical", "--stages", str(ranks)], ranks, launcher)
    assert lines(outcome, "identical") == ranks * len(CASES) * 2, outcome.output


@pytest.mark.parametrize(("ranks", "launcher"), [(2, "gloo"), (4, "mpi")])
def test_over_horovod_process_sets(ranks: int, launcher: str) -> None:
    cases = ["shared mask", "aq-sgd after warm-up"]
    options = ["--transport", "horovod", "--stages", str(ranks), "--schedules", "1f1b", "--cases", *cases]
    assert lines(launch([WORKER, "identical", *options], ranks, launcher), "identical") == ranks * len(cases)


def test_checkpoints() -> None:
    outcome = launch([WORKER, "checkpoint"], 4, "mpirun")
    assert lines(outcome, "checkpoint: went on") == 4
    assert lines(outcome, "checkpoint: a difference was found") == 4


def test_replicas_of_a_pipeline_with_compressed_gradients() -> None:
    assert lines(launch([WORKER, "hybrid", "--stages", "2"], 4, "mpi"), "replicas agree") == 8


@pytest.mark.parametrize(("work", "transport"), [("error", "mpi"), ("outside", "mpi"), ("error", "horovod")])
def test_an_error_on_one_stage_ends_all_stages_with_its_cause(work: str, transport: str) -> None:
    outcome = launch([WORKER, work, "--transport", transport], 4, "mpi", timeout=120)
    assert outcome.status not in (0, -1), outcome.output
    cause = "stage 1 of replica 0 (rank 1) failed: ValueError: what went wrong"
    told = {stage for stage in range(4) if f"stage {stage} was told: {cause}" in outcome.output}
    assert told == {0, 2, 3}, outcome.output


def test_different_settings_end_all_stages() -> None:
    outcome = launch([WORKER, "settings"], 4, "mpirun", timeout=120)
    assert outcome.status not in (0, -1), outcome.output
    assert "boundary0.forward: the other end has other settings" in outcome.output


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "mpi"])
def test_a_killed_stage_does_not_hang_the_others(launcher: str) -> None:
    transport = "horovod" if launcher == "gloo" else "mpi"
    outcome = launch([WORKER, "kill", "--transport", transport], 4, launcher, timeout=120)
    assert outcome.status not in (0, -1), outcome.output
