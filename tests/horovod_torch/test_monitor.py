"""What a monitor reports is what was sent and lost, and watching changes no bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from expectations import decoded, key
from rank_checks import (
    SHAPE,
    assert_same_on_all_ranks,
    backward,
    digest,
    dyadic,
    make_gradients,
    make_optimizer,
    make_parameters,
    train,
)

from hvd_qsgd import ConfigError
from hvd_qsgd.observe import JsonLines, Monitor, Record, read_records
from hvd_qsgd.torch import (
    DGCCompressor,
    IntSGDCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    SignCompressor,
    TopKCompressor,
)

RANK, RANKS = hvd.rank(), hvd.size()
SHAPES = {"first": SHAPE, "bias": (100,), "second": (64, 64), "third": (30, 20, 5)}
STEPS = 5


class Kept:
    """A sink that keeps the records."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def run(make: Any, every: int | None, steps: int = STEPS) -> tuple[Any, Kept, torch.Tensor]:
    """Compressor, records and a digest of all that came out."""
    sink = Kept()
    monitor = None if every is None else Monitor(sink, every=every, all_ranks=True)
    compressor = make(monitor=monitor)
    parameters = make_parameters(SHAPES)
    train(make_optimizer(parameters, compressor), parameters, range(steps))
    if monitor is not None:
        monitor.close()
    assert_same_on_all_ranks(parameters.values())
    return compressor, sink, digest([*parameters.values(), *compressor.state_dict()["arrays"].values()])


MAKERS = {
    "allgather": lambda **s: QSGDCompressor(exchange="allgather", fusion_elements=4096, **s),
    "scatter_gather": lambda **s: QSGDCompressor(exchange="scatter_gather", **s),
    "allreduce": lambda **s: QSGDCompressor(exchange="allreduce", **s),
    "topk": TopKCompressor,
    "sign": SignCompressor,
    "powersgd": PowerSGDCompressor,
    "intsgd": IntSGDCompressor,
    "dgc": lambda **s: DGCCompressor(warm_up=[], ratio=0.05, **s),
}


@pytest.mark.parametrize("name", MAKERS)
def test_watching_changes_no_bit_and_records_add_up(name: str) -> None:
    _, _, without = run(MAKERS[name], None)
    for every in (1, 3):
        compressor, sink, watched = run(MAKERS[name], every)
        assert torch.equal(watched, without)
        assert [r.steps for r in sink.records] == ([1] * STEPS if every == 1 else [3, 2])
        assert [r.step for r in sink.records] == ([1, 2, 3, 4, 5] if every == 1 else [3, 5])
        assert {(r.rank, r.ranks) for r in sink.records} == {(RANK, RANKS)} and sink.closed
        total = compressor.stats()
        for attribute in ("raw_bytes", "payload_bytes"):
            assert sum(getattr(r.stats, attribute) for r in sink.records) == getattr(total, attribute) > 0
        assert sum(r.stats.wire_bytes for r in sink.records) == pytest.approx(total.wire_bytes)
        for tensor in total.tensors:
            parts = [r.stats.tensors[tensor] for r in sink.records]
            assert sum(part.wire_bytes for part in parts) == pytest.approx(total.tensors[tensor].wire_bytes)
            assert sum(part.exchanges for part in parts) == STEPS
        for phase in ("encode_seconds", "wait_seconds", "decode_seconds"):
            assert sum(r.stats.total(phase) for r in sink.records) == pytest.approx(total.total(phase))
        assert total.total("encode_seconds") > 0 and total.total("decode_seconds") > 0
        # The last, shorter record of every=3 ends before a step that measures.
        errors = [r.stats.relative_error is not None for r in sink.records]
        assert errors == ([True] * STEPS if every == 1 else [True, False])


@pytest.mark.parametrize("exchange", ["allgather", "allreduce"])
def test_errors_equal_an_independent_computation(exchange: str) -> None:
    """Without feedback: what the codec's NumPy code loses of the gradient, with the words of this rank and step."""
    sink = Kept()
    monitor = Monitor(sink, every=1, all_ranks=True)
    compressor = QSGDCompressor(exchange=exchange, monitor=monitor)
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor)
    gradients = []
    for step in range(2):
        optimizer.zero_grad()
        gradients.append(make_gradients(parameters, step))
        backward(parameters, gradients[-1])
        optimizer.step()
    monitor.close()
    codec = compressor.policy.only
    for step, record in enumerate(sink.records):
        lost, whole = [], []
        for name in SHAPES:
            tensor, x = record.stats.tensors[f"{name}"], gradients[step][name].numpy()
            if name == "bias":
                assert tensor.bypassed and tensor.relative_error is None and tensor.input_norm is None
                continue
            assert tensor.input_norm == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-5)
            assert tensor.residual_norm is None and tensor.codec == repr(codec)
            error = x - decoded(codec, x, key(f"{name}", RANK, step))
            if exchange == "allgather":
                assert tensor.lost_norm == pytest.approx(np.linalg.norm(error), rel=1e-5)
                assert tensor.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(x), rel=1e-5)
            else:
                # On the scales of all ranks, which are no finer than its own.
                assert tensor.lost_norm > 0.9 * np.linalg.norm(error)
            lost.append(tensor.lost_norm)
            whole.append(tensor.input_norm)
        assert record.stats.relative_error == pytest.approx(math.hypot(*lost) / math.hypot(*whole))


