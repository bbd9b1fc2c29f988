"""Several hosts of which one is slow, is lost, or does not answer any more: the job goes on, or ends and says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_multihost import NEEDS_CLUSTER, EmulatedCluster, check_training, measure, run, total_sent

pytestmark = NEEDS_CLUSTER

#: What docs/clusters.md recommends, with shorter times.
QUICK = {
    "OMPI_MCA_oob_tcp_keepalive_time": "2",
    "OMPI_MCA_oob_tcp_keepalive_intvl": "1",
    "OMPI_MCA_oob_tcp_keepalive_probes": "3",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",
}
#: Ranks that share a crowded machine may wait for each other for some seconds without harm.
STALL = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "4", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "8"}


@pytest.mark.parametrize("launcher", ["gloo", "mpirun"])
def test_a_slow_host_of_four_holds_up_the_others_and_changes_nothing_else(launcher: str) -> None:
    with EmulatedCluster(4, rate="1gbit") as cluster:
        cluster.limit(3, "100mbit")
        reports = measure(cluster, launcher, 3, "none", "qsgd")
    for report in reports.values():
        assert len(report) == 4
        check_training(report)
    assert total_sent(reports["qsgd"]) <= 0.15 * total_sent(reports["none"])


def run_into(
    cluster: EmulatedCluster, launcher: str, trouble: Callable[[], None], directory: Path, **variables: str
) -> str:
    """Train until trouble comes, in the midst of it; what the launcher and all ranks say. That the job ends is
    checked by the time limit, which is far below the times that Horovod and Open MPI take if nothing is set."""
    under_way, ended = directory / "under-way", threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if under_way.exists():
                trouble()
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        arguments = ["--compression", "qsgd", "--until-lost", str(under_way)]
        result = run(cluster, launcher, *arguments, **QUICK, **variables)
    finally:
        ended.set()
        watcher.join()
    assert under_way.exists(), f"{result.stdout}\n{result.stderr}"
    assert result.returncode != 0
    return f"{result.stdout}\n{result.stderr}"


# What the launchers say, which docs/troubleshooting.md explains.
LOST = {"mpi": "ORTE has lost communication with a remote daemon", "gloo": "10000ms for recv operation to complete"}
KILLED = {
    "mpi": ["An MPI communication peer process has unexpectedly disconnected"],
    # The last one by ssh, where the launcher ends the other ranks before they notice.
    "gloo": ["Connection closed by peer", "Connection reset by peer", "closed by remote host"],
}


@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_a_host_that_falls_silent_ends_the_job(launcher: str, tmp_path: Path) -> None:
    with EmulatedCluster(2) as cluster:
        said = run_into(cluster, launcher, lambda: cluster.disconnect(1), tmp_path)
    assert LOST[launcher] in said, said


@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_a_host_that_is_killed_ends_the_job(launcher: str, tmp_path: Path) -> None:
    with EmulatedCluster(2) as cluster:
        said = run_into(cluster, launcher, lambda: cluster.kill(1), tmp_path)
    assert any(message in said for message in KILLED[launcher]) and "10.77.0.2" in said, said


def test_a_rank_that_does_not_go_on_ends_the_job(tmp_path: Path) -> None:
    """Over MPI: over Gloo Horovod does not look for such ranks."""
    with EmulatedCluster(2) as cluster:
        said = run_into(cluster, "mpi", lambda: None, tmp_path, SLEEPING_RANK="1", **STALL)
    assert "is stalled for longer than 8 seconds" in said and "1!: [" in said, said
