"""The plots of a report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvd_qsgd.errors import ConfigError

Record = dict[str, Any]
#: Of colour-blind people's distinguishable colours (Okabe and Ito), the ones that show on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
GREY = "#777777"
#: The tensors with the most bytes get colours, further ones are grey, and no more than these are drawn.
MOST_TENSORS = 200


@dataclass(frozen=True)
class Plot:
    """A title, what it shows in one sentence, and the picture."""

    title: str
    text: str
    svg: str


def draw(runs: Sequence[tuple[str, list[Record]]]) -> list[Plot]:
    """The plots of one or more runs, each with a label; those without data are left out.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plots = [_bytes(runs), _ratio(runs), _seconds(runs), _errors(runs), _residuals(runs)]
    return [plot for plot in plots if plot is not None]


def _bytes(runs: Sequence[tuple[str, list[Record]]]) -> Plot:
    figure, axes = _axes("megabytes a step, sent by a rank")
    for color, (label, records) in zip(_colors(), runs):
        steps = [r["step"] for r in records]
        axes.plot(steps, [r["wire_bytes"] / r["steps"] / 1e6 for r in records], ".-", color=color, label=label)
        plain = [r["uncompressed_wire_bytes"] / r["steps"] / 1e6 for r in records]
        axes.plot(steps, plain, "--", color=color, alpha=0.6, label=f"{label}, uncompressed")
    _log_scale(axes)
    return Plot("Bytes", "What was sent in a step, and what plain Horovod would have sent (dashed).", _svg(figure))


def _ratio(runs: Sequence[tuple[str, list[Record]]]) -> Plot:
    figure, axes = _axes("times fewer bytes")
    for color, (label, records) in zip(_colors(), runs):
        axes.plot([r["step"] for r in records], [r["ratio"] for r in records], ".-", color=color, label=label)
    axes.set_ylim(0, 1.15 * max(r["ratio"] for _, records in runs for r in records) or None)
    return Plot("Ratio", "How many times fewer bytes were sent than by plain Horovod.", _svg(figure))


def _seconds(runs: Sequence[tuple[str, list[Record]]]) -> Plot:
    figure, axes = _axes("milliseconds a step")
    styles = {"encode": ":", "wait": "-", "decode": "--"}
    for color, (label, records) in zip(_colors(), runs):
        for phase, style in styles.items():
            values = [r[f"{phase}_seconds"] / r["steps"] * 1e3 for r in records]
            axes.plot([r["step"] for r in records], values, f".{style}", color=color, label=f"{label}, {phase}")
    usual = [r[f"{phase}_seconds"] / r["steps"] for _, records in runs for r in records[1:] for phase in styles]
    # Kernels are compiled in the first record, which would press all others to the ground.
    axes.set_ylim(0, 1.15e3 * max(usual) if usual and max(usual) > 0 else None)
    text = (
        "What the training thread spent on exchanges in a step; encoding runs within the backward pass. "
        "The first record, in which kernels may be compiled, can lie above."
    )
    return Plot("Time", text, _svg(figure))


def _errors(runs: Sequence[tuple[str, list[Record]]]) -> Plot | None:
    text = (
        "Norm of what a payload lost, divided by the norm of what was encoded; thin: single tensors of the first run."
    )
    return _norms(runs, "relative_error", "Relative error", text)


def _residuals(runs: Sequence[tuple[str, list[Record]]]) -> Plot | None:
    text = "Euclidean norm of what error feedback carries to the next step; thin: single tensors of the first run."
    return _norms(runs, "residual_norm", "Residual norm", text)


def _norms(runs: Sequence[tuple[str, list[Record]]], attribute: str, title: str, text: str) -> Plot | None:
    measured = [(label, [r for r in records if r[attribute] is not None]) for label, records in runs]
    if not any(records for _, records in measured):
        return None
    figure, axes = _axes(title.lower())
    _, first = measured[0]
    for name in list(first[-1]["tensors"] if first else ())[:MOST_TENSORS]:
        points = [(r["step"], r["tensors"].get(name, {}).get(attribute)) for r in first]
        points = [(step, value) for step, value in points if value is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], color=GREY, alpha=0.35, linewidth=0.7)
    for color, (label, records) in zip(_colors(), measured):
        if records:
            values = [r[attribute] for r in records]
            axes.plot(
                [r["step"] for r in records], values, ".-", color=color, label=f"{label}, all tensors", linewidth=2
            )
    axes.set_ylim(bottom=0)
    return Plot(title, text, _svg(figure))


def _log_scale(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colors() -> list[str]:
    return list(COLORS) * 100


def _axes(what: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("A report needs the package matplotlib for its plots: pip install matplotlib") from None
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=what)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    (axes,) = figure.axes
    # Above the lines, not among them.
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
    # Lines without a label of ours have one that begins so; ours may begin with "_", too.
    lines = [line for line in axes.lines if not line.get_label().startswith("_child")]
    legend = axes.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize="small", **place)
    for text in legend.get_texts():
        # Dollars in the name of a file are no formula.
        text.set_parse_math(False)
    stream = io.StringIO()
    # Text stays text, and the same records give the same file.
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": axes.get_ylabel(), "font.family": "sans-serif"}
    ):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]