def test_residual_norms_are_those_of_the_state() -> None:
    compressor, sink, _ = run(TopKCompressor, 1)
    arrays = compressor.state_dict()["arrays"]
    last = sink.records[-1].stats.tensors
    assert set(arrays) == {f"residual/{name}" for name in last if not last[name].bypassed}
    for path, array in arrays.items():
        tensor = last[path.removeprefix("residual/")]
        assert tensor.residual_norm == tensor.lost_norm == pytest.approx(float(array.double().norm()), rel=1e-5)
    assert sink.records[-1].stats.residual_norm == pytest.approx(
        math.hypot(*(float(array.double().norm()) for array in arrays.values())), rel=1e-5
    )


def test_single_allreduces_and_resets() -> None:
    sink = Kept()
    monitor = Monitor(sink, every=2, all_ranks=True)
    compressor = QSGDCompressor(monitor=monitor)
    x = dyadic(SHAPE)
    hvd.allreduce(x, name="x", compression=compressor)
    compressor.reset()
    for _ in range(3):
        hvd.allreduce(x, name="x", compression=compressor)
        hvd.allreduce(x, name="y", compression=compressor)
    monitor.close()
    # The one before the reset is a step without "y", and forgotten with the statistics.
    assert [record.stats.tensors["x"].exchanges for record in sink.records] == [1, 2]
    assert sum(r.stats.payload_bytes for r in sink.records) == compressor.stats().payload_bytes


def test_the_choice_of_auto_is_in_the_records() -> None:
    _, sink, _ = run(lambda **s: QSGDCompressor(exchange="auto", **s), 1)
    assert not sink.records[0].stats.decisions
    (decision,) = sink.records[-1].stats.decisions.values()
    assert "predicted" in decision
    assert "measures in the first steps" in sink.records[0].stats.tensors["first"].bypassed


def test_rank_0_alone_writes_a_file_and_its_lines_are_the_records(tmp_path: Path) -> None:
    directory = Path(hvd.broadcast_object(str(tmp_path), root_rank=0, name="directory"))
    kept = Kept()
    monitor = Monitor(kept, JsonLines(directory / "run.jsonl"), every=2)
    parameters = make_parameters(SHAPES)
    train(make_optimizer(parameters, TopKCompressor(monitor=monitor)), parameters, range(4))
    monitor.close()
    assert len(kept.records) == (2 if RANK == 0 else 0)
    hvd.barrier()
    lines = read_records(directory / "run.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["tensors"]["first"]["payload_bytes"] > 0 and lines[0]["ranks"] == RANKS
    if RANK == 0:
        assert lines == [{"version": 1, **json.loads(json.dumps(record.as_dict()))} for record in kept.records]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    monitor = Monitor(Kept())
    QSGDCompressor(monitor=monitor)
    with pytest.raises(ConfigError, match="one Monitor for each compressor"):
        QSGDCompressor(monitor=monitor)
    with pytest.raises(ConfigError, match="without sinks"):
        Monitor()
    with pytest.raises(ConfigError, match="every"):
        Monitor(Kept(), every=0)


def test_a_sink_that_fails_ends_no_training() -> None:
    class Full(Kept):
        def write(self, record: Record) -> None:
            raise OSError("No space left on device")

    kept = Kept()
    monitor = Monitor(Full(), kept, every=1, all_ranks=True)
    compressor = QSGDCompressor(monitor=monitor)
    with pytest.warns(RuntimeWarning, match="Full gets no more records: No space left"):
        for _ in range(3):
            hvd.allreduce(dyadic(SHAPE), name="x", compression=compressor)
    monitor.close()
    assert len(kept.records) == 3


def test_a_profiler_sees_the_phases() -> None:
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="scatter_gather"))
    train(optimizer, parameters, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, parameters, range(2))
    counts = {event.key: event.count for event in profile.key_averages()}
    # One bundle a step: it is encoded once, and goes on after each of two collectives.
    assert (counts["hvd_qsgd.encode"], counts["hvd_qsgd.decode"], counts["hvd_qsgd.wait"]) == (2, 4, 2)
