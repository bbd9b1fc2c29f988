"""``hvd-qsgd doctor`` and ``hvd-qsgd estimate``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT, environment
from typer.testing import CliRunner

from hvd_qsgd import ConfigError, doctor, estimate
from hvd_qsgd.cli import app
from hvd_qsgd.kernels.triton import probe

SPEEDS = dict.fromkeys(estimate.CODECS, (0.7e-9, 0.4e-9, 1.5e-9))


def hvd_qsgd(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "hvd_qsgd", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), "COLUMNS": "200"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# -- doctor -------------------------------------------------------------------------------------------


def test_doctor_finds_what_is_here() -> None:
    findings = {finding["what"]: finding for finding in json.loads(hvd_qsgd("doctor", "--json"))}
    assert findings["Horovod"]["found"] == "0.28.1" and findings["Horovod"]["state"] == "ok"
    assert "PyTorch" in findings["built for"]["found"] and "Gloo" in findings["collectives over"]["found"]
    assert all(bool(finding["remedy"]) == (finding["state"] != "ok") for finding in findings.values())


def test_doctor_names_what_is_missing_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "distribution_version", lambda *names: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    for text in ("hvd-qsgd install-horovod", "pip install numba", "neither torch nor TensorFlow", "no mpirun"):
        assert text in result.output


def test_doctor_knows_the_loopback_trap(tmp_path: Path) -> None:
    mtu = tmp_path / "mtu"
    for value, state in (("65536", doctor.WARNING), ("9000", doctor.GOOD)):
        mtu.write_text(value)
        finding = doctor._loopback(mtu)
        assert finding.state == state and value in finding.found
    assert doctor._loopback(tmp_path / "none").state == doctor.GOOD


def test_doctor_says_which_kernels_serve_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A100 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for fault, state, found in (("", doctor.GOOD, "Triton"), ("no compiler", doctor.WARNING, "torch operations")):
        monkeypatch.setattr(probe, "fault_on", lambda device, fault=fault: fault)
        gpu, kernels = doctor._gpu()
        assert gpu.found == "NVIDIA A100"
        assert kernels.state == state and found in kernels.found and fault in kernels.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._gpu()[1].state == doctor.WARNING


def test_doctor_warns_of_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._tensorflow("2.18.1").state == doctor.GOOD
    assert "2.18" in doctor._tensorflow("2.21.0").remedy
    monkeypatch.setattr(doctor, "distribution_version", lambda *names: "0.27.0")
    assert doctor._horovod().state == doctor.BAD


# -- estimate -----------------------------------------------------------------------------------------


def predicted(**situation: Any) -> dict[str, estimate.Prediction]:
    fields = {"parameters": 25_000_000, "ranks": 4, "bandwidth": 1e9, **situation}
    return {p.method: p for p in estimate.predict(estimate.Situation(**fields), SPEEDS)}


def test_slow_links_pay_and_fast_ones_do_not() -> None:
    slow, fast = (predicted(bandwidth=b)["QSGD, 4 bits"] for b in (1e8, 1e11))
    assert slow.pays and not fast.pays
    assert slow.break_even == fast.break_even and 1e9 < slow.break_even < 1e11
    assert predicted(bandwidth=slow.break_even * 0.95)["QSGD, 4 bits"].pays
    assert not predicted(bandwidth=slow.break_even * 1.05)["QSGD, 4 bits"].pays


def test_steps_that_hide_their_transfers_gain_nothing() -> None:
    hidden = predicted(bandwidth=1e10, compute=3.0, backward=2.0)
    assert all(not p.pays for p in hidden.values())
    # Half the bytes are half the time where nothing hides and nothing else takes time.
    assert predicted(latency=0.0)["hvd.Compression.fp16"].speedup == pytest.approx(2)


@pytest.mark.parametrize(
    "wrong", [{"ranks": 1}, {"parameters": 0}, {"bandwidth": 0.0}, {"compute": 1.0, "backward": 2.0}, {"latency": -1.0}]
)
def test_impossible_situations_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        predicted(**wrong)


def test_the_command_says_yes_and_no() -> None:
    assert "Yes: " in hvd_qsgd("estimate", "-p", "25e6", "-n", "2", "-b", "0.1")
    no = hvd_qsgd("estimate", "-p", "1e5", "-n", "2", "-b", "400", "--step", "500")
    assert "No: " in no and "Yes" not in no
    rows = json.loads(hvd_qsgd("estimate", "-p", "25e6", "-n", "8", "-b", "1", "--json"))
    assert rows[0]["method"] == "Horovod, uncompressed"
    assert next(row for row in rows if row["method"] == "QSGD, 4 bits")["exchange"] == "scatter_gather"
    assert "at least 1 parameter and 2 ranks" in hvd_qsgd("estimate", "-p", "1e6", "-n", "1", "-b", "1", status=1)


def test_help_lists_the_commands() -> None:
    text = hvd_qsgd("--help")
    assert all(name in text for name in ("doctor", "estimate", "install-horovod"))
