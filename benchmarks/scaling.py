"""From a few measured hosts to 1,024 ranks: the cost model, how wrong it is, and which exchange wins where.

    python benchmarks/scaling.py             # 2, 3 and 4 hosts at 100 Mbit/s and 1 Gbit/s, a few minutes
    python benchmarks/scaling.py --quick     # a smoke test, under a minute

On emulated hosts (see ``emulated_cluster.py``) every launch measures the few numbers that ``exchange="auto"`` measures
(``hvd_qsgd.tuning.cost``), and then times the exchanges of QSGD, 4 bits. The model knows nothing of these times:
the table compares them with its predictions, made from the numbers of the same launch and, for more than two
hosts, also from those of two hosts. The plot extends the model to more ranks and other bandwidths.
Writes a table, a JSON file and a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from emulated_cluster import ClusterError, EmulatedCluster
from exchange import bits_per_second, result_of
from rich.console import Console
from rich.table import Table

from hvd_qsgd import QSGD
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.reduction.fusion import BUNDLE_ELEMENTS
from hvd_qsgd.tuning.cost import COLLECTIVES, UNCOMPRESSED, Costs

HERE = Path(__file__).resolve().parent
METHODS = (UNCOMPRESSED, *exchanges_for(QSGD()))


def launch(hosts: int, rate: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "scaling_worker.py"), "--repeats", str(arguments.repeats)]
    command += ["--elements", *map(str, arguments.elements)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    with EmulatedCluster(hosts, rate=rate) as cluster:
        run = cluster.run(command, launcher="mpi", environment=environment, timeout=arguments.timeout)
    return {"rate": rate, **result_of(run)}


def predict(costs: Costs, exchange: str, elements: int, ranks: int) -> float:
    return costs.predict(exchange, QSGD(), elements, ranks, bundles=-(-elements // BUNDLE_ELEMENTS))


def fit(launches: list[dict[str, Any]]) -> Costs:
    """One model for all numbers of hosts at one rate: the bytes and the codec of the smallest launch, which
    crowds this machine least, and a latency that grows with the ranks (a line through all launches)."""
    costs = Costs(**launches[0]["costs"])
    ranks, starts = zip(*((run["ranks"] - 1, run["costs"]["start"]) for run in launches))
    if len(launches) == 1:
        return costs
    line = statistics.linear_regression(ranks, starts)
    hop = max(line.slope, 0.0)
    return dataclasses.replace(costs, start=max(statistics.mean(starts) - hop * statistics.mean(ranks), 0.0), hop=hop)


def compare(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every measured time beside what the model says."""
    rows = []
    for run in launches:
        own = Costs(**run["costs"])
        fitted = fit([other for other in launches if other["rate"] == run["rate"]])
        for measured in run["measured"]:
            what = (measured["exchange"], measured["elements"], run["ranks"])
            rows.append(
                {"rate": run["rate"], "ranks": run["ranks"], **measured}
                | {"own": predict(own, *what), "fitted": predict(fitted, *what)}
            )
    return rows


def errors(rows: list[dict[str, Any]], by: str) -> tuple[float, float]:
    """Median and largest relative error of the predictions."""
    relative = [abs(row[by] / row["seconds"] - 1) for row in rows]
    return statistics.median(relative), max(relative)


def right_choices(rows: list[dict[str, Any]]) -> tuple[int, int, float]:
    """How often the method predicted to be fastest was, of how many, and the most that a wrong choice cost."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["rate"], row["ranks"], row["elements"]), []).append(row)
    chosen = [(min(group, key=lambda r: r["own"]), min(group, key=lambda r: r["seconds"])) for group in groups.values()]
    right = sum(choice is best for choice, best in chosen)
    return right, len(chosen), max(choice["seconds"] / best["seconds"] - 1 for choice, best in chosen)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="milliseconds, measured and predicted")
    for column in ("link", "ranks", "values", "method", "measured", "predicted", "by all launches"):
        table.add_column(column, justify="left" if column in ("link", "method") else "right")
    for row in rows:
        times = [f"{row[key] * 1e3:.1f}" for key in ("seconds", "own", "fitted")]
        table.add_row(row["rate"], str(row["ranks"]), f"{row['elements']:,}", row["exchange"], *times)
    console.print(table)
    for by, what in (("own", "from the same launch"), ("fitted", "from all launches at a rate")):
        median, largest = errors(rows, by)
        console.print(f"error of the predictions {what}: median {median:.0%}, largest {largest:.0%}")
    right, total, lost = right_choices(rows)
    console.print(
        f"the fastest method was predicted in {right} of {total} cases; a wrong choice cost {lost:.0%} at most"
    )


def at_rate(costs: Costs, bits: float) -> Costs:
    """The same machine on links of another bandwidth, used fully."""
    return dataclasses.replace(costs, byte=dict.fromkeys(COLLECTIVES, 8 / bits))


def plot(launches: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rates = list(dict.fromkeys(run["rate"] for run in launches))
    figure, axes = pyplot.subplots(1, len(rates) + 1, figsize=(5 * (len(rates) + 1), 4), layout="constrained")
    colors = dict(zip(METHODS, ("0.3", "tab:blue", "tab:orange", "tab:green")))
    elements, ranks = 25_000_000, [2**i for i in range(1, 11)]
    models = {rate: fit([run for run in launches if run["rate"] == rate]) for rate in rates}
    for axis, rate in zip(axes, rates):
        for method in METHODS:
            axis.loglog(ranks, [predict(models[rate], method, elements, n) for n in ranks], color=colors[method])
        axis.set(title=f"25 M values, {rate}: predicted", xlabel="ranks", ylabel="seconds")
    bandwidths = np.logspace(7, 11, 60)
    model = models[rates[-1]]
    best = [
        [
            min(range(len(METHODS)), key=lambda m: predict(at_rate(model, b), METHODS[m], elements, n))
            for b in bandwidths
        ]
        for n in ranks
    ]
    colormap = ListedColormap([colors[method] for method in METHODS])
    axes[-1].pcolormesh(bandwidths / 1e9, ranks, best, cmap=colormap, vmin=-0.5, vmax=len(METHODS) - 0.5)
    axes[-1].set(xscale="log", yscale="log", title="fastest", xlabel="Gbit/s", ylabel="ranks")
    axes[-1].legend(handles=[Patch(color=color, label=method) for method, color in colors.items()], loc="lower left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="link rates, as tc writes them")
    parser.add_argument("--elements", type=int, nargs="+", default=[1_000_000, 8_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one launch")
    parser.add_argument("--quick", action="store_true", help="two hosts, one rate, a small tensor")
    parser.add_argument("--output", type=Path, default=Path("scaling"), help="of .json and .png, without the ending")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.hosts, arguments.rates, arguments.elements, arguments.repeats = [2], ["1gbit"], [500_000], 1
    for rate in arguments.rates:
        bits_per_second(rate)
    try:
        launches = [launch(hosts, rate, arguments) for rate in arguments.rates for hosts in sorted(arguments.hosts)]
    except ClusterError as error:
        raise SystemExit(f"scaling.py: {error}") from error
    rows = compare(launches)
    show(rows, Console())
    arguments.output.with_suffix(".json").write_text(json.dumps({"launches": launches, "predictions": rows}, indent=1))
    plot(launches, arguments.output.with_suffix(".png"))
    print(f"wrote {arguments.output.with_suffix('.json')} and {arguments.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
