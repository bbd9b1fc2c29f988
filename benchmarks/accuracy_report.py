"""The table and the plots of benchmarks/accuracy.py."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_tasks import Task
from scipy.stats import t as student

#: By member and seed; what ``accuracy.train`` returns.
Runs = dict[str, dict[int, dict[str, Any]]]
#: The members whose losses are drawn, if they were run: more would hide each other.
DRAWN = (
    "uncompressed",
    "QSGD 8 bits, bucket 512",
    "QSGD 4 bits, bucket 512",
    "QSGD 2 bits, bucket 128",
    "TopK 1 %, EF",
    "TopK 1 %, no feedback",
    "DGC 1 %",
    "sign, EF",
    "PowerSGD rank 4, EF",
)
COLOURS = {"loses": "tab:red", "gains": "tab:green", "one seed": "tab:gray", "too few seeds": "tab:gray"}
#: With fewer seeds an interval is so wide that a difference that is not seen says nothing.
ENOUGH = 4


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(student.ppf(0.975, len(values) - 1)) * error


def smoothed(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean loss of the last eighth of the run before each point: batches are too small to tell."""
    width = max(len(curve) // 8, 1)
    return [
        (sent, statistics.mean(loss for _, loss in curve[max(i + 1 - width, 0) : i + 1]))
        for i, (sent, _) in enumerate(curve)
    ]


def bytes_to_reach(curve: list[tuple[float, float]], loss: float) -> float:
    return next((sent for sent, now in curve if now <= loss), math.nan)


def summary(task: Task, runs: Runs) -> list[dict[str, Any]]:
    """One row a member, from its runs by seed; differences are positive where a member is better."""
    rows = []
    base = runs["uncompressed"]
    for member, by_seed in runs.items():
        seeds = [seed for seed in by_seed if seed in base]
        gain = interval([task.better * (by_seed[s]["quality"] - base[s]["quality"]) for s in seeds])
        # What uncompressed training of the same seed reaches after nine tenths of its steps.
        curves = {seed: smoothed(base[seed]["curve"]) for seed in seeds}
        targets = {seed: curve[len(curve) * 9 // 10][1] for seed, curve in curves.items()}
        needed = [bytes_to_reach(smoothed(by_seed[seed]["curve"]), targets[seed]) for seed in seeds]
        reached = [sent for sent in needed if not math.isnan(sent)]
        verdict = "no difference seen"
        if member == "uncompressed":
            verdict = ""
        elif len(seeds) < 2:
            verdict = "one seed"
        elif gain[0] + gain[1] < 0:
            verdict = "loses"
        elif gain[0] - gain[1] > 0:
            verdict = "gains"
        elif len(seeds) < ENOUGH:
            verdict = "too few seeds"
        rows.append(
            {
                "member": member,
                "seeds": len(seeds),
                "quality": interval([by_seed[seed]["quality"] for seed in seeds]),
                "gain": gain,
                "ratio": statistics.mean(base[seed]["bytes"] / by_seed[seed]["bytes"] for seed in seeds),
                "reached": len(reached),
                "megabytes_to_reach": statistics.mean(reached) / 1e6 if reached else math.nan,
                "verdict": verdict,
            }
        )
    return rows


def table(task: Task, rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    head = f"{task.name} | seeds | {task.metric} | better by | times fewer bytes | MB to the target loss | verdict"
    lines = [f"| {head} |", "|---" + "|--:" * 5 + "|---|"]
    for row in rows:
        gain = "" if row["member"] == "uncompressed" else with_interval(row["gain"], "+.2f")
        reached = f"{row['megabytes_to_reach']:.2f}" if row["reached"] else "not reached"
        if 0 < row["reached"] < row["seeds"]:
            reached += f" ({row['reached']} of {row['seeds']} seeds)"
        quality = with_interval(row["quality"], ".2f")
        cells = [row["member"], str(row["seeds"]), quality, gain, f"{row['ratio']:.1f}", reached, row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_interval(value: tuple[float, float], form: str) -> str:
    mean, half = value
    return f"{mean:{form}}" if math.isnan(half) else f"{mean:{form}} ± {half:.2f}"


def plot(task: Task, runs: Runs, rows: list[dict[str, Any]], path: Path) -> None:
    """Left the difference of each member to uncompressed training, right the losses of some by bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["member"] != "uncompressed"][::-1]
    size = (13, 2.5 + 0.19 * max(len(shown), 12))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, width_ratios=(1.1, 1))
    for height, row in enumerate(shown):
        gain, half = row["gain"]
        colour = COLOURS.get(row["verdict"], "tab:blue")
        left.errorbar(gain, height, xerr=0 if math.isnan(half) else half, fmt="o", color=colour, markersize=4)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(shown)), [f"{row['member']}  ({row['ratio']:.0f}x)" for row in shown], fontsize=8)
    # A member that fails altogether must not squeeze the others to a line.
    left.set_xscale("symlog", linthresh=1 if task.better > 0 else 0.3)
    left.set(xlabel=f"{task.metric}: better than uncompressed by", title=f"{task.name}: final quality, 95 % intervals")
    left.grid(axis="x", alpha=0.3)
    for member in (name for name in DRAWN if name in runs):
        curve = np.mean([run["curve"] for run in runs[member].values()], axis=0)
        right.plot(curve[:, 0] / 1e6, curve[:, 1], label=member, linewidth=1.2)
    right.set(xscale="log", xlabel="MB sent by a rank", ylabel="training loss", title="training loss by bytes sent")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
