"""Monitors: the records of ``tests/horovod_torch/test_monitor.py``, made inside of graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from expectations import SHAPE, decoded, key
from rank_checks import MODES, assert_same_on_all_ranks, digest, dyadic, gradients_of, normal

from hvd_qsgd import QSGD
from hvd_qsgd.observe import JsonLines, Monitor, Record, TensorBoard, read_records
from hvd_qsgd.tensorflow import QSGDCompressor, TopKCompressor

RANK, RANKS = hvd.rank(), hvd.size()
SHAPES = {"first": SHAPE, "bias": (100,), "second": (64, 64), "third": (30, 20, 5)}
STEPS = 5
SUMS = ("raw_bytes", "payload_bytes", "wire_bytes")
PHASES = ("encode_seconds", "wait_seconds", "decode_seconds")


class Kept:
    """A sink that keeps the records."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def gradients(step: int) -> list[np.ndarray]:
    return [normal(shape, 10 * step + i) for i, shape in enumerate(SHAPES.values())]


def run(make: Any, every: int | None, mode: Callable[..., Any], **settings: Any) -> tuple[Any, list[Record], Any]:
    """Compressor, records and a digest of all that came out."""
    sink = Kept()
    monitor = None if every is None else Monitor(sink, every=every, all_ranks=True)
    compressor = make(monitor=monitor)
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]
    reduced = mode(gradients_of(variables, compressor, **settings))
    results = [reduced(*map(tf.constant, gradients(step))) for step in range(STEPS)]
    if monitor is not None:
        monitor.close()
        assert sink.closed
    flat = [x for result in results for x in result]
    assert_same_on_all_ranks(flat)
    return compressor, sink.records, digest([*flat, *compressor.state_dict()["arrays"].values()])


MAKERS = {
    "allgather": lambda **s: QSGDCompressor(exchange="allgather", fusion_elements=4096, **s),
    "scatter_gather": lambda **s: QSGDCompressor(exchange="scatter_gather", **s),
    "allreduce": lambda **s: QSGDCompressor(exchange="allreduce", **s),
    "topk": TopKCompressor,
    "device": lambda **s: QSGDCompressor(exchange="scatter_gather", kernels="tensorflow", **s),
}


@pytest.mark.parametrize(("name", "mode"), [(name, MODES[1]) for name in MAKERS] + [("topk", MODES[0])])
def test_watching_changes_no_bit_and_records_add_up(name: str, mode: Callable[..., Any]) -> None:
    _, _, without = run(MAKERS[name], None, mode)
    for every in (1, 3):
        compressor, records, watched = run(MAKERS[name], every, mode)
        assert np.array_equal(watched, without)
        assert [r.steps for r in records] == ([1] * STEPS if every == 1 else [3, 2])
        assert [r.step for r in records] == ([1, 2, 3, 4, 5] if every == 1 else [3, 5])
        assert {(r.rank, r.ranks) for r in records} == {(RANK, RANKS)}
        total = compressor.stats()
        for attribute in SUMS + PHASES:
            assert sum(r.stats.total(attribute) for r in records) == pytest.approx(total.total(attribute))
        for tensor in total.tensors:
            parts = [r.stats.tensors[tensor] for r in records]
            assert sum(part.wire_bytes for part in parts) == pytest.approx(total.tensors[tensor].wire_bytes)
            assert sum(part.exchanges for part in parts) == STEPS
            assert bool(parts[0].bypassed) == (tensor == "bias") != bool(parts[0].codec)
        assert total.total("encode_seconds") > 0 and total.total("decode_seconds") > 0
        # The last, shorter record of every=3 ends before a step that measures.
        errors = [r.stats.relative_error is not None for r in records]
        assert errors == ([True] * STEPS if every == 1 else [True, False])


@pytest.mark.parametrize("settings", [{}, {"groups": 2}], ids=str)
def test_errors_equal_an_independent_computation(settings: dict[str, Any]) -> None:
    """What the codec's NumPy code loses of the gradient, with the words of this rank and step."""
    make = lambda **s: QSGDCompressor(exchange="allgather", **s)  # noqa: E731
    _, records, _ = run(make, 1, MODES[1], **settings)
    assert len(records) == STEPS
    for step, record in enumerate(records):
        lost, whole = [], []
        for name, x in zip(SHAPES, gradients(step)):
            tensor = record.stats.tensors[name]
            if name == "bias":
                assert tensor.bypassed and tensor.relative_error is None and tensor.input_norm is None
                continue
            error = np.linalg.norm(x - decoded(QSGD(), x, key(name, RANK, step)))
            assert tensor.input_norm == pytest.approx(np.linalg.norm(x), rel=1e-5)
            assert tensor.lost_norm == pytest.approx(error, rel=1e-5)
            assert tensor.residual_norm is None
            lost.append(tensor.lost_norm)
            whole.append(tensor.input_norm)
        assert record.stats.relative_error == pytest.approx(math.hypot(*lost) / math.hypot(*whole))


def test_residual_norms_are_those_of_the_state() -> None:
    compressor, records, _ = run(TopKCompressor, 1, MODES[1])
    arrays = compressor.state_dict()["arrays"]
    last = records[-1].stats.tensors
    assert set(arrays) == {f"residual/{name}" for name in last if not last[name].bypassed}
    for path, array in arrays.items():
        tensor = last[path.removeprefix("residual/")]
        assert tensor.residual_norm == tensor.lost_norm == pytest.approx(float(np.linalg.norm(array)), rel=1e-5)


def test_steps_of_a_loop_inside_the_graph() -> None:
    sink = Kept()
    monitor = Monitor(sink, every=2, all_ranks=True)
    variable = tf.Variable(tf.zeros(SHAPE), name="w")
    compressor = TopKCompressor(0.1, monitor=monitor)

    @tf.function
    def train(raw: tf.Tensor) -> None:
        for _ in tf.range(5):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(variable - raw))
            (gradient,) = hvd.DistributedGradientTape(tape, compression=compressor).gradient(loss, [variable])
            variable.assign_sub(0.1 * gradient)

    train(tf.constant(normal(SHAPE)))
    monitor.close()
    assert [(r.step, r.steps) for r in sink.records] == [(2, 2), (4, 2), (5, 1)]
    assert [r.stats.tensors["w"].exchanges for r in sink.records] == [2, 2, 1]


def test_rank_0_alone_writes_files(tmp_path: Path) -> None:
    directory = Path(hvd.broadcast_object(str(tmp_path), root_rank=0, name="directory"))
    kept = Kept()
    board = [TensorBoard(directory / "board")] if RANK == 0 else []
    monitor = Monitor(kept, JsonLines(directory / "run.jsonl"), *board, every=2)
    compressor = QSGDCompressor(monitor=monitor)
    x = tf.constant(dyadic(SHAPE))
    for _ in range(4):
        hvd.allreduce(x, name="x", compression=compressor)
    monitor.close()
    hvd.allreduce(tf.zeros(1), name="written")
    assert len(kept.records) == (2 if RANK == 0 else 0)
    lines = read_records(directory / "run.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["tensors"]["x"]["payload_bytes"] > 0 and lines[0]["ranks"] == RANKS
    (events,) = (directory / "board").iterdir()
    tags = [v.tag for e in tf.compat.v1.train.summary_iterator(str(events)) for v in e.summary.value]
    assert tags.count("hvd_qsgd/ratio") == 2 and tags.count("hvd_qsgd_tensors/x/relative_error") == 2
