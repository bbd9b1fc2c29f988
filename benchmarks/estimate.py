"""How wrong `hvd-qsgd estimate` is: what it predicts beside what an exchange takes, on emulated hosts.

    python benchmarks/estimate.py             # one tensor of 25 M values, 2 hosts, 1 Gbit/s
    python benchmarks/estimate.py --quick     # a smoke test, under a minute

In one emulated cluster (see ``emulated_cluster.py``) it launches ``exchange_worker.py``, which times the exchanges,
and ``hvd-qsgd estimate --measure``, which knows nothing of them; a third estimate takes the rate of the links for their
bandwidth. Writes a table and a JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from emulated_cluster import ClusterError, EmulatedCluster
from exchange import bits_per_second, result_of
from rich.console import Console
from rich.table import Table

from hvd_qsgd.commands import estimate

HERE = Path(__file__).resolve().parent
#: Of ``exchange_worker.py``, and what the estimate calls them.
METHODS = {
    "none": "Horovod, uncompressed",
    "fp16": "hvd.Compression.fp16",
    "qsgd8": "QSGD, 8 bits",
    "qsgd4": "QSGD, 4 bits",
    "topk": "TopK, 1 %",
}


def launch(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each method, as measured and as estimated from a measured network."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    exchange = [sys.executable, str(HERE / "exchange_worker.py"), "--elements", str(arguments.elements)]
    exchange += ["--repeats", str(arguments.repeats), "--methods", *METHODS]
    command = [sys.executable, "-m", "hvd_qsgd", "estimate", "--measure", "-p", str(arguments.elements), "--json"]
    with EmulatedCluster(arguments.hosts, rate=arguments.rate) as cluster:
        estimated = cluster.run(command, environment=environment, timeout=300)
        measured: dict[str, Any] = result_of(cluster.run(exchange, environment=environment, timeout=600))
    # The launcher tags each line.
    text = "".join(line.partition(">:")[2] or line for line in estimated.stdout.splitlines())
    rows = json.JSONDecoder().raw_decode(text[text.index("[ {") :])[0] if "[ {" in text else []
    if not rows:
        raise SystemExit(f"The estimate printed nothing:\n{estimated.stdout}\n{estimated.stderr}")
    return {name: measured[name]["seconds"] for name in METHODS}, {row["method"]: row["seconds"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rate", default="1gbit", help="link rate, as tc writes it")
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small tensor, few repeats")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.elements, arguments.repeats = 1_000_000, 3
    try:
        measured, estimated = launch(arguments)
    except ClusterError as error:
        raise SystemExit(f"estimate.py: {error}") from error
    situation = estimate.Situation(arguments.elements, arguments.hosts, bits_per_second(arguments.rate))
    nominal = {p.method: p.seconds for p in estimate.predict(situation, estimate.measure_codecs())}
    table = Table(title=f"milliseconds, {arguments.elements:,} values, {arguments.hosts} hosts, {arguments.rate}")
    for column in ("method", "measured", "with --measure", "error", "from the rate", "error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = []
    for name, method in METHODS.items():
        row = {"method": method, "measured": measured[name], "estimated": estimated[method], "nominal": nominal[method]}
        cells = [f"{row['measured'] * 1e3:.0f}"]
        for by in ("estimated", "nominal"):
            cells += [f"{row[by] * 1e3:.0f}", f"{row[by] / row['measured'] - 1:+.0%}"]
        table.add_row(method, *cells)
        rows.append(row)
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
