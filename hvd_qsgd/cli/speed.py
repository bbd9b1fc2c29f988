"""``hvd-qsgd estimate`` and ``hvd-qsgd bench``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Optional

import typer
from rich.table import Column

from hvd_qsgd.cli.output import AS_JSON, print_json, print_line, print_table, waiting


def register(app: typer.Typer) -> None:
    app.command("estimate")(estimate)
    app.command("bench")(bench)


def estimate(
    parameters: Optional[float] = typer.Option(None, "--parameters", "-p", help="Number of parameters, such as 25e6."),
    model: Optional[str] = typer.Option(
        None, "--model", help="In place of it: a torch module or Keras model, or what makes it: package.module:name."
    ),
    ranks: Optional[int] = typer.Option(None, "--ranks", "-n", help="Number of ranks."),
    bandwidth: Optional[float] = typer.Option(None, "--gbit", "-b", help="Gbit/s that a rank can send."),
    latency: float = typer.Option(1.0, "--latency", help="Milliseconds of a small collective, with Horovod's cycle."),
    compute: float = typer.Option(0.0, "--step", help="Milliseconds of a step without communication."),
    backward: Optional[float] = typer.Option(
        None, "--backward", help="Milliseconds of it that can hide transfers; by default two thirds."
    ),
    measure: bool = typer.Option(
        False,
        "--measure",
        help="Measure ranks, bandwidth and latency: horovodrun -np 4 hvd-qsgd estimate --measure ...",
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Will compression help? Predicts step times; the codecs are timed on this machine, one thread."""
    from hvd_qsgd.commands import estimate

    if (parameters is None) == (model is None):
        raise typer.BadParameter("give one of both", param_hint="--parameters or --model")
    numbers = {
        "--parameters": parameters, "--gbit": bandwidth, "--latency": latency, "--step": compute, "--backward": backward
    }  # fmt: skip
    for option, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no finite number", param_hint=option)
    count = int(parameters) if parameters is not None else estimate.count_parameters(str(model))
    hidden = (compute * 2 / 3 if backward is None else backward) / 1e3
    if measure:
        if ranks is not None or bandwidth is not None:
            raise typer.BadParameter("leave out --ranks and --gbit, which are measured", param_hint="--measure")
        rank, situation, speeds = estimate.measure_job(count, compute / 1e3, hidden)
        if rank:
            return
    else:
        if ranks is None or bandwidth is None:
            raise typer.BadParameter("give both, or --measure under horovodrun", param_hint="--ranks and --gbit")
        situation = estimate.Situation(count, ranks, bandwidth * 1e9, latency / 1e3, compute / 1e3, hidden)
        with waiting("Timing the codecs on this machine"):
            speeds = estimate.measure_codecs()
    predictions = estimate.predict(situation, speeds)
    if as_json:
        print_json([dataclasses.asdict(p) | {"pays": p.pays} for p in predictions])
        return
    print_line(
        f"{situation.parameters:,} parameters, {situation.ranks} ranks, {situation.bandwidth / 1e9:.3g} Gbit/s, "
        f"{situation.latency * 1e3:.3g} ms for a small collective{', as measured' if measure else ''}"
    )
    rows = []
    for p in predictions:
        limit = "any bandwidth" if math.isinf(p.break_even) else f"{p.break_even / 1e9:.3g} Gbit/s"
        limit = limit if p.break_even else "never" if p.exchange else ""
        rows.append((p.method, p.exchange, f"{p.seconds * 1e3:.1f}", f"{p.speedup:.2f}", limit))
    print_table([Column("method", min_width=21), "exchange", "step, ms", "times\nfaster", "pays up to"], rows)
    best = max(predictions, key=lambda p: p.speedup)
    if best.pays and best.exchange:
        print_line(
            f"Yes: {best.method} makes steps {best.speedup:.2f} times faster. "
            "That is time alone: TopK and 2 bits can cost accuracy, so begin with QSGD, 4 bits."
        )
    elif best.pays:
        print_line(f"Rather not: {best.method} does as well, without this package.")
    else:
        print_line("No: gradients are not what your steps wait for. Nothing would be gained.")


def bench(
    exchange: bool = typer.Option(
        False, "--exchange", help="Time allreduces between ranks: horovodrun -np 2 hvd-qsgd bench --exchange"
    ),
    elements: float = typer.Option(4e6, "--elements", help="Of the tensor that --exchange reduces, float32."),
    repeats: int = typer.Option(5, "--repeats", min=1, help="Of each measurement of --exchange; the median is shown."),
    as_json: bool = AS_JSON,
) -> None:
    """How fast is this machine? Codecs, one thread; with --exchange whole allreduces between ranks."""
    from hvd_qsgd.commands import bench

    if exchange:
        rank, times = bench.exchange_times(int(elements), repeats)
        if rank:
            return
        results: Sequence[Any] = times
        title, heads = f"{int(elements):,} values of float32", ("method", "ms", "times faster", "MB sent")
        rows = [
            (t.method, f"{t.seconds * 1e3:.2f}", f"{times[0].seconds / t.seconds:.2f}", f"{t.sent / 1e6:.2f}")
            for t in times
        ]
    else:
        with waiting("Timing the codecs on this machine"):
            results = speeds = bench.codec_speeds()
        title, heads = "float32 read or made a second", ("codec", "times smaller", "encode, GB/s", "decode, GB/s")
        rows = [(s.codec, f"{s.ratio:.1f}", f"{s.encode / 1e9:.2f}", f"{s.decode / 1e9:.2f}") for s in speeds]
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        print_table(heads, rows, title)
