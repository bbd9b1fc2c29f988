"""Bytes and time of a pipeline of four stages on four hosts, uncompressed and compressed, side by side.

    python benchmarks/pipeline.py                          # at 100 Mbit/s and 1 Gbit/s
    python benchmarks/pipeline.py --rates 1gbit --width 4096
    python benchmarks/pipeline.py --quick                  # a smoke test, under a minute

Hosts are network namespaces on this machine (see ``emulated_cluster.py``). All methods run in one launch
on the same model, whose stages compute little and send much. Bytes are those of all hosts, from the counters of their
interfaces. Writes a table, a JSON file and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from emulated_cluster import ClusterError, EmulatedCluster
from exchange import bits_per_second, plot, result_of
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
QUICK = ["--methods", "none", "qsgd 8/8", "qsgd 4/4", "--repeats", "2", "--width", "1024"]


def run(options: list[str], rate: str, timeout: float) -> dict[str, Any]:
    """One launch at one rate: method to its measurements."""
    command = [sys.executable, str(HERE / "pipeline_stage.py"), *options]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    with EmulatedCluster(4, rate=rate) as cluster:
        launched = cluster.run(command, environment=environment, timeout=timeout)
    measured: dict[str, Any] = result_of(launched)
    return measured


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    for rate, methods in results.items():
        table = Table(title=f"a step of four stages, links of {rate}")
        for column in ("activations / gradients", "ms", "times faster", "MB sent", "times fewer", "limit, ms"):
            table.add_column(column, justify="left" if column.startswith("act") else "right")
        for name, measured in methods.items():
            cells = [name, f"{measured['seconds'] * 1e3:.0f}"]
            cells.append(f"{methods['none']['seconds'] / measured['seconds']:.2f}" if "none" in methods else "")
            cells.append(f"{measured['bytes'] / 1e6:.2f}")
            cells.append(f"{methods['none']['bytes'] / measured['bytes']:.2f}" if "none" in methods else "")
            table.add_row(*cells, f"{measured['busiest'] * 8 / bits_per_second(rate) * 1e3:.0f}")
        console.print(table)
    console.print('"limit" is what the busiest host sends over the bandwidth of its link: no step can be faster.')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options go to pipeline_stage.py: --methods --width --hidden --batch --micro-batches --repeats.",
    )
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="link rates, as tc writes them")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one launch")
    parser.add_argument("--quick", action="store_true", help="small, few repeats, one rate")
    parser.add_argument("--output", type=Path, default=Path("pipeline"), help="of .json and .png, without the ending")
    arguments, options = parser.parse_known_args()
    if arguments.quick:
        arguments.rates, options = arguments.rates[:1], [*QUICK, *options]
    try:
        results = {rate: run(options, rate, arguments.timeout) for rate in arguments.rates}
    except ClusterError as error:
        raise SystemExit(f"pipeline.py: {error}") from error
    show(results, Console(width=110))
    settings = {"rates": arguments.rates, "options": options}
    arguments.output.with_suffix(".json").write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    plot(results, "four stages", arguments.output.with_suffix(".png"), "busiest")
    print(f"wrote {arguments.output.with_suffix('.json')} and {arguments.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
