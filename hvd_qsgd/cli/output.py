"""What the commands print, and the only place that does: nothing that comes from a file or a program is markup here,
or reaches the terminal as a control character."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Union

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Column, Table
from rich.text import Text

from hvd_qsgd.observe.json_lines import finite
from hvd_qsgd.text import plain

AS_JSON = typer.Option(False, "--json", help="Print JSON.")


def print_json(value: Any) -> None:
    """JSON has no infinity and no NaN; null stands for them."""
    typer.echo(json.dumps(finite(value), indent=1, allow_nan=False))


def print_line(*parts: Any) -> None:
    """Print some values after each other, wrapped at the end of the terminal's lines."""
    Console().print(Text.assemble(*map(as_text, parts)))


def print_table(heads: Sequence[Union[str, Column]], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table of values."""
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*map(as_text, row))
    Console().print(table)


def print_error(message: str) -> None:
    """Print an error, which may have several lines."""
    lines = map(plain, message.split("\n"))
    typer.secho("\n".join(lines), fg=typer.colors.RED, err=True)


def as_text(value: Any, style: str = "") -> Text:
    """A value as it is: rich takes brackets in strings for markup, and words between colons for emoji."""
    return value if isinstance(value, Text) else Text(plain(str(value)), style)


def waiting(what: str) -> Status:
    """Shows that a command of some seconds is at work, where somebody looks at a terminal."""
    return Console(stderr=True).status(what)
