"""The two tasks of benchmarks/accuracy.py: images of MNIST, and characters of the King James Bible."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from mnist import Net, accuracy, load_mnist
from pipeline_tasks import Block, Embedding, bible_text

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Task:
    """What is learned: each call of ``batches`` yields inputs and targets of one step of all ranks."""

    name: str
    metric: str
    #: 1 where more is better, -1 where less is.
    better: int
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Batches]
    quality: Callable[[nn.Module], float]
    #: Of parameters, with momentum or without.
    optimizer: Callable[[list[nn.Parameter], bool], torch.optim.Optimizer]
    momentum: float
    #: Steps over which the learning rate rises to its value.
    warm_up: int = 0
    #: Steps after which policies decide anew: a tenth of the training.
    epoch: int = 1


def mnist(epochs: int, batch: int = 100) -> Task:
    train_set, test_set = load_mnist()
    images, digits = train_set.tensors

    def batches(seed: int, ranks: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(batch):
                yield images[rows], digits[rows]

    def optimizer(parameters: list[nn.Parameter], momentum: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.08, momentum=0.5 if momentum else 0.0)

    def quality(model: nn.Module) -> float:
        return 100 * accuracy(model, test_set)

    tenth = max(epochs * -(-len(images) // batch) // 10, 1)
    return Task("mnist", "accuracy, %", 1, Net, batches, quality, optimizer, momentum=0.5, epoch=tenth)


def kjv(steps: int, batch: int = 8, length: int = 32, width: int = 64) -> Task:
    """``batch`` windows of ``length`` characters a rank and step; a decoder with two blocks, trained by Adam."""
    text = bible_text()
    symbols = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[symbol] for symbol in text])
    cut = len(data) * 9 // 10
    held_out = data[cut : cut + 256 * (length + 1)].view(256, length + 1)

    def batches(seed: int, ranks: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(0, cut - length - 1, (batch * ranks,), generator=generator)
            windows = data[starts[:, None] + torch.arange(length + 1)]
            yield windows[:, :-1], windows[:, 1:]

    def model() -> nn.Module:
        embedding = Embedding(len(symbols), length, width)
        for table in (embedding.symbols.weight, embedding.places):
            # Symbols that drown out places keep the model from looking back for hundreds of steps.
            nn.init.normal_(table, std=0.1)
        blocks = [Block(width, 4), Block(width, 4)]
        return nn.Sequential(embedding, *blocks, nn.LayerNorm(width), nn.Linear(width, len(symbols)))

    def optimizer(parameters: list[nn.Parameter], momentum: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, 0.01, betas=(0.9 if momentum else 0.0, 0.99))

    def perplexity(model: nn.Module) -> float:
        with torch.no_grad():
            loss = cross_entropy(model(held_out[:, :-1]).flatten(0, -2), held_out[:, 1:].flatten())
        return math.exp(float(loss))

    tenth = steps // 10
    settings = {"momentum": 0.9, "warm_up": tenth, "epoch": max(tenth, 1)}
    return Task("kjv", "perplexity", -1, model, batches, perplexity, optimizer, **settings)
