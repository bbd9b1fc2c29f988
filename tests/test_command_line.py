"""The commands of ``hvd-qsgd``, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import ROOT, environment, launch
from typer.testing import CliRunner

from hvd_qsgd import QSGD, ConfigError, HvdQsgdError, SetupError
from hvd_qsgd.cli import app
from hvd_qsgd.commands import doctor, estimate
from hvd_qsgd.commands.inspect_files import inspect_file
from hvd_qsgd.kernels.triton import probe
from hvd_qsgd.observe import JsonLines, Record
from hvd_qsgd.observe.stats import Stats, TensorStats

SPEEDS = dict.fromkeys(estimate.CODECS, (0.7e-9, 0.4e-9, 1.5e-9))


def hvd_qsgd(*arguments: str, status: int = 0, **variables: str) -> str:
    command = [sys.executable, "-m", "hvd_qsgd", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment(), "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        check=False,
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


def test_doctor_believes_the_libraries_of_horovod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`horovodrun --check-build` names PyTorch where Horovod was built for TensorFlow alone."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "mpi_lib.cpython-311.so").touch()
    monkeypatch.setattr(doctor, "distribution_version", lambda *names: None if "torch" in names else "2.18.1")
    assert doctor._built_for(tmp_path) == doctor.Finding("built for", doctor.GOOD, "TensorFlow")
    monkeypatch.setattr(doctor, "distribution_version", lambda *names: "2.18.1")
    finding = doctor._built_for(tmp_path)
    assert finding.state == doctor.BAD and finding.found == "TensorFlow, and not for PyTorch" and finding.remedy


def test_doctor_knows_the_loopback_trap(tmp_path: Path) -> None:
    mtu = tmp_path / "mtu"
    for value, state in (("65536", doctor.WARNING), ("9000", doctor.GOOD)):
        mtu.write_text(value)
        finding = doctor._loopback(mtu)
        assert finding.state == state and value in finding.found
    assert doctor._loopback(tmp_path / "none").state == doctor.GOOD


@pytest.mark.parametrize(("version", "state"), [(0, doctor.WARNING), (21805, doctor.GOOD)])
def test_doctor_says_how_payloads_travel_between_gpus(
    version: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import horovod.torch as hvd
    import torch

    assert doctor._gpu_collectives() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hvd, "nccl_built", lambda: version)
    (finding,) = doctor._gpu_collectives()
    assert finding.state == state and ("pinned host memory" in finding.found) == (not version)


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


def test_doctor_goes_on_when_a_program_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(doctor.subprocess, "run", slow)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    findings = [*doctor._build(), doctor._mpi(), *doctor._gpu()]
    assert all(finding.state == doctor.WARNING and "no answer" in finding.found for finding in findings)


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
    # A terminal without the lines of tables.
    assert "Yes: " in hvd_qsgd("estimate", "-p", "25e6", "-n", "2", "-b", "0.1", PYTHONIOENCODING="ascii")
    assert "at least 1 parameter and 2 ranks" in hvd_qsgd("estimate", "-p", "1e6", "-n", "1", "-b", "1", status=1)


def test_help_lists_the_commands() -> None:
    text = hvd_qsgd("--help")
    commands = ("doctor", "estimate", "install-horovod", "bench", "demo", "inspect", "report")
    assert all(name in text for name in (*commands, "Exit status"))


def test_estimates_of_a_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 * 4 + 4, and only what is trained.
    (tmp_path / "some_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(3, 4)\n"
        "model = make()\nmodel.bias.requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert estimate.count_parameters("some_model:make") == 16
    assert estimate.count_parameters("some_model:model") == 12
    for wrong in ("some_model", "some_model:nothing", "no_such_module:x", "json:loads", "builtins:dict"):
        with pytest.raises(ConfigError, match="--model"):
            estimate.count_parameters(wrong)


WRONG_MODELS = """
import sys
import torch

lazy = lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LazyLinear(5))
frozen = torch.nn.Linear(3, 4).requires_grad_(False)
relu = torch.nn.ReLU
number = lambda: 3
leaves = lambda: sys.exit("no data")
needs = lambda size: size

def fails():
    raise RuntimeError("first line\\nthe cause\\n")

class Odd:
    @property
    def parameters(self):
        raise RuntimeError("odd")

    def __repr__(self):
        raise RuntimeError("no repr")

