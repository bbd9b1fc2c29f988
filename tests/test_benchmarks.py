"""Each benchmark runs in its quick form and writes what it promises; how fast things are is not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, environment, launch

sys.path.insert(0, str(ROOT / "benchmarks"))
from emulated_cluster import EmulatedCluster

pytestmark = pytest.mark.slow
UNAVAILABLE = EmulatedCluster.unavailable()
EMULATED = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no emulated cluster: {UNAVAILABLE}")


def run(benchmark: str, output: Path, *options: str, quick: bool = True) -> dict[str, object]:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / benchmark),
        *["--quick"] * quick,
        "--output",
        str(output),
        *options,
    ]
    done = subprocess.run(command, env=environment(), cwd=output.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, object] = json.loads(output.with_suffix(".json").read_text())
    return found


def test_codecs(tmp_path: Path) -> None:
    seconds = run("codecs.py", tmp_path / "codecs")["seconds"]
    assert isinstance(seconds, dict)
    assert {"memcpy", "qsgd 4 bits encode", "topk 1 % encode", "torch.topk 1 %"} <= seconds.keys()
    assert min(seconds.values()) > 0


@EMULATED
def test_exchange(tmp_path: Path) -> None:
    results = run("exchange.py", tmp_path / "exchange")["results"]
    assert isinstance(results, dict)
    methods = results["1gbit"]
    assert list(methods) == ["none", "qsgd4", "topk"]
    # A million float32 values, 4 bits, and 1 %, with what TCP and MPI add.
    for method, fewest in (("none", 4e6), ("qsgd4", 0.5e6), ("topk", 0.05e6)):
        assert fewest < methods[method]["bytes"] < 1.5 * fewest


@EMULATED
def test_what_pytorch_offers_is_measured_beside(tmp_path: Path) -> None:
    options = ["--workload", "resnet50", "--methods", "none", "ddp", "ddp-fp16", "--repeats", "1", "--batch", "2"]
    methods = run("exchange.py", tmp_path / "peers", *options, "--pixels", "32", quick=False)["results"]["1gbit"]  # type: ignore[index]
    # The gradients of ResNet-50 in four bytes a value, and in two.
    assert list(methods) == ["none", "ddp", "ddp-fp16"]
    for method, fewest in (("none", 102e6), ("ddp", 102e6), ("ddp-fp16", 51e6)):
        assert fewest < methods[method]["bytes"] < 1.1 * fewest


@EMULATED
def test_what_is_estimated_and_what_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "estimate.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "estimate.py"), "--quick", "--output", str(output)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())
    assert [row["method"] for row in rows][::2] == ["Horovod, uncompressed", "QSGD, 8 bits", "TopK, 1 %"]
    assert all(min(row[key] for key in ("measured", "estimated", "nominal")) > 0 for row in rows)


@EMULATED
def test_scaling(tmp_path: Path) -> None:
    found = run("scaling.py", tmp_path / "scaling")
    rows = found["predictions"]
    assert isinstance(rows, list)
    assert [row["exchange"] for row in rows] == ["none", "allgather", "scatter_gather", "allreduce"]
    assert all(row["seconds"] > 0 and row["own"] > 0 and row["fitted"] > 0 for row in rows)


@pytest.mark.parametrize("benchmark", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_help(benchmark: str) -> None:
    text = (ROOT / "benchmarks" / benchmark).read_text()
    if "argparse" in text:
        command = [sys.executable, str(ROOT / "benchmarks" / benchmark), "--help"]
        shown = subprocess.run(command, env={**os.environ, **environment()}, capture_output=True, text=True, check=True)
        assert "usage:" in shown.stdout


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_monitor(framework: str, tmp_path: Path) -> None:
    options = ["--quick", "--framework", framework, "--output", str(tmp_path / "monitor.json")]
    outcome = launch([str(ROOT / "benchmarks" / "monitor.py"), *options], 2)
    assert outcome.status == 0, outcome.output
    found = json.loads((tmp_path / "monitor.json").read_text())
    assert len(found) == 2 and all(entry["without"] > 0 and "overhead" in entry for entry in found.values())
