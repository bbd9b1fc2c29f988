"""The examples run as a user would run them, with fewer epochs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from launch import kill_tree, launch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PARAMETERS = 212_426
WIDTH = 80

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed in this environment"
)


def run_python(*arguments: str | Path, directory: Path, timeout: float = 300) -> tuple[int, str]:
    """Status and output; nothing is left running."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "COLUMNS": str(WIDTH)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    finally:
        kill_tree(process.pid)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class DemoRun:
    output: str
    results: dict[str, Any]
    plot: Path


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    directory = tmp_path_factory.mktemp("demo")
    status, output = run_python(EXAMPLES / "demo.py", "--epochs", "2", "--json", "demo.json", directory=directory)
    assert status == 0, output
    return DemoRun(output, json.loads((directory / "demo.json").read_text()), directory / "demo.png")


@needs_horovod
@pytest.mark.slow
class TestDemo:
    def test_table(self, demo_run: DemoRun) -> None:
        lines = demo_run.output.splitlines()
        assert max(map(len, lines)) <= max(WIDTH, len(f"Plot: {demo_run.plot}"))
        assert "identical weights" in demo_run.output
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
        assert [row[0] for row in rows] == ["Horovod, uncompressed", "QSGD, 4 bits", "Top-k, 1 %, error feedback"]
        accuracies, sent, ratios, seconds = zip(*(row[1:] for row in rows))
        assert all(float(accuracy.removesuffix("%")) > 80 for accuracy in accuracies)
        assert int(sent[0].replace(",", "")) == 4 * PARAMETERS
        assert float(ratios[0]) == 1
        assert 6 < float(ratios[1]) < 8
        assert 20 < float(ratios[2]) < 100
        assert all(float(second) > 0 for second in seconds)

    def test_all_trainings_start_alike_and_learn(self, demo_run: DemoRun) -> None:
        results = demo_run.results.values()
        assert len({result["losses"][0] for result in results}) == 1
        assert len({len(result["losses"]) for result in results}) == 1
        assert all(result["losses"][-1] < 0.7 * result["losses"][0] for result in results)

    def test_ranks_end_with_identical_weights(self, demo_run: DemoRun) -> None:
        checksums = [result["checksums"] for result in demo_run.results.values()]
        assert all(len(ranks) == 2 and len(set(ranks)) == 1 for ranks in checksums)
        assert len({ranks[0] for ranks in checksums}) == 3

    def test_progress_reaches_the_last_epoch(self, demo_run: DemoRun) -> None:
        assert demo_run.output.count("epoch 1 of 2") == demo_run.output.count("epoch 2 of 2") == 3

    def test_plot_shows_all_curves_in_both_halves(self, demo_run: DemoRun, demo: ModuleType) -> None:
        assert f"Plot: {demo_run.plot}" in demo_run.output
        assert demo_run.plot.read_bytes().startswith(b"\x89PNG")
        image = matplotlib.image.imread(demo_run.plot)[..., :3]
        assert image.shape[0] > 400 and image.shape[1] > 1000
        for color in demo.COLORS.values():
            rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            matches = np.abs(image - rgb).max(axis=2) < 0.01
            assert all(half.sum() > 200 for half in np.array_split(matches, 2, axis=1))


@needs_horovod
@pytest.mark.slow
def test_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")  # faster where processors are few
    file = tmp_path / "history.json"
    script = str(EXAMPLES / "mnist_torch.py")
    outcome = launch([script, "--compression", "topk", "--ratio", "0.1", "--epochs", "1", "--json", str(file)], ranks=2)
    assert outcome.status == 0, outcome.output
    assert outcome.output.count("epoch  1: loss ") == 1
    history = json.loads(file.read_text())
    assert history["losses"][-1] < history["losses"][0]
    assert history["accuracy"] > 0.5
    assert len(history["checksums"]) == 2 and len(set(history["checksums"])) == 1
    # A tenth of the numbers, at 4 bytes each and up to 4 for its index.
    assert history["bytes"] == sorted(history["bytes"])
    assert 0.4 < history["bytes"][-1] / len(history["bytes"]) / PARAMETERS < 0.8


@needs_horovod
@pytest.mark.slow
@pytest.mark.parametrize("script", ["mnist_tensorflow.py", "mnist_keras.py"])
def test_training_with_tensorflow(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_mpi_yield_when_idle", "1")
    accuracies = {}
    for compression in ("none", "qsgd"):
        file = tmp_path / f"{compression}.json"
        command = [str(EXAMPLES / script), "--compression", compression, "--epochs", "3", "--json", str(file)]
        outcome = launch(command, ranks=2)
        assert outcome.status == 0, outcome.output
        assert outcome.output.count("epoch  3: loss ") == 1
        history = json.loads(file.read_text())
        assert history["losses"][-1] < history["losses"][0]
        assert len(history["checksums"]) == 2 and len(set(history["checksums"])) == 1
        assert history["parameters"] == PARAMETERS
        accuracies[compression] = history["accuracy"]
    # 3 epochs of 40 steps; 4 bits a number, and some for scales and what is not compressed.
    assert 0.5 < history["bytes"] / 120 / PARAMETERS < 0.6
    assert accuracies["none"] > 0.9
    assert accuracies["qsgd"] > accuracies["none"] - 0.02


@needs_horovod
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("demo.py", ["--ranks", "--epochs", "--launcher", "--output", "--json"]),
        ("mnist_keras.py", ["--compression", "--bits", "--ratio", "--epochs", "--seed", "--json"]),
        ("mnist_torch.py", ["--compression", "--bits", "--ratio", "--epochs", "--seed", "--json"]),
    ],
)
def test_help(script: str, options: list[str], tmp_path: Path) -> None:
    status, output = run_python(EXAMPLES / script, "--help", directory=tmp_path)
    assert status == 0
    assert all(option in output for option in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "one rank alone sends nothing"),
        (["--epochs", "0"], "--epochs must be 1 or more"),
        (["--output", "missing/demo.png"], "there is no directory"),
    ],
)
def test_demo_refuses_what_cannot_work(arguments: list[str], message: str, tmp_path: Path) -> None:
    status, output = run_python(EXAMPLES / "demo.py", *arguments, directory=tmp_path)
    assert status == 2
    assert message in output


@pytest.mark.parametrize("missing", ["horovod", "mlxtend"])
def test_demo_says_what_is_missing(missing: str, demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(demo.DemoError, match=f"{missing} not found in .*make demo.*install-horovod"):
        demo.check_requirements("gloo")


def test_demo_shows_why_a_launch_failed(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "horovodrun"
    launcher.write_text("#!/bin/sh\necho the reason\nexit 3\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(demo, "environment", lambda: {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    with pytest.raises(demo.DemoError, match="status 3:\nthe reason"):
        demo.launch(2, 1, "mpi", print)
