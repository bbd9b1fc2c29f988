"""Start a program on several ranks of this machine, and end all of it whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from hvd_qsgd import QSGD, Codec, EliasQSGD, RowTopK, Sign, TopK
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import EXCHANGES, Job, Piece, exchanges_for
from hvd_qsgd.kernels import kernels_for

ROOT = Path(__file__).resolve().parent.parent
#: Where ranks that run pytest put their counts: a directory, named by this variable.
REPORTS = "HVD_QSGD_TEST_REPORTS"

LAUNCHERS = {
    "mpi": ["horovodrun", "--mpi", "-np"],
    "gloo": ["horovodrun", "--gloo", "-np"],
    "mpirun": ["mpirun", "-np"],
}


def environment() -> dict[str, str]:
    """This process's environment, with what the launchers and a crowded machine need."""
    paths = {
        "PATH": [str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)],
        "PYTHONPATH": [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")],
    }
    return {
        **os.environ,
        **{name: os.pathsep.join(filter(None, entries)) for name, entries in paths.items()},
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        # With more ranks than cores, ranks that wait must not keep the others from working.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        # Open MPI from a Python package does not know where it was unpacked; any other does.
        **({"OPAL_PREFIX": sys.prefix} if Path(sys.prefix, "bin", "mpirun").exists() else {}),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
    }


@dataclass
class Outcome:
    """How a job ended. ``output`` is what all ranks and the launcher printed."""

    status: int
    output: str
    #: Of ranks that run pytest, in rank order: tests "collected" and "passed".
    reports: list[dict[str, int]] = field(default_factory=list)


def launch(command: Sequence[str], ranks: int, launcher: str = "mpi", timeout: float = 240) -> Outcome:
    """Run ``python command...`` on ``ranks`` ranks; after ``timeout`` seconds its status is -1."""
    with tempfile.TemporaryDirectory() as reports:
        process = subprocess.Popen(
            [*LAUNCHERS[launcher], str(ranks), sys.executable, *command],
            cwd=ROOT,
            env={**environment(), REPORTS: reports},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            output, _ = process.communicate()
            status, output = -1, f"{output}\nkilled after {timeout:g} seconds"
        except BaseException:
            kill_tree(process.pid)
            raise
        files = [Path(reports, f"{rank}.json") for rank in range(ranks)]
        counts = [json.loads(file.read_text()) for file in files if file.exists()]
    return Outcome(status, output, counts)


def launch_pytest(
    arguments: Sequence[str], ranks: int, launcher: str = "mpi", timeout: float = 400, folder: str = "horovod_torch"
) -> Outcome:
    """Run pytest on every rank, with files of a folder of ``tests`` and options."""
    inner = Path("tests", folder)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--color=no",
        f"--confcutdir={inner}",
        "--timeout=180",
        "--timeout-method=thread",
    ]
    return launch(
        ["-m", "pytest", *options, *(str(inner / name) if name.endswith(".py") else name for name in arguments)],
        ranks,
        launcher,
        timeout,
    )


def check(outcome: Outcome, ranks: int) -> None:
    """All ranks ran the same number of tests, more than none, and all of them passed."""
    assert outcome.status == 0, outcome.output
    assert len(outcome.reports) == ranks, outcome.output
    collected = {report["collected"] for report in outcome.reports}
    assert len(collected) == 1 and collected != {0}, outcome.reports
    assert all(report["passed"] == report["collected"] for report in outcome.reports), outcome.reports


def kill_tree(pid: int) -> None:
    """End a process and all that it started, in whatever process groups they are."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def compile_kernels() -> None:
    """Compile, to the cache on disk, what otherwise all ranks would compile at the same time."""
    codecs: list[Codec] = [QSGD(), TopK(), Sign(), RowTopK(), EliasQSGD()]
    pairs = [(exchange, codec) for codec in codecs for exchange in exchanges_for(codec)]
    for exchange, codec in pairs:
        arrays = [np.arange(2000, dtype=np.float32) for _ in range(2)]
        kernels = kernels_for(codec, "numba")
        jobs = [
            Job("warm-up", [Piece("x", x, np.empty_like(x), keep_error=True)], kernels, rank, 2, np.empty)
            for rank, x in enumerate(arrays)
        ]
        simulate([EXCHANGES[exchange](job) for job in jobs])
