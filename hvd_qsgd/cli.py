"""The command ``hvd-qsgd``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import typer

import hvd_qsgd
from hvd_qsgd import install_horovod
from hvd_qsgd.errors import HvdQsgdError

app = typer.Typer(no_args_is_help=True, help="Gradient compression for stock Horovod.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(hvd_qsgd.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Without this callback typer would make the only command the whole program."""


@app.command("install-horovod")
def _install_horovod(
    without_mpi: bool = typer.Option(False, "--without-mpi", help="Build with Gloo alone."),
    gpu: bool = typer.Option(False, "--gpu", help="Build GPU collectives over NCCL; needs CUDA and NCCL."),
    force: bool = typer.Option(False, "--force", help="Build again even if Horovod is installed or cached."),
    log: Optional[Path] = typer.Option(None, "--log", help="Where the compiler's output goes."),
) -> None:
    """Build Horovod 0.28.1 against the torch and TensorFlow of this environment, and install it."""
    install_horovod.install(mpi=not without_mpi, gpu=gpu, force=force, log=log)


def main() -> None:
    """Run the command line; errors of this package end it with their message and status 1."""
    try:
        app()
    except HvdQsgdError as error:
        typer.secho(f"hvd-qsgd: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