class Broken(torch.nn.Module):
    def parameters(self, recurse=True):
        raise KeyError("weights")

odd, broken, silly = Odd(), Broken(), lambda: (_ for _ in ()).throw(AssertionError)
"""


def test_what_is_wrong_with_a_model_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_models.py").write_text(WRONG_MODELS)
    (tmp_path / "wrong_syntax.py").write_text("import torch\nmodel = (\n")
    (tmp_path / "wrong_exit.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, why in {
        "wrong_models:lazy": "have no shape before the first batch",
        "wrong_models:frozen": "has no parameters to train",
        "wrong_models:relu": "has no parameters to train",
        "wrong_models:number": "is of the type int, and neither",
        "wrong_models:leaves": "SystemExit: no data",
        "wrong_models:needs": "TypeError: .*missing 1 required positional argument",
        "wrong_models:fails": "RuntimeError: the cause$",
        "wrong_models:odd": "RuntimeError: odd",
        "wrong_models:broken": "KeyError: 'weights'",
        "wrong_models:silly": "cannot be imported or made: AssertionError$",
        "wrong_models:": "must be package.module:name",
        "wrong_models:lazy.nothing": "AttributeError",
        ".:x": "cannot be imported or made",
        "wrong_syntax:model": "SyntaxError",
        "wrong_exit:model": "SystemExit: 3",
    }.items():
        with pytest.raises(ConfigError, match=why) as told:
            estimate.count_parameters(name)
        assert "\n" not in str(told.value) and "--model" in str(told.value)
    arguments = ("estimate", "--model", "wrong_models:lazy", "-n", "2", "-b", "1")
    assert "first batch" in hvd_qsgd(*arguments, status=1, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")


# -- between ranks ------------------------------------------------------------------------------------


def ranks(*arguments: str) -> Any:
    """The JSON that the first of two ranks prints."""
    outcome = launch(["-m", "hvd_qsgd", *arguments, "--json"], 2)
    assert outcome.status == 0, outcome.output
    # mpirun tags each piece of output and resets the colour; the other rank prints nothing.
    text = re.sub(r"\[1,\d\]<std\w+>:|\x1b\[\d*m", "", outcome.output)
    return json.JSONDecoder().raw_decode(text[text.index("[\n {") :])[0]


def test_measured_estimates_and_exchanges() -> None:
    rows = ranks("estimate", "--measure", "-p", "1e6")
    assert [row["method"] for row in rows][:2] == ["Horovod, uncompressed", "hvd.Compression.fp16"]
    assert all(row["seconds"] > 0 for row in rows)
    times = ranks("bench", "--exchange", "--elements", "2e5", "--repeats", "1")
    sent = {row["method"]: row["sent"] for row in times}
    assert sent["Horovod, uncompressed"] == 8e5 and 7.5 < 8e5 / sent["QSGD, 4 bits"] < 8


def test_measuring_needs_a_job() -> None:
    for arguments in (["estimate", "--measure", "-p", "1e6"], ["bench", "--exchange"]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, SetupError) and "horovodrun -np" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "-p", "1e6"],
        ["estimate", "-p", "nan", "-n", "2", "-b", "1"],
        ["estimate", "-n", "2", "-b", "1"],
        ["estimate", "-p", "1e6", "--model", "x:y", "-n", "2", "-b", "1"],
        ["estimate", "--measure", "-p", "1e6", "-n", "2"],
        ["bench", "--repeats", "0"],
        ["no-such-command"],
    ],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


# -- bench, demo, inspect, report ------------------------------------------------------------------


def test_bench_lists_codecs() -> None:
    rows = json.loads(hvd_qsgd("bench", "--json"))
    assert rows[0] == {"codec": "memcpy", "ratio": 1.0, "encode": rows[0]["encode"], "decode": rows[0]["encode"]}
    assert next(row for row in rows if row["codec"] == "QSGD, 4 bits")["ratio"] == pytest.approx(7.88, abs=0.01)


def test_the_demo_comes_with_the_package() -> None:
    """Its run is tested with the examples; here, that the command finds it and hands on what it says."""
    assert "must be 2 or more" in hvd_qsgd("demo", "--ranks", "1", status=2)


GOLDEN = ROOT / "tests" / "golden"


def test_inspect_a_payload() -> None:
    name = GOLDEN / "qsgd_4bit_second_part"
    elements = str(np.load(f"{name}.npy").size)
    found = json.loads(hvd_qsgd("inspect", f"{name}.bin", "--config", f"{name}.json", "--elements", elements, "--json"))
    decoded = QSGD(4, 64).decode(np.fromfile(f"{name}.bin", np.uint8), int(elements))
    assert found["kind"] == "payload" and found["facts"]["norm"] == pytest.approx(float(np.linalg.norm(decoded)))
    assert found["facts"]["largest"] == float(decoded.max())


def test_inspect_says_what_is_wrong(tmp_path: Path) -> None:
    payload, junk = f"{GOLDEN / 'qsgd_4bit_second_part'}.bin", tmp_path / "junk.pt"
    junk.write_bytes(b"nothing")
    for arguments, why in (
        ([payload, "--config", '{"codec": "qsgd"}', "--elements", "7"], "bytes, but"),
        ([payload, "--config", '{"codec": "none"}', "--elements", "7"], "Unknown codec"),
        ([payload, "--config", "{", "--elements", "7"], "no JSON"),
        ([payload, "--config", '{"a": ' * 10**5, "--elements", "7"], "no JSON"),
        ([payload, "--config", payload, "--elements", "7"], "no JSON"),
        ([payload, "--config", '{"config": 3}', "--elements", "7"], "must be an object"),
        ([payload, "--config", '{"codec": "qsgd", "bits": {}}', "--elements", "7"], "bits={}"),
        ([payload, "--config", '{"codec": "rows", "inner": [], "length": 3}', "--elements", "7"], "must be a codec"),
        ([payload, "--config", '{"codec": "identity"}', "--elements", "9" * 15], "than memory can hold"),
        ([payload, "--config", '{"codec": "identity"}', "--elements", "9" * 30], "than memory can hold"),
        ([payload], "For a payload give --config"),
        ([str(junk)], "cannot read"),
        (["nowhere.pt"], "There is no file"),
    ):
        result = CliRunner().invoke(app, ["inspect", *arguments])
        assert isinstance(result.exception, HvdQsgdError) and why in str(result.exception), arguments
    assert "There is no file" in hvd_qsgd("inspect", "nowhere.pt", status=1)


def test_inspect_a_checkpoint(tmp_path: Path) -> None:
    import torch

    residual = torch.arange(6.0)
    state = {"version": 2, "config": {"codec": "topk"}, "arrays": {"residual/0/w": residual}, "steps": {"0/w": 41}}
    torch.save({"model": {}, "compression": {"ranks": 1, "states": [state]}}, tmp_path / "checkpoint.pt")
    found = json.loads(hvd_qsgd("inspect", str(tmp_path / "checkpoint.pt"), "--json"))
    (row,) = found["rows"]
    assert (row["where"], row["array"], row["elements"]) == ("compression/states/0", "residual/0/w", 6)
    assert row["norm"] == pytest.approx(float(residual.norm())) and found["facts"]["steps"] == "42 to 42"
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="holds no state"):
        inspect_file(tmp_path / "other.pt")


def test_report_and_inspect_of_records(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "run.jsonl")
    stats = Stats({"0/w": TensorStats(1000, 10, 40_000, 5000, 5000.0, 40_000.0, exchange="allgather")})
    sink.write(Record(1e9, 10, 10, 2.0, 0, 2, "QSGDCompressor()", stats))
    sink.close()
    page = tmp_path / "page.html"
    told = json.loads(hvd_qsgd("report", str(tmp_path / "run.jsonl"), "-o", str(page), "--json"))
    assert told["runs"][str(tmp_path / "run.jsonl")]["wire_bytes"] == 5000 and "0/w" in page.read_text()
    found = json.loads(hvd_qsgd("inspect", str(tmp_path / "run.jsonl"), "--json"))
    assert found["facts"]["times fewer bytes"] == 8 and found["rows"][0]["tensor"] == "0/w"
    assert "No such file" in hvd_qsgd("report", str(tmp_path / "none.jsonl"), status=1)


def test_shell_completion() -> None:
    """What the script that --install-completion writes asks for."""
    asked = {"_HVD_QSGD_COMPLETE": "complete_bash", "COMP_WORDS": "hvd-qsgd in", "COMP_CWORD": "1"}
    done = subprocess.run(
        ["hvd-qsgd"], cwd=ROOT, env={**environment(), **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["install-horovod", "inspect"], done.stderr
