"""The command ``hvd-qsgd``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console
from rich.table import Table

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


@app.command("doctor")
def _doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Look at versions, Horovod's build, MPI, the GPU and the network, and say what to fix; status 1 if there is."""
    from hvd_qsgd import doctor

    findings = doctor.examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("what", "state", "found", "what to do")
        colors = {doctor.GOOD: "green", doctor.WARNING: "yellow", doctor.BAD: "red"}
        for finding in findings:
            state = f"[{colors[finding.state]}]{finding.state}[/]"
            table.add_row(finding.what, state, finding.found, finding.remedy)
        Console().print(table)
    if any(finding.state == doctor.BAD for finding in findings):
        raise typer.Exit(1)


@app.command("estimate")
def _estimate(
    parameters: float = typer.Option(..., "--parameters", "-p", help="Number of parameters, such as 25e6."),
    ranks: int = typer.Option(..., "--ranks", "-n", help="Number of ranks."),
    bandwidth: float = typer.Option(..., "--gbit", "-b", help="Gbit/s that a rank can send."),
    latency: float = typer.Option(1.0, "--latency", help="Milliseconds of a small collective, with Horovod's cycle."),
    compute: float = typer.Option(0.0, "--step", help="Milliseconds of a step without communication."),
    backward: Optional[float] = typer.Option(
        None, "--backward", help="Milliseconds of it that can hide transfers; by default two thirds."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Will compression help? Predicts step times; the codecs are timed on this machine, one thread."""
    from hvd_qsgd import estimate

    hidden = compute * 2 / 3 if backward is None else backward
    situation = estimate.Situation(int(parameters), ranks, bandwidth * 1e9, latency / 1e3, compute / 1e3, hidden / 1e3)
    predictions = estimate.predict(situation, estimate.measure_codecs())
    if as_json:
        rows = [dataclasses.asdict(p) | {"pays": p.pays} for p in predictions]
        # JSON has no infinity.
        rows = [{k: None if isinstance(v, float) and math.isinf(v) else v for k, v in row.items()} for row in rows]
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("method", "exchange", "step, ms", "times faster", "pays up to")
    for p in predictions:
        limit = "any bandwidth" if math.isinf(p.break_even) else f"{p.break_even / 1e9:.3g} Gbit/s"
        limit = limit if p.break_even else "never" if p.exchange else ""
        table.add_row(p.method, p.exchange, f"{p.seconds * 1e3:.1f}", f"{p.speedup:.2f}", limit)
    console = Console()
    console.print(table)
    best = max(predictions, key=lambda p: p.speedup)
    if best.pays and best.exchange:
        console.print(f"Yes: {best.method} makes steps {best.speedup:.2f} times faster.")
    elif best.pays:
        console.print(f"Rather not: {best.method} does as well, without this package.")
    else:
        console.print("No: gradients are not what your steps wait for. Nothing would be gained.")


def main() -> None:
    """Run the command line; errors of this package end it with their message and status 1."""
    try:
        app()
    except HvdQsgdError as error:
        typer.secho(f"hvd-qsgd: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
