#!/usr/bin/env python
"""Final quality with every member of the family, against training without compression.

Two tasks: a convolutional network on 5,000 images of MNIST (accuracy on 1,000 of them), and a transformer that
predicts the characters of the King James Bible (perplexity of a held-out part). The ranks are simulated inside one
process: the same codecs, exchanges and feedback, in the same order, as among real ones, without their waiting.
Every run is repeated for several seeds, which set the weights, the batches and the rounding; differences to
uncompressed training are taken seed by seed.

    python benchmarks/accuracy.py --quick                      # some minutes
    python benchmarks/accuracy.py --task kjv --seeds 5         # the characters alone

Each finished run is one line of a file, and runs that are in it are not repeated: what was stopped goes on with
the same command. At the end, or at once with --report, come a table and plots of all that is in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accuracy_members import FEW, MEMBERS, Ranks
from accuracy_report import Runs, plot, summary, table
from accuracy_tasks import Task, kjv, mnist
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hvd_qsgd.feedback import MomentumCorrection

#: Points of a run's curve.
POINTS = 40


def train(task: Task, member: str, seed: int, ranks: int) -> dict[str, Any]:
    """One run; the curve holds bytes sent by a rank and training loss, over the run."""
    codec, feedback = MEMBERS[member]
    moved = isinstance(feedback, MomentumCorrection)
    if isinstance(feedback, MomentumCorrection):
        # The momentum is in what the ranks send.
        feedback = dataclasses.replace(feedback, momentum=task.momentum)
    torch.manual_seed(seed)
    model = task.model()
    names, parameters = zip(*model.named_parameters())
    cluster = Ranks(ranks, codec, feedback, seed)
    optimizer = task.optimizer(list(parameters), not moved)
    peak = optimizer.param_groups[0]["lr"]
    curve = []
    for step, (inputs, targets) in enumerate(task.batches(seed, ranks)):
        if step % task.epoch == 0:
            cluster.start_epoch(step // task.epoch)
        optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / (task.warm_up + 1))
        gradients, losses = [], []
        for rank in range(ranks):
            loss = cross_entropy(model(inputs[rank::ranks]).flatten(0, -2), targets[rank::ranks].flatten())
            gradients.append(dict(zip(names, torch.autograd.grad(loss, parameters))))
            losses.append(float(loss.detach()))
        means = cluster.average(gradients)
        for name, parameter in zip(names, parameters):
            parameter.grad = means[name]
        optimizer.step()
        curve.append((cluster.bytes, statistics.mean(losses)))
    stride = max(len(curve) // POINTS, 1)
    parts = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    smooth = [(round(part[-1][0]), float(f"{statistics.mean(loss for _, loss in part):.4g}")) for part in parts]
    return {"quality": task.quality(model), "bytes": round(cluster.bytes), "curve": smooth}


class Results:
    """Finished runs in a file, one line each, by what was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        # A line that was cut off when a run was stopped is no result.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self._found = {self._key(run["of"]): run for run in map(json.loads, whole.splitlines())}

    @staticmethod
    def _key(of: dict[str, Any]) -> str:
        return json.dumps(of, sort_keys=True)

    def get(self, of: dict[str, Any]) -> dict[str, Any] | None:
        return self._found.get(self._key(of))

    def add(self, of: dict[str, Any], result: dict[str, Any]) -> None:
        run = {"of": of, **result}
        self._found[self._key(of)] = run
        with self.path.open("a") as file:
            file.write(json.dumps(run, separators=(",", ":")) + "\n")


def described(settings: dict[str, Any], member: str, seed: int) -> dict[str, Any]:
    """What decides the outcome of a run: under an old name, a member with new settings is run again."""
    codec, feedback = MEMBERS[member]
    configs = {"codec": codec and codec.config(), "feedback": feedback and feedback.config()}
    return {**settings, "member": member, **configs, "seed": seed}


def found(results: Results, settings: dict[str, Any], members: Iterable[str], seeds: int) -> Runs:
    """The finished runs by member and seed; members that have one with a seed that uncompressed training has."""
    runs: Runs = {}
    for member in members:
        by_seed = {seed: results.get(described(settings, member, seed)) for seed in range(seeds)}
        runs[member] = {seed: run for seed, run in by_seed.items() if run is not None}
    base = runs["uncompressed"]
    return {member: by_seed for member, by_seed in runs.items() if by_seed.keys() & base.keys()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("mnist", "kjv", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="of MNIST")
    parser.add_argument("--steps", type=int, default=200, help="of the character model")
    # argparse takes a % for the start of a format.
    names = "; ".join(MEMBERS).replace("%", "%%")
    parser.add_argument("--members", nargs="+", metavar="NAME", help=f"from: {names}")
    parser.add_argument("--quick", action="store_true", help="few members, two seeds, short training")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--results", type=Path, default=Path("accuracy.jsonl"), help="the file of finished runs")
    parser.add_argument("--plots", type=Path, default=Path("accuracy"), help="without -TASK.png")
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
        tasks.append((mnist(arguments.epochs), {"task": "mnist", "epochs": arguments.epochs, "ranks": arguments.ranks}))
    if arguments.task in ("kjv", "both"):
        tasks.append((kjv(arguments.steps), {"task": "kjv", "steps": arguments.steps, "ranks": arguments.ranks}))

    results = Results(arguments.results)
    # Seed by seed, so that all members have as many whenever it is stopped.
    wanted = [(seed, *task, member) for seed in range(arguments.seeds) for task in tasks for member in members]
    for seed, task, settings, member in tqdm([] if arguments.report else wanted, disable=None):
        of = described(settings, member, seed)
        if results.get(of) is None:
            results.add(of, train(task, member, seed, arguments.ranks))
    for task, settings in tasks:
        runs = found(results, settings, members, arguments.seeds)
        if runs:
            rows = summary(task, runs)
            print(table(task, rows), end="\n\n")
            plot(task, runs, rows, arguments.plots.with_name(f"{arguments.plots.name}-{task.name}.png"))


if __name__ == "__main__":
    main()
