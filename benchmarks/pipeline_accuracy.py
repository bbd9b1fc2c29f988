"""What compression between stages does to training: a ResNet-18 and a transformer in four stages.

    python benchmarks/pipeline_accuracy.py                  # both, 5 seeds: an hour or two; goes on where it was
    python benchmarks/pipeline_accuracy.py --minutes 20     # as much as fits, seed by seed
    python benchmarks/pipeline_accuracy.py --quick          # one epoch of some settings, under a minute
    python benchmarks/pipeline_accuracy.py --tasks cifar10 --data cifar-10-batches-py --epochs 100
    python benchmarks/pipeline_accuracy.py --tasks gpt2 --data wikitext-2 --model gpt2 --epochs 4

All stages run in one process with the numbers of a real pipeline (``SimulatedPipeline``). Every trained
model is tested twice: with compression at inference and without. Each run is a line of a file, so that an
interrupted benchmark goes on where it was. Writes that file, tables and a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from pipeline_tasks import TASKS, Task, make_task

from hvd_qsgd import QSGD, Codec, MinMax, TopK
from hvd_qsgd.pipeline import Direction, SimulatedPipeline
from hvd_qsgd.pipeline.direction import FEEDBACKS

UNITS = {"transformer": "loss, nats a character", "wikitext": "loss, nats a character", "gpt2": "loss, nats a token"}
ACCURACY = "accuracy, %"
#: Shares of values that TopK sends.
PERCENT = (50, 30, 20, 10, 5, 2)
WARMUP_EPOCHS = 2
Pair = tuple[Direction, Direction]


def both(forward: Codec, backward: Codec, feedback: str = "none", **options: Any) -> Pair:
    """The same feedback in both directions; AQ-SGD knows none for gradients."""
    back = "none" if feedback == "aq-sgd" else feedback
    return Direction(forward, feedback, **options), Direction(backward, back, **options)


def topk(percent: float, feedback: str = "none", warmup_epochs: int = 0) -> Pair:
    codec = TopK(percent / 100)
    return both(codec, codec, feedback, per_sample=True, warmup_epochs=warmup_epochs)


def shared(percent: float) -> Pair:
    return Direction(TopK(percent / 100), per_sample=True), Direction(shared_mask=True)


def settings(task: str) -> dict[str, Pair]:
    """By name: activations / gradients."""
    nothing = Direction()
    found = {"none": (nothing, nothing)}
    equal, fewer = [(8, 8), (4, 4), (2, 2)], range(7, 1, -1)
    for forward, backward in [*equal, *((bits, 8) for bits in fewer), *((8, bits) for bits in fewer)]:
        found[f"minmax {forward}/{backward} bits"] = both(MinMax(forward), MinMax(backward))
    for forward, backward in [(4, 4), (8, 4), (8, 2)]:
        found[f"minmax {forward} / qsgd {backward} bits"] = both(MinMax(forward), QSGD(backward))
    for percent in PERCENT:
        found[f"topk {percent} %"] = topk(percent)
    for percent in (10, 2):
        found[f"topk {percent} % / none"] = (topk(percent)[0], nothing)
        found[f"none / topk {percent} %"] = (nothing, topk(percent)[1])
    for percent in (20, 10, 5) if task in UNITS else (10,):
        found[f"topk {percent} % shared mask"] = shared(percent)
    found["qsgd 4 bits aq-sgd / qsgd 8"] = both(QSGD(4), QSGD(8), "aq-sgd")
    found["topk 10 % after warm-up"] = topk(10, warmup_epochs=WARMUP_EPOCHS)
    for feedback in FEEDBACKS[1:]:
        for percent in PERCENT:
            found[f"topk {percent} % {feedback}"] = topk(percent, feedback)
        found[f"topk 10 % after warm-up {feedback}"] = topk(10, feedback, WARMUP_EPOCHS)
        for forward, backward in [(4, 8), (2, 8), (4, 4), (2, 2)] if feedback != "ef-mixed" else ():
            found[f"minmax {forward}/{backward} bits {feedback}"] = both(MinMax(forward), MinMax(backward), feedback)
    return found


def run(task: Task, pair: Pair, seed: int, epochs: int) -> dict[str, Any]:
    """Train once; the measure with and without compression at inference."""
    pipeline = SimulatedPipeline(task.stages, forward=pair[0], backward=pair[1], micro_batches=1)
    optimizer = task.optimizer(list(pipeline.parameters()))
    steps = epochs * -(-len(task.inputs) // task.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    loss = 0.0
    for epoch in range(epochs):
        pipeline.set_epoch(epoch)
        order = torch.randperm(len(task.inputs), generator=generator)
        for rows in order.split(task.batch_size):
            optimizer.zero_grad()
            batch = task.inputs[rows], task.targets[rows]
            loss = pipeline.train_step(task.loss, *batch, samples=rows.numpy())
            optimizer.step()
            schedule.step()
    stats = pipeline.stats()
    result = {"loss": loss, "seconds": time.perf_counter() - started, "times_fewer_bytes": stats.ratio}
    for name, at_inference in (("on", True), ("off", False)):
        for boundary in pipeline.boundaries:
            for sender in boundary.senders:
                sender.direction = replace(sender.direction, at_inference=at_inference)
        result[name] = task.test(pipeline)
    return result


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(runs: list[dict[str, Any]]) -> str:
    """Two tables a task, in Markdown: means and deviations over seeds, without feedback and with it."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in runs):
        groups = grouped(runs, task)
        fed = {f"{base} {feedback}": base for base in groups for feedback in FEEDBACKS[1:]}
        bases = [base for base in groups if any(name in groups for name in fed if fed[name] == base)]
        lines += [f"{task}: {UNITS.get(task, ACCURACY)}", ""]
        lines += ["| activations / gradients | on | off | times fewer bytes | seeds |", "|---|---|---|---|---|"]
        for name, group in groups.items():
            if name not in fed:
                cells = [summary(group, key) for key in ("on", "off")]
                cells += [f"{mean(group, 'times_fewer_bytes'):.1f}", str(len(group))]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        if bases:
            lines += ["", f"| on, off | {' | '.join(FEEDBACKS)} |", "|---|" + "---|" * len(FEEDBACKS)]
        for base in bases:
            names = [base, *(f"{base} {feedback}" for feedback in FEEDBACKS[1:])]
            cells = [", ".join(summary(groups[n], key) for key in ("on", "off")) if n in groups else "" for n in names]
            lines.append(f"| {base} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) + "on, off: whether it is compressed at inference, too\n"


def grouped(runs: list[dict[str, Any]], task: str) -> dict[str, list[dict[str, Any]]]:
    names = [name for name in settings(task) if any(run["name"] == name and run["task"] == task for run in runs)]
    return {name: [run for run in runs if run["name"] == name and run["task"] == task] for name in names}


def mean(group: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in group)


def deviation(group: list[dict[str, Any]], key: str) -> float:
    return statistics.stdev(run[key] for run in group) if len(group) > 1 else 0.0


def summary(group: list[dict[str, Any]], key: str) -> str:
    """Mean and standard deviation, of which one run tells nothing."""
    spread = f" ± {deviation(group, key):.2f}" if len(group) > 1 else ""
    return f"{mean(group, key):.2f}{spread}"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(run["task"] for run in runs))
    height = 1.5 + 0.22 * max(len(grouped(runs, task)) for task in tasks)
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(7 * len(tasks), height), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        groups = grouped(runs, task)
        for key, colour, shift in (("on", "tab:blue", 0.0), ("off", "tab:orange", 0.25)):
            places = np.arange(len(groups)) + shift
            means = [mean(group, key) for group in groups.values()]
            errors = [deviation(group, key) for group in groups.values()]
            label = "compressed at inference" if key == "on" else "not compressed at inference"
            axis.errorbar(means, places, xerr=errors, fmt="o", color=colour, label=label)
        axis.set_yticks(range(len(groups)), list(groups))
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.4)
        axis.set(title=task, xlabel=UNITS.get(task, ACCURACY))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["resnet", "transformer"])
    parser.add_argument("--data", type=Path, metavar="DIR", help="where CIFAR-10 or WikiText is")
    parser.add_argument("--model", type=Path, metavar="DIR", help="where GPT-2 is: configuration, tokenizer, weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="settings whose names contain one of these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--quick", action="store_true", help="few samples, one epoch, one seed, six settings")
    parser.add_argument("--output", type=Path, default=Path("pipeline_accuracy"), help="of .jsonl, .md and .png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.seeds, arguments.epochs = 1, 1
        arguments.only = arguments.only or ["none", "minmax 8/8", "topk 10 %"]
    path = arguments.output.with_suffix(".jsonl")
    runs = load(path)
    done = {(run["task"], run["name"], run["seed"]) for run in runs}
    started = time.monotonic()
    for seed in range(arguments.seeds):
        for kind in arguments.tasks:
            for name, pair in settings(kind).items():
                wanted = not arguments.only or any(word in name for word in arguments.only)
                late = time.monotonic() - started > 60 * arguments.minutes
                if not wanted or late or (kind, name, seed) in done:
                    continue
                torch.manual_seed(seed)
                task = make_task(kind, arguments.data, arguments.model, arguments.quick)
                result = run(task, pair, seed, arguments.epochs)
                runs.append({"task": kind, "name": name, "seed": seed, **result})
                with path.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                print(
                    f"seed {seed} {kind}, {name}: {result['on']:.2f} {result['off']:.2f} {result['seconds']:.0f} s",
                    flush=True,
                )
    table = tables(runs)
    print(table)
    arguments.output.with_suffix(".md").write_text(table)
    plot(runs, arguments.output.with_suffix(".png"))
    print(f"wrote {arguments.output}: .jsonl, .md and .png")


if __name__ == "__main__":
    main()
