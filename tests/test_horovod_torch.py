"""Real Horovod: runs the tests of ``horovod_torch`` on every rank of real jobs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launch import Outcome, check, compile_kernels, launch, launch_pytest

INNER = Path(__file__).resolve().parent / "horovod_torch"
#: These leave Horovod unfit for the tests that follow, and have a job of their own.
ALONE = ["test_join.py", "test_refusals.py"]
#: Further codecs, feedback, policies, state, monitors, a GPU's stand-in, and long runs: once in full.
FAMILY = [
    "test_family.py",
    "test_feedback_kinds.py",
    "test_gpu_stand_in.py",
    "test_memory.py",
    "test_mixed_precision.py",
    "test_monitor.py",
    "test_policies.py",
    "test_settings_of_torch.py",
    "test_state.py",
]
FILES = sorted(path.name for path in INNER.glob("test_*.py") if path.name not in (*ALONE, *FAMILY))
#: With more ranks than cores, Gloo takes 40 ms for what takes MPI 3: no place for every codec and every setting.
SHORT = ["test_optimizer.py", "test_other_collectives.py", "test_process_sets.py"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_kernels()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "launcher", "files"),
    [
        (2, "mpi", FILES),
        (4, "mpi", FILES),
        (2, "gloo", FILES),
        (4, "gloo", SHORT),
        (2, "mpi", FAMILY),
        (4, "mpi", ["test_state.py"]),
    ],
)
def test_every_mode_on_every_rank(ranks: int, launcher: str, files: list[str]) -> None:
    check(launch_pytest(files, ranks, launcher, timeout=800), ranks)


@pytest.mark.parametrize(("ranks", "launcher"), [(2, "mpi"), (4, "gloo")])
def test_in_jobs_of_their_own(ranks: int, launcher: str) -> None:
    check(launch_pytest(ALONE, ranks, launcher), ranks)


def test_plain_mpirun() -> None:
    check(launch_pytest(["test_rank_checks.py", "test_fusion_and_stats.py"], 2, "mpirun"), 2)


def test_settings_of_horovod_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its autotuning changes when and with what collectives are fused, in the middle of a run."""
    tuned = {"AUTOTUNE": "1", "FUSION_THRESHOLD": "4096", "CYCLE_TIME": "3", "CACHE_CAPACITY": "2"}
    for name, value in tuned.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    check(launch_pytest(["test_odd_programs.py", "test_rank_checks.py"], 2), 2)


@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_a_rank_that_fails_ends_the_job(launcher: str) -> None:
    outcome = launch_pytest(["one_rank_fails.py"], 2, launcher)
    assert outcome.status not in (0, -1), outcome.output
    assert "rank 1 of 2 failed in call" in outcome.output
    assert "what went wrong" in outcome.output
    assert "Timeout" not in outcome.output
    with pytest.raises(AssertionError):
        check(outcome, 2)


def test_no_rank_takes_a_gather_with_a_joined_rank_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Horovod refuses such a gather, but not if it has answered the same one from its cache before: then it breaks."""
    worker = str(INNER / "joined_gather.py")
    outcome = launch([worker, "allgather"], 2, "gloo")
    assert outcome.status not in (0, -1), outcome.output
    assert "RESULT" not in outcome.output
    monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "0")
    outcome = launch([worker, "allgather"], 2, "mpi")
    assert outcome.status not in (0, -1), outcome.output
    assert "UnsupportedError" in outcome.output and 'Use exchange="allreduce"' in outcome.output
    assert "RESULT" not in outcome.output


def test_a_rank_that_stands_still_is_named_with_the_tensor_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "1")
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "3")
    outcome = launch([str(INNER / "missing_rank.py"), "stands still"], 2)
    assert outcome.status not in (0, -1), outcome.output
    assert "STEP 2" in outcome.output and "STEP 3" not in outcome.output
    assert "REFUSED Horovod has been shut down" in outcome.output
    # The tensor's name is in that of its collective, so that Horovod's log tells who waits for whom.
    missing = outcome.output.split("Missing ranks:")[1]
    assert re.search(r"1: \[[^]]*hvd_qsgd[^]]*weight", missing), outcome.output


@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_a_rank_that_dies_ends_the_job(launcher: str) -> None:
    outcome = launch([str(INNER / "missing_rank.py"), "dies"], 2, launcher)
    assert outcome.status not in (0, -1), outcome.output
    assert "STEP 2" in outcome.output and "STEP 3" not in outcome.output


def test_the_check_can_fail() -> None:
    passed = {"collected": 3, "passed": 3}
    check(Outcome(0, "", [passed, passed]), 2)
    for status, reports in (
        (1, [passed, passed]),
        (0, [passed]),
        (0, [passed, {"collected": 3, "passed": 2}]),
        (0, [passed, {"collected": 2, "passed": 2}]),
        (0, [{"collected": 0, "passed": 0}] * 2),
    ):
        with pytest.raises(AssertionError):
            check(Outcome(status, "", reports), 2)


def test_horovods_timeline_shows_the_exchanges_of_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = tmp_path / "timeline.json"
    monkeypatch.setenv("HOROVOD_TIMELINE", str(timeline))
    outcome = launch([str(INNER / "timeline.py")], 2)
    assert outcome.status == 0, outcome.output
    # Horovod does not always close the list of events.
    tracks = re.findall(r'"name": "process_name".*?"args": {"name": "([^"]+)"}', timeline.read_text())
    ours = {name.rpartition(".")[2] for name in tracks if "hvd_qsgd" in name and "weight" in name}
    assert {"alltoall", "allgather"} <= ours, tracks
