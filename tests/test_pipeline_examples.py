"""The example and the benchmarks of pipelines, as a user would run them, with less to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from emulated_cluster import EmulatedCluster  # noqa: E402
from pipeline_tasks import bible_text, cifar10_task, wikitext_task  # noqa: E402

UNAVAILABLE = EmulatedCluster.unavailable()


def epochs(output: str) -> list[tuple[float, float]]:
    """Loss and accuracy of each epoch."""
    return [(float(a), float(b)) for a, b in re.findall(r"loss ([\d.]+), accuracy ([\d.]+)%", output)]


def run(script: str, *options: str, directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *options]
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_example_prints_the_same_over_ranks_and_simulated(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--bits", "4"]
    outcome = launch(["examples/pipeline.py", *options], 4, "mpirun")
    assert outcome.status == 0, outcome.output
    simulated = epochs(run("examples/pipeline.py", *options, "--simulate", directory=tmp_path))
    assert epochs(outcome.output) == simulated and len(simulated) == 1
    assert simulated[0][1] > 50


@pytest.mark.slow
def test_the_example_trains_replicas() -> None:
    outcome = launch(["examples/pipeline.py", "--stages", "2", "--epochs", "1"], 4, "mpi")
    assert outcome.status == 0, outcome.output
    assert epochs(outcome.output)[0][1] > 50


@pytest.mark.slow
def test_the_accuracy_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    script = "benchmarks/pipeline_accuracy.py"
    options = ["--quick", "--output", "out"]
    first = run(script, *options, "--tasks", "transformer", "--only", "qsgd 4 bits aq-sgd", directory=tmp_path)
    assert first.count("seed 0") == 1
    second = run(script, *options, "--tasks", "transformer", "--only", "qsgd 4", directory=tmp_path)
    assert second.count("seed 0") == 2
    runs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(runs) == 3 and all(0 < run["on"] < 5 for run in runs)
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no emulated cluster: {UNAVAILABLE}")
def test_the_bytes_between_hosts_are_as_few_as_promised(tmp_path: Path) -> None:
    """By the counters of the interfaces of four hosts, headers of TCP and all."""
    run("benchmarks/pipeline.py", "--quick", "--rates", "1gbit", "--output", "out", directory=tmp_path)
    methods = json.loads((tmp_path / "out.json").read_text())["results"]["1gbit"]
    # Three boundaries, two directions, 256 samples of 1024 float32.
    assert 1 <= methods["none"]["bytes"] / (6 * 256 * 1024 * 4) < 1.05
    assert methods["none"]["bytes"] / methods["qsgd 8/8"]["bytes"] >= 3.9
    assert methods["none"]["bytes"] / methods["qsgd 4/4"]["bytes"] >= 7.5


def test_cifar_10_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 4, 3073), np.uint8)
    records[:, :, 0] %= 10
    for number, name in enumerate(["test_batch", *(f"data_batch_{number}" for number in range(1, 6))]):
        records[number].tofile(tmp_path / f"{name}.bin")
    task = cifar10_task(tmp_path, width=2)
    assert task.inputs.shape == (20, 3, 32, 32) and task.test_inputs.shape == (4, 3, 32, 32)
    assert task.targets.tolist() == records[1:, :, 0].flatten().tolist()
    red = records[1, 0, 1] / 255
    assert float(task.inputs[0, 0, 0, 0]) == pytest.approx((red - 0.4914) / 0.2470, abs=1e-5)
    outputs = torch.nn.Sequential(*task.stages)(task.inputs)
    assert outputs.shape == (20, 10) and task.loss(outputs, task.targets).isfinite()


def test_cifar_10_in_another_format_is_refused(tmp_path: Path) -> None:
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (tmp_path / f"{name}.bin").write_bytes(b"pickle")
    with pytest.raises(SystemExit, match="not those of the binary version"):
        cifar10_task(tmp_path)


def test_wikitext_is_read(tmp_path: Path) -> None:
    text = " = Robert Boulter = \n Robert is an English film \u2013 television actor . \n"
    (tmp_path / "wiki.train.tokens").write_text(text * 20, encoding="utf-8")
    (tmp_path / "wiki.test.tokens").write_text(text * 8, encoding="utf-8")
    task = wikitext_task(tmp_path)
    assert task.inputs.shape[1] == task.test_inputs.shape[1] == 256 and len(task.inputs) >= 4
    assert torch.equal(task.inputs[:, 1:], task.targets[:, :-1])
    assert int(task.inputs.max()) == 127
    assert "".join(map(chr, task.inputs[0][:19].tolist())) == " = Robert Boulter ="


def test_the_bible_is_read() -> None:
    text = bible_text()
    assert len(text) > 4_000_000 and len(set(text)) < 100
    assert text.startswith("1:1 In the beginning God created")
