"""``hvd-qsgd doctor`` and ``hvd-qsgd install-horovod``."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Optional

import typer

from hvd_qsgd.cli.output import AS_JSON, as_text, print_json, print_table, waiting


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
    app.command("install-horovod")(install_horovod)


def doctor(as_json: bool = AS_JSON) -> None:
    """Look at versions, Horovod's build, MPI, the GPU and the network, and say what to fix; status 1 if there is."""
    from hvd_qsgd.commands import doctor

    with waiting("Asking Horovod, MPI and the GPU"):
        findings = doctor.examine()
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        colors = {doctor.GOOD: "green", doctor.WARNING: "yellow", doctor.BAD: "red"}
        print_table(
            ("what", "state", "found", "what to do"),
            [(f.what, as_text(f.state, colors[f.state]), f.found, f.remedy) for f in findings],
        )
    if any(finding.state == doctor.BAD for finding in findings):
        raise typer.Exit(1)


def install_horovod(
    without_mpi: bool = typer.Option(False, "--without-mpi", help="Build with Gloo alone."),
    gpu: bool = typer.Option(False, "--gpu", help="Build GPU collectives over NCCL; needs CUDA and NCCL."),
    force: bool = typer.Option(False, "--force", help="Build again even if Horovod is installed or cached."),
    log: Optional[Path] = typer.Option(None, "--log", help="Where the compiler's output goes."),
    as_json: bool = AS_JSON,
) -> None:
    """Build Horovod 0.28.1 against the torch and TensorFlow of this environment, and install it."""
    from hvd_qsgd.commands import install_horovod

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        install_horovod.install(mpi=not without_mpi, gpu=gpu, force=force, log=log)
    if as_json:
        frameworks = install_horovod.find_frameworks()
        print_json({"horovod": install_horovod.HOROVOD_VERSION, "frameworks": frameworks})
