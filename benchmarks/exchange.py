"""How long gradients take between hosts: Horovod uncompressed, fp16, and this package, side by side.

    python benchmarks/exchange.py                          # one tensor of 25 M values, 2 hosts, 1 Gbit/s
    python benchmarks/exchange.py --workload resnet50      # training steps of ResNet-50
    python benchmarks/exchange.py --framework tensorflow
    python benchmarks/exchange.py --rates 100mbit 1gbit 10gbit --hosts 4
    python benchmarks/exchange.py --quick                  # a smoke test, under a minute

Hosts are network namespaces on this machine (see ``emulated_cluster.py``), joined by links of the
given rate and launched by ``horovodrun`` over ssh. All methods run in one launch on the same data. Bytes
are read from the interface counters. "limit" is those bytes over the bandwidth: no method can be
faster. Writes a table, a JSON file and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from emulated_cluster import ClusterError, EmulatedCluster
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def bits_per_second(rate: str) -> float:
    """ "100mbit" as a number."""
    unit = rate[-4:]
    if unit not in UNITS:
        raise SystemExit(f"--rates {rate}: write a number and kbit, mbit or gbit, such as 100mbit.")
    return float(rate[:-4]) * UNITS[unit]


def run(arguments: argparse.Namespace, rate: str) -> dict[str, Any]:
    """One launch at one rate: method to its measurements."""
    command = [sys.executable, str(HERE / "exchange_worker.py"), "--workload", arguments.workload]
    command += ["--framework", arguments.framework]
    command += ["--elements", str(arguments.elements), "--repeats", str(arguments.repeats)]
    command += ["--batch", str(arguments.batch), "--pixels", str(arguments.pixels), "--methods", *arguments.methods]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    with EmulatedCluster(arguments.hosts, rate=rate) as cluster:
        launched = cluster.run(command, launcher=arguments.launcher, environment=environment, timeout=arguments.timeout)
    measured: dict[str, Any] = result_of(launched)
    return measured


def result_of(run: CompletedProcess[str]) -> Any:
    """What the first rank printed after RESULT."""
    for line in run.stdout.splitlines():
        if "RESULT {" in line:
            return json.loads(line[line.index("RESULT {") + len("RESULT ") :])
    raise SystemExit(f"The ranks printed no result (exit status {run.returncode}):\n{run.stdout}\n{run.stderr}")


def show(results: dict[str, dict[str, Any]], workload: str, console: Console) -> None:
    for rate, methods in results.items():
        table = Table(title=f"{workload}, links of {rate}")
        for column in ("method", "ms", "times faster", "MB sent by a host", "limit, ms"):
            table.add_column(column, justify="left" if column == "method" else "right")
        local = methods.get("local", {}).get("seconds", 0.0)
        base = methods["none"]["seconds"] - local if "none" in methods else None
        if local:
            table.columns[2].header = "times less exposed communication"
        for name, measured in methods.items():
            exposed = measured["seconds"] - local
            speed = f"{base / exposed:.2f}" if base and exposed > 0 and name != "local" else ""
            limit = measured["bytes"] * 8 / bits_per_second(rate) * 1e3
            cells = [name, f"{measured['seconds'] * 1e3:.0f}", speed, f"{measured['bytes'] / 1e6:.2f}", f"{limit:.0f}"]
            table.add_row(*cells)
        console.print(table)


def plot(results: dict[str, dict[str, Any]], workload: str, path: Path, sent: str = "bytes") -> None:
    """Bars of times, and marks where the bytes of ``sent`` over the bandwidth are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(1 + 4.5 * len(results), 3.6), squeeze=False)
    for axis, (rate, methods) in zip(axes[0], results.items()):
        names = list(methods)
        axis.barh(names, [methods[name]["seconds"] * 1e3 for name in names], color="tab:blue")
        limits = [methods[name][sent] * 8 / bits_per_second(rate) * 1e3 for name in names]
        axis.plot(limits, names, "|", color="black", markersize=16, label="bytes over bandwidth")
        axis.invert_yaxis()
        axis.set(xlabel="milliseconds", title=f"{workload}, {rate}")
        # Below, where it covers no bar.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["tensor", "resnet50"], default="tensor")
    parser.add_argument("--framework", choices=["torch", "tensorflow"], default="torch")
    parser.add_argument("--rates", nargs="+", default=["1gbit"], help="link rates, as tc writes them")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--launcher", choices=["mpi", "gloo"], default="mpi")
    parser.add_argument("--methods", nargs="+", help="see exchange_worker.py")
    parser.add_argument("--elements", type=int, default=25_000_000, help="of the tensor workload")
    parser.add_argument("--batch", type=int, default=4, help="images a rank, of the resnet50 workload")
    parser.add_argument("--pixels", type=int, default=64, help="image width, of the resnet50 workload")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one launch")
    parser.add_argument("--quick", action="store_true", help="small tensor, few repeats")
    parser.add_argument("--output", type=Path, default=Path("exchange"), help="of .json and .png, without the ending")
    arguments = parser.parse_args()
    if arguments.methods is None:
        arguments.methods = ["none", "fp16", "qsgd8", "qsgd4", "qsgd2", "qsgd4-scatter", "qsgd4-allreduce", "topk"]
        if arguments.workload == "resnet50":
            arguments.methods = ["local", "none", "fp16", "qsgd8", "qsgd4", "topk", "powersgd", "ddp", "ddp-fp16"]
            arguments.methods += ["ddp-powersgd"]
    if arguments.quick:
        arguments.elements, arguments.repeats, arguments.methods = 1_000_000, 3, ["none", "qsgd4", "topk"]
    try:
        results = {rate: run(arguments, rate) for rate in arguments.rates}
    except ClusterError as error:
        raise SystemExit(f"exchange.py: {error}") from error
    show(results, arguments.workload, Console())
    settings = {name: str(value) for name, value in vars(arguments).items()}
    arguments.output.with_suffix(".json").write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    plot(results, arguments.workload, arguments.output.with_suffix(".png"))
    print(f"wrote {arguments.output.with_suffix('.json')} and {arguments.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
