"""Memory: what exchanges keep, and that a long run keeps no more than a short one."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import pytest
from rank_checks import make_optimizer, make_parameters, train

from hvd_qsgd.torch import Compressor, QSGDCompressor, TopKCompressor

SHAPES = {"first": (300, 400), "bias": (400,), "second": (100, 400)}


def bundles(optimizer: Any, compressor: Any) -> list[Any]:
    plan = compressor._optimizers[optimizer].bundles
    return list({id(bundle): bundle for parts in plan.values() for _, bundle in parts}.values())


@pytest.mark.parametrize("exchange", ["allgather", "scatter_gather", "allreduce"])
def test_exchanges_keep_little_and_ask_for_nothing_new(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = make_parameters(SHAPES)
    compressor = QSGDCompressor(exchange=exchange, fusion_elements=50_000)
    optimizer = make_optimizer(parameters, compressor)
    train(optimizer, parameters, range(2))
    kept = sum(a.nbytes for bundle in bundles(optimizer, compressor) for a in bundle._buffers._arrays)
    payload = compressor.stats().payload_bytes / 2 - 400 * 4
    assert payload * 0.99 < kept < 1.25 * payload

    def refuse(*_: object) -> None:
        raise AssertionError("a steady state asks for no memory")

    for bundle in bundles(optimizer, compressor):
        monkeypatch.setattr(bundle._buffers, "_make", refuse)
    train(optimizer, parameters, range(3))
    # The check can fail: a bundle without its buffers asks.
    bundle._buffers._arrays.clear()
    with pytest.raises(AssertionError, match="asks for no memory"):
        bundle._buffers.rewind()
        bundle._buffers(10, "uint8")


@pytest.mark.parametrize("compressor", [QSGDCompressor(), TopKCompressor(0.01)], ids=["qsgd", "topk"])
def test_a_thousand_steps_take_no_more_memory_than_a_hundred(compressor: Compressor) -> None:
    parameters = make_parameters({"weight": (64, 64), "bias": (64,)})
    optimizer = make_optimizer(parameters, compressor)
    train(optimizer, parameters, range(100))
    before = usage()
    train(optimizer, parameters, range(900))
    resident, objects = (after - earlier for after, earlier in zip(usage(), before))
    # One array of 16 KiB kept in each step would be 14 MiB.
    assert resident < 8 << 20
    assert objects < 900


def usage() -> tuple[int, int]:
    """Bytes of resident memory, and the number of objects that Python's collector knows."""
    gc.collect()
    return psutil.Process().memory_info().rss, len(gc.get_objects())
