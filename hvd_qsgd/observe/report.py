"""A run as one HTML file that needs nothing else: plots, and a table of all tensors."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_qsgd.observe.plots import draw
from hvd_qsgd.observe.reading import read_records
from hvd_qsgd.observe.stats import COUNTERS
from hvd_qsgd.text import plain

Record = dict[str, Any]
#: A label and records.
Run = tuple[str, list[Record]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 1180px;
  padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; }
code { font-size: 90%; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: .8rem; }
dl div { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .8rem; }
dt { color: #555; font-size: 85%; } dd { margin: 0; font-size: 140%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: #555; font-size: 90%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { background: #f4f4f4; white-space: normal; vertical-align: bottom; }
.text { text-align: left; } td.text:last-child { white-space: normal; min-width: 17rem; }
"""
PHASES = ("encode", "wait", "decode")
#: Of the table of tensors.
HEADERS = (
    ("text", "tensor"),
    ("", "elements"),
    ("", "exchanges"),
    ("", "sent, MB"),
    ("", "payload, times smaller"),
    ("", "encode, ms a step"),
    ("", "wait, ms a step"),
    ("", "decode, ms a step"),
    ("", "relative error"),
    ("", "residual norm"),
    ("text", "how"),
)


def make_report(files: Sequence[str | Path]) -> str:
    """The HTML of one or more runs or ranks, whose records are in one file each.

    Raises:
        ConfigError: a file holds no records, or matplotlib is not installed.
    """
    return page_of(read_runs(files))


def read_runs(files: Sequence[str | Path]) -> list[Run]:
    """The records of each file, with a label that tells it from the others."""
    records = [read_records(file) for file in files]
    stems = [Path(file).stem for file in files]
    labels = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    return [(plain(label), run) for label, run in zip(labels, records)]


def page_of(runs: Sequence[Run]) -> str:
    """The HTML of some runs."""
    labels = [label for label, _ in runs]
    plots = "\n".join(
        f'<figure><h3>{escape(plot.title)}</h3><div role="img" aria-label="{escape(plot.text)}">{plot.svg}</div>'
        f"<figcaption>{escape(plot.text)}</figcaption></figure>"
        for plot in draw(runs)
    )
    summaries = "\n".join(_summary(label, run) for label, run in runs)
    tables = "\n".join(_table(label, run) for label, run in runs)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>hvd_qsgd: {escape(", ".join(labels))}'
        f'</title><meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>'
        f'<h1>Gradient compression</h1>\n{summaries}\n<h2>Steps</h2>\n<div class="plots">\n{plots}\n</div>\n'
        f"{tables}\n</body></html>\n"
    )


def steady(records: list[Record]) -> list[Record]:
    """The records whose times count: without the first, in which kernels may be compiled, if there are more."""
    return records[1:] or records


def total_of(records: list[Record], tensor: str | None = None) -> Record:
    """The counts of some records added up, of one tensor or of all; of all else the last."""
    parts = records if tensor is None else [r["tensors"][tensor] for r in records if tensor in r["tensors"]]
    total = dict(parts[-1])
    for name in COUNTERS:
        if name in total:
            total[name] = sum(part[name] for part in parts)
    for name in ("relative_error", "residual_norm"):
        total[name] = next((part[name] for part in reversed(parts) if part[name] is not None), None)
    return total


def _summary(label: str, records: list[Record]) -> str:
    last, total = records[-1], total_of(records)
    timed = total_of(steady(records))
    steps = sum(r["steps"] for r in steady(records))
    seconds = sum(r["seconds"] for r in steady(records))
    sent, plain = total["wire_bytes"], total["uncompressed_wire_bytes"]
    entries = {
        "steps": f"{last['step']:,}",
        "sent by this rank": _megabytes(sent),
        "uncompressed": _megabytes(plain),
        "times fewer bytes": f"{plain / sent:.1f}" if sent else "",
        "a step": f"{seconds / steps * 1e3:.1f} ms",
        "encode": f"{timed['encode_seconds'] / steps * 1e3:.1f} ms",
        "wait": f"{timed['wait_seconds'] / steps * 1e3:.1f} ms",
        "decode": f"{timed['decode_seconds'] / steps * 1e3:.1f} ms",
        "last relative error": _number(total["relative_error"]),
        "last residual norm": _number(total["residual_norm"]),
    }
    cards = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in entries.items() if v)
    ended = datetime.datetime.fromtimestamp(last["time"], datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    decisions = "".join(
        f"<p>exchange=&quot;auto&quot;, {escape(what)}: {escape(choice)}</p>"
        for what, choice in last["decisions"].items()
    )
    return (
        f"<h2>{escape(label)}</h2>\n<p><code>{escape(last['compressor'])}</code><br>"
        f"rank {escape(last['rank'])} of {escape(last['ranks'])}, ended {ended}</p>\n<dl>{cards}</dl>\n{decisions}"
    )


def _table(label: str, records: list[Record]) -> str:
    timed = steady(records)
    steps = sum(r["steps"] for r in timed)
    names = list(dict.fromkeys(name for r in records for name in r["tensors"]))
    totals = {name: total_of(records, name) for name in names}
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in HEADERS)
    rows = []
    for name in sorted(names, key=lambda name: -totals[name]["wire_bytes"]):
        t = totals[name]
        parts = [r["tensors"][name] for r in timed if name in r["tensors"]]
        times = [sum(part[f"{phase}_seconds"] for part in parts) for phase in PHASES]
        how = f"not compressed: {t['bypassed']}" if t["bypassed"] else f"{t['exchange']}, {t['codec']}"
        cells = (
            name,
            f"{t['elements']:,}",
            f"{t['exchanges']:,}",
            f"{t['wire_bytes'] / 1e6:,.3f}",
            f"{t['raw_bytes'] / t['payload_bytes']:.1f}" if t["payload_bytes"] else "",
            *("" if t["bypassed"] else f"{seconds / steps * 1e3:.3f}" for seconds in times),
            _number(t["relative_error"]),
            _number(t["residual_norm"]),
            how,
        )
        columns = "".join(f'<td class="{kind}">{escape(cell)}</td>' for (kind, _), cell in zip(HEADERS, cells))
        rows.append(f"<tr>{columns}</tr>")
    return (
        f'<h2>Tensors of {escape(label)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def escape(value: Any) -> str:
    """Any value as text of a page: no markup, and control characters are shown."""
    return html.escape(plain(str(value)))


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
