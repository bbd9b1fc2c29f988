"""Elastic Horovod: a worker is killed in the middle of a step, another one joins, and compressed training goes on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launch import ROOT, compile_kernels, environment, kill_tree

WORKER = Path(__file__).with_name("elastic_worker.py")
#: Hosts are names of this machine: Horovod shuns a host on which a worker died.
KEPT, LOST = "localhost", "127.0.0.1"


def another_name() -> str:
    """A third name or address of this machine that Horovod takes for local, and does not call by ssh."""
    local = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET}
    names = [socket.gethostname(), *sorted(local - {LOST})]
    return next(name for name in names if name != KEPT and socket.gethostbyname(name) in local)


ADDED = another_name()


def entries(directory: Path, host: str) -> list[dict]:
    lines = [line for path in sorted(directory.glob(f"{host}-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the job ended early"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_training_survives_a_lost_worker_and_takes_a_new_one(tmp_path: Path) -> None:
    compile_kernels()
    hosts, log = tmp_path / "hosts", tmp_path / "output"
    hosts.write_text(f"{KEPT}:2\n{LOST}:1\n")
    discovery = tmp_path / "discover.sh"
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    command = ["horovodrun", "--gloo", "-np", "3", "--min-np", "2", "--max-np", "3"]
    command += ["--host-discovery-script", str(discovery), sys.executable, str(WORKER), str(tmp_path)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=output, text=True, start_new_session=True
        )
        try:
            wait_for(lambda: len(entries(tmp_path, LOST)) >= 8, process)
            (tmp_path / f"die-{LOST}").touch()
            wait_for(lambda: any(entry["ranks"] == 2 for entry in entries(tmp_path, KEPT)), process)
            hosts.write_text(f"{KEPT}:2\n{ADDED}:1\n")
            wait_for(lambda: len(entries(tmp_path, ADDED)) >= 10, process)
            (tmp_path / "stop").touch()
            process.wait(120)
        except BaseException:
            kill_tree(process.pid)
            print(log.read_text()[-5000:])
            raise
    assert process.returncode == 0, log.read_text()[-5000:]
    check_run(tmp_path)
    for path in tmp_path.glob(f"{KEPT}-*.jsonl"):
        changed = [json.loads(line) for line in path.read_text().splitlines()]
        for entry in changed:
            entry["start"][0] += 1e-3
        path.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    with pytest.raises(AssertionError):
        check_loss(tmp_path)


def check_run(directory: Path) -> None:
    by_step: dict[int, list[dict]] = {}
    for host in (KEPT, LOST, ADDED):
        for entry in entries(directory, host):
            by_step.setdefault(entry["step"], []).append(entry)
    assert sorted(by_step) == list(range(1, max(by_step) + 1))
    for present in by_step.values():
        # A step that was interrupted is done again by those that are left.
        ranks = present[-1]["ranks"]
        again = [entry for entry in present if entry["ranks"] == ranks]
        assert len({entry["weights"] for entry in again}) == 1, "ranks differ"
    sizes = [by_step[step][0]["ranks"] for step in sorted(by_step)]
    assert sizes[0] == sizes[-1] == 3 and 2 in sizes
    losses = [by_step[step][0]["loss"] for step in sorted(by_step)]
    assert losses[-1] < losses[0] / 4
    check_loss(directory)
    newcomer = entries(directory, ADDED)[0]
    before = next(e for e in reversed(entries(directory, KEPT)) if e["step"] == newcomer["step"] - 1)
    assert before["ranks"] == 2
    # The mean of the residuals is what it was before the newcomer, who had none.
    assert any(before["mean"]) and newcomer["start"] == pytest.approx(before["mean"], abs=1e-6)


def check_loss(directory: Path) -> None:
    """Those that are left do the interrupted step again, from the mean of their own residuals."""
    lost = entries(directory, LOST)[-1]
    files = [[json.loads(line) for line in path.read_text().splitlines()] for path in directory.glob(f"{KEPT}-*.jsonl")]
    alone = [next(entry for entry in file if entry["ranks"] == 2) for file in files]
    before = [file[file.index(entry) - 1] for file, entry in zip(files, alone)]
    assert len(files) == 2
    assert {entry["step"] for entry in before} == {lost["step"]} and before[0]["own"] != before[1]["own"]
    mean = [sum(values) / 2 for values in zip(*(entry["own"] for entry in before))]
    for entry in alone:
        assert entry["step"] == lost["step"] + 1
        assert entry["start"] == pytest.approx(mean, abs=1e-6)


def test_the_check_can_fail(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_run(tmp_path)
