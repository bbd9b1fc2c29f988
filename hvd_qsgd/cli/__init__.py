"""The command ``hvd-qsgd``: one module for each group of commands; each imports what it needs when it runs."""

from __future__ import annotations

import io
import sys

import typer

import hvd_qsgd
from hvd_qsgd.cli import demo, environment, files, speed
from hvd_qsgd.cli.output import print_error, print_line
from hvd_qsgd.errors import HvdQsgdError

STATUS = (
    "Exit status: 0 done; 1 failed, with a message that says what to do, or `doctor` found something to fix; "
    "2 wrong arguments; 130 interrupted."
)

app = typer.Typer(no_args_is_help=True, help="Gradient compression for stock Horovod.", epilog=STATUS)
for group in (environment, speed, files, demo):
    group.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(hvd_qsgd.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line; what a user can mend ends it with a message and no traceback (see ``STATUS``)."""
    for stream in (sys.stdout, sys.stderr):
        # Terminals that are not of UTF-8 lack the lines of tables.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except (HvdQsgdError, OSError) as error:
        print_error(f"hvd-qsgd: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
