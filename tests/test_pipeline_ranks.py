"""Pipelines over real ranks: the numbers of the simulation, checkpoints, replicas, and how failures end."""

from __future__ import annotations

import subprocess

import pytest
from launch import LAUNCHERS, Outcome, environment, launch
from pipeline_worker import CASES

WORKER = "tests/pipeline_worker.py"

pytestmark = pytest.mark.slow


#: Schedules differ in the order of the work only, so a few cases tell.
GPIPE = ["qsgd", "ef", "aq-sgd"]


def lines(outcome: Outcome, text: str) -> int:
    assert outcome.status == 0, outcome.output
    return sum("RANK" in line and text in line for line in outcome.output.splitlines())


def test_every_kind_of_compression_equals_the_simulation_and_goes_on_from_a_checkpoint() -> None:
    outcome = launch([WORKER, "identical", "checkpoint", "--gpipe", *GPIPE], 4, "mpirun")
    assert lines(outcome, "identical") == 4 * (len(CASES) + len(GPIPE)), outcome.output
    assert lines(outcome, "checkpoint: went on") == 4
    assert lines(outcome, "checkpoint: a difference was found") == 4


def test_messages_of_a_gpu_go_where_mpi_reaches_them() -> None:
    outcome = launch([WORKER, "device_memory"], 2, "mpirun")
    assert lines(outcome, "right") == 4
    built = subprocess.run(
        ["ompi_info", "--parsable", "--all"], capture_output=True, text=True, check=True, env=environment()
    )
    assert lines(outcome, f"MPI says {'mpi_built_with_cuda_support:value:true' in built.stdout}") == 2


@pytest.mark.parametrize(("ranks", "launcher"), [(2, "gloo"), (4, "mpi")])
def test_over_horovod_process_sets(ranks: int, launcher: str) -> None:
    cases = ["shared mask", "aq-sgd after warm-up"]
    options = ["--transport", "horovod", "--stages", str(ranks), "--cases", *cases]
    assert lines(launch([WORKER, "identical", *options], ranks, launcher), "identical") == ranks * len(cases)


def test_replicas_of_a_pipeline_with_compressed_gradients() -> None:
    assert lines(launch([WORKER, "hybrid", "--stages", "2"], 4, "mpi"), "replicas agree") == 8


@pytest.mark.parametrize(("work", "transport"), [("outside", "mpi"), ("error", "horovod")])
def test_an_error_on_one_stage_ends_all_stages_with_its_cause(work: str, transport: str) -> None:
    outcome = launch([WORKER, work, "--transport", transport], 4, "mpi", timeout=120)
    assert outcome.status not in (0, -1), outcome.output
    cause = "stage 1 of replica 0 (rank 1) failed: ValueError: what went wrong"
    told = {stage for stage in range(4) if f"stage {stage} was told: {cause}" in outcome.output}
    assert told == {0, 2, 3}, outcome.output


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "mpi"])
def test_a_killed_stage_does_not_hang_the_others(launcher: str) -> None:
    transport = "horovod" if launcher == "gloo" else "mpi"
    outcome = launch([WORKER, "kill", "--transport", transport], 4, launcher, timeout=120)
    assert outcome.status not in (0, -1), outcome.output
