"""Real Horovod: runs the tests of ``horovod_torch`` on every rank of real jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import Outcome, compile_kernels, launch_pytest

INNER = Path(__file__).resolve().parent / "horovod_torch"
#: These leave Horovod unfit for the tests that follow, and have jobs of their own.
ALONE = ["test_join.py", "test_refusals.py"]
FILES = sorted(path.name for path in INNER.glob("test_*.py") if path.name not in ALONE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_kernels()


def check(outcome: Outcome, ranks: int) -> None:
    """All ranks ran the same number of tests, more than none, and all of them passed."""
    assert outcome.status == 0, outcome.output
    assert len(outcome.reports) == ranks, outcome.output
    collected = {report["collected"] for report in outcome.reports}
    assert len(collected) == 1 and collected != {0}, outcome.reports
    assert all(report["passed"] == report["collected"] for report in outcome.reports), outcome.reports


@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mode_on_every_rank(ranks: int, launcher: str) -> None:
    check(launch_pytest(FILES, ranks, launcher, timeout=800), ranks)


@pytest.mark.parametrize(("ranks", "launcher"), [(2, "mpi"), (4, "gloo")])
@pytest.mark.parametrize("file", ALONE)
def test_in_jobs_of_their_own(ranks: int, launcher: str, file: str) -> None:
    check(launch_pytest([file], ranks, launcher), ranks)


def test_plain_mpirun() -> None:
    check(launch_pytest(["test_rank_checks.py", "test_fusion_and_stats.py"], 2, "mpirun"), 2)


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
