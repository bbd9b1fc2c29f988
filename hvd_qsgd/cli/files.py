"""``hvd-qsgd report`` and ``hvd-qsgd inspect``: what is in files that this package wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional

import typer
from rich.console import Console
from rich.table import Table

from hvd_qsgd.cli.output import AS_JSON, print_json


def register(app: typer.Typer) -> None:
    app.command("report")(report)
    app.command("inspect")(inspect)


def report(
    files: List[Path] = typer.Argument(..., help="What JsonLines wrote: one run or rank each."),
    output: Path = typer.Option(Path("report.html"), "--output", "-o", help="The HTML file."),
    as_json: bool = AS_JSON,
) -> None:
    """Make one HTML file, with plots and a table of all tensors, from the records of a monitor."""
    from hvd_qsgd.observe.json_lines import read_records
    from hvd_qsgd.observe.report import make_report, total_of

    html = make_report(files)
    output.write_text(html, encoding="utf-8")
    if as_json:
        totals = {str(file): total_of(read_records(file)) for file in files}
        print_json({"report": str(output), "runs": totals})
    else:
        typer.echo(f"wrote {output}: {len(html) / 1e3:.0f} kB, {len(files)} run{'s' * (len(files) > 1)}")


def inspect(
    file: Path = typer.Argument(..., help="A state file, a checkpoint (.pt), records (.jsonl) or a payload."),
    config: Optional[str] = typer.Option(
        None, "--config", help="Of a payload: the codec's config() as JSON, or a file with it."
    ),
    elements: Optional[int] = typer.Option(None, "--elements", help="Of a payload: how many values it encodes."),
    as_json: bool = AS_JSON,
) -> None:
    """Say what is in a file: settings, tensors, residual norms; of a payload also whether it is sound."""
    from hvd_qsgd.inspecting import inspect_file

    found = inspect_file(file, config, elements)
    if as_json:
        print_json(found.as_dict())
        return
    console = Console()
    console.print(f"[bold]{found.kind}[/]: {file}")
    for name, value in found.facts.items():
        console.print(f"{name}: {_shown(value)}", markup=False)
    if found.rows:
        table = Table(*found.rows[0])
        for row in found.rows:
            table.add_row(*map(_shown, row.values()))
        console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
