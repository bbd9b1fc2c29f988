"""Triton kernels without a GPU: their bytes in the interpreter, and what the compiler makes of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
TOOL = ROOT / "tools" / "compile_gpu_kernels.py"


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("target", ["interpreter", "sm_80", "sm_90"])
def test_bytes_are_those_of_the_specification(target: str, tmp_path: Path) -> None:
    """Of the source in Triton's interpreter, and of what the compiler makes for GPUs that are not here."""
    options = ["-q", "-p", "no:cacheprovider", "--color=no", "--confcutdir=tests/triton"]
    variables = {"KERNELS_RUN_ON": target, "TRITON_CACHE_DIR": str(tmp_path)}
    done = run("-m", "pytest", *options, "tests/triton", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_kernels_compile_for_every_target_and_keep_the_rules(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    done = run(str(TOOL), "--json", str(output), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(output.read_text())
    kernels = {"encode_buckets", "encode_scaled", "bucket_scales", "decode", "decode_buckets", "to_lanes", "from_lanes"}
    kernels |= {"count_digits", "count_chosen", "write_chosen"}
    for target in ("sm_80", "sm_90", "gfx942"):
        assert {report["kernel"] for report in reports if report["target"] == target} == kernels
    assert all(report["registers"] > 0 and report["bytes_ms"] > 0 for report in reports)
    encode = next(report for report in reports if report["target"] == "sm_90" and report["what"] == "4 bits encode")
    assert 10 < encode["instructions"] < 25
    assert 0 < encode["instructions_ms"] < encode["bytes_ms"]


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    """With fused multiply-adds allowed, the compiler uses them, and the tool says so."""
    script = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r})\n"
        "import dataclasses, compile_gpu_kernels as tool\n"
        "reports = tool.compile_for('sm_90', (tool.QSGD(4),), {'enable_fp_fusion': True})\n"
        "faults = {r.kernel: r.faults() for r in reports if r.fused}\n"
        "assert 'fused multiply-adds' in str(faults['decode_buckets']), faults\n"
        "good = tool.compile_for('sm_90', (tool.QSGD(4),))[0]\n"
        "assert not good.faults()\n"
        "changes = {'spilled_bytes': 8, 'widest_load': 4, 'flushing': 1, 'approximate': 1}\n"
        "changes |= {'sectors_used': 0.4, 'instructions_ms': 1.0}\n"
        "for change in changes.items():\n"
        "    assert len(dataclasses.replace(good, **dict([change])).faults()) == 1, change\n"
    )
    done = run("-c", script, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = run(str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["backend"] == "triton" and found["compared"] == 21
    calls = ["encode", "decode", "decode and add", "average of 4", "to lanes", "from lanes"]
    assert [row["what"] for row in found["kernels"]] == calls * 5 * 2
    assert {row["dtype"] for row in found["kernels"]} == {"float32", "float16", "bfloat16"}
    assert found["ranks"] == 2
    assert list(found["exchange"]) == ["none", "fp16", "qsgd8", "qsgd4", "qsgd4-scatter", "qsgd4-allreduce"]
    assert all(row["seconds"] > 0 for row in [*found["kernels"], *found["exchange"].values()])


def test_without_triton_torch_operations_serve_the_gpu() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from hvd_qsgd import kernels\n"
        "from hvd_qsgd.kernels.triton.probe import fault_on\n"
        "assert kernels.torch_backend(torch.device('cuda', 0)) == 'torch'\n"
        "assert fault_on(torch.device('cuda', 0)) == 'Triton is not installed'\n"
        "assert kernels.torch_backend(torch.device('cpu')) == 'torch'\n"
    )
    done = run("-W", "error", "-c", script)
    assert done.returncode == 0, done.stderr
