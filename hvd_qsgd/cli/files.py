"""``hvd-qsgd report`` and ``hvd-qsgd inspect``: what is in files that this package wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional

import typer

from hvd_qsgd.cli.output import AS_JSON, as_text, print_json, print_line, print_table


def register(app: typer.Typer) -> None:
    app.command("report")(report)
    app.command("inspect")(inspect)


def report(
    files: List[Path] = typer.Argument(..., help="What JsonLines wrote: one run or rank each."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The HTML file."),
    as_json: bool = AS_JSON,
) -> None:
    """Make one HTML file, with plots and a table of all tensors, from the records of a monitor."""
    from hvd_qsgd.observe.report import page_of, read_runs, total_of

    runs = read_runs(files)
    html = page_of(runs)
    output.write_text(html, encoding="utf-8")
    if as_json:
        totals = {str(file): total_of(records) for file, (_, records) in zip(files, runs)}
        print_json({"report": str(output), "runs": totals})
    else:
        print_line(f"wrote {output}: {len(html) / 1e3:.0f} kB, {len(files)} run{'s' * (len(files) > 1)}")


def inspect(
    file: Path = typer.Argument(..., help="A state file, a checkpoint (.pt), records (.jsonl) or a payload."),
    config: Optional[str] = typer.Option(
        None, "--config", help="Of a payload: the codec's config() as JSON, or a file with it."
    ),
    elements: Optional[int] = typer.Option(None, "--elements", help="Of a payload: how many values it encodes."),
    as_json: bool = AS_JSON,
) -> None:
    """Say what is in a file: settings, tensors, residual norms; of a payload also whether it is sound."""
    from hvd_qsgd.commands.inspect_files import inspect_file

    found = inspect_file(file, config, elements)
    if as_json:
        print_json(found.as_dict())
        return
    print_line(as_text(found.kind, "bold"), ": ", file)
    for name, value in found.facts.items():
        print_line(f"{name}: {_shown(value)}")
    if found.rows:
        print_table(list(found.rows[0]), [list(map(_shown, row.values())) for row in found.rows])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
