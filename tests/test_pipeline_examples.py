"""The example and the benchmarks of pipelines, as a user would run them, with less to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from emulated_cluster import EmulatedCluster  # noqa: E402
from pipeline_tasks import bible_text, cifar10_task, joined, make_task, wikitext_task  # noqa: E402

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


class Python2Pickler(pickle._Pickler):
    """Writes byte strings and arrays as Python 2 did, whose pickles CIFAR-10 is."""

    dispatch = {  # noqa: RUF012
        **pickle._Pickler.dispatch,
        bytes: lambda self, data: self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data),
    }


def write_cifar10(directory: Path, records: np.ndarray, ending: str) -> None:
    for number, name in enumerate(["test_batch", *(f"data_batch_{number}" for number in range(1, 6))]):
        with (directory / f"{name}{ending}").open("wb") as file:
            if ending:
                file.write(records[number].tobytes())
            else:
                # Python 2 knows one name of the module only.
                content = {b"labels": records[number, :, 0].tolist(), b"data": records[number, :, 1:].copy()}
                written = io.BytesIO()
                Python2Pickler(written, protocol=2).dump(content)
                file.write(written.getvalue().replace(b"numpy._core.", b"numpy.core."))


@pytest.mark.parametrize("ending", ["", ".bin"])
def test_cifar_10_is_read(tmp_path: Path, ending: str) -> None:
    records = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), np.uint8)
    records[:, :, 0] %= 10
    write_cifar10(tmp_path, records, ending)
    task = cifar10_task(tmp_path, width=2)
    assert task.inputs.shape == (20, 3, 32, 32) and task.test_inputs.shape == (4, 3, 32, 32)
    assert task.targets.tolist() == records[1:, :, 0].flatten().tolist()
    assert task.test_targets.tolist() == records[0, :, 0].tolist()
    red = records[1, 0, 1] / 255
    assert float(task.inputs[0, 0, 0, 0]) == pytest.approx((red - 0.4914) / 0.2470, abs=1e-5)
    outputs = torch.nn.Sequential(*task.stages)(task.inputs)
    assert outputs.shape == (20, 10) and task.loss(outputs, task.targets).isfinite()


@pytest.mark.parametrize(
    ("content", "ending", "message"),
    [
        (b"pickle", ".bin", "neither of the Python nor of the binary version"),
        (b"pickle", "", "neither of the Python nor of the binary version"),
        (pickle.dumps({b"data": 1}), "", "neither of the Python nor of the binary version"),
        (pickle.dumps(os.getcwd), "", "it asks for posix.getcwd"),
    ],
)
def test_cifar_10_in_another_format_is_refused(tmp_path: Path, content: bytes, ending: str, message: str) -> None:
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (tmp_path / f"{name}{ending}").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        cifar10_task(tmp_path)


TEXT = " = Robert Boulter = \n Robert is an English film \u2013 television actor . \n"


def write_wikitext(directory: Path) -> None:
    (directory / "wiki.train.tokens").write_text(TEXT * 20, encoding="utf-8")
    (directory / "wiki.test.tokens").write_text(TEXT * 8, encoding="utf-8")


def test_wikitext_is_read(tmp_path: Path) -> None:
    write_wikitext(tmp_path)
    task = wikitext_task(tmp_path)
    assert task.inputs.shape[1] == task.test_inputs.shape[1] == 256 and len(task.inputs) >= 4
    assert torch.equal(task.inputs[:, 1:], task.targets[:, :-1])
    assert int(task.inputs.max()) == 127
    assert "".join(map(chr, task.inputs[0][:19].tolist())) == " = Robert Boulter ="


@pytest.fixture(scope="module")
def gpt2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with random weights and a tokenizer, in the files that the real one has."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 9, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(directory))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_positions=16, n_embd=8, n_layer=6, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_gpt2_is_read_and_in_four_stages_it_is_the_model_of_transformers(gpt2_directory: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    write_wikitext(tmp_path)
    task = wikitext_task(tmp_path, gpt2_directory, length=16)
    pieces = task.inputs[:3]
    model = GPT2LMHeadModel.from_pretrained(gpt2_directory, attn_implementation="sdpa").eval()
    staged = torch.nn.Sequential(*task.stages).eval()
    with torch.no_grad():
        assert torch.equal(staged(pieces), model(pieces).logits)
        staged[3][2].weight[0, 0] += 1
        assert not torch.equal(staged(pieces), model(pieces).logits)
    assert torch.equal(task.inputs[:, 1:], task.targets[:, :-1]) and len(task.inputs) > 20
    parameters = [parameter for stage in task.stages for parameter in stage.parameters()]
    assert len({id(parameter) for parameter in parameters}) == len(parameters), "two ranks would train one parameter"


def test_gpt2_without_weights_begins_at_random(gpt2_directory: Path, tmp_path: Path) -> None:
    for file in gpt2_directory.iterdir():
        if file.suffix in (".json", ".txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    write_wikitext(tmp_path)
    weights = [wikitext_task(tmp_path, path, 16).stages[0][0].symbols.weight for path in (gpt2_directory, tmp_path)]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)


@pytest.mark.slow
def test_gpt2_is_trained_over_ranks(gpt2_directory: Path, tmp_path: Path) -> None:
    write_wikitext(tmp_path)
    (tmp_path / "wiki.train.tokens").write_text(TEXT * 150, encoding="utf-8")
    (tmp_path / "wiki.test.tokens").write_text(TEXT * 100, encoding="utf-8")
    config = json.loads((gpt2_directory / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (model / name).write_bytes((gpt2_directory / name).read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "n_positions": 1024, "n_layer": 2}))
    options = ["--task", "gpt2", "--data", str(tmp_path), "--model", str(model), "--epochs", "1"]
    outcome = launch(["examples/pipeline.py", "--stages", "2", *options], 2, "mpirun")
    assert outcome.status == 0, outcome.output
    assert re.search(r"epoch  1: loss \d\.\d+, loss \d\.\d+ in testing", outcome.output), outcome.output


def test_data_that_were_not_named_or_are_not_there_are_said(tmp_path: Path) -> None:
    for arguments, message in (
        (("cifar10",), "name the directory with --data"),
        (("gpt2", tmp_path), "and --model for gpt2"),
        (("cifar10", tmp_path), "data_batch_1"),
        (("wikitext", tmp_path), "wiki.train.tokens"),
    ):
        with pytest.raises(SystemExit, match=message):
            make_task(*arguments)


def test_stages_are_joined() -> None:
    layers: list[Any] = [torch.nn.Identity() for _ in range(4)]
    assert [[layers.index(layer) for layer in stage] for stage in joined(layers, 2)] == [[0, 1], [2, 3]]
    assert len(joined(layers, 1)[0]) == 4


def test_the_bible_is_read() -> None:
    text = bible_text()
    assert len(text) > 4_000_000 and len(set(text)) < 100
    assert text.startswith("1:1 In the beginning God created")
