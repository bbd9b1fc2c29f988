"""What the commands print."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.status import Status

from hvd_qsgd.observe.json_lines import finite

AS_JSON = typer.Option(False, "--json", help="Print JSON.")


def print_json(value: Any) -> None:
    """JSON has no infinity and no NaN; null stands for them."""
    typer.echo(json.dumps(finite(value), indent=1, allow_nan=False))


def waiting(what: str) -> Status:
    """Shows that a command of some seconds is at work, where somebody looks at a terminal."""
    return Console(stderr=True).status(what)
