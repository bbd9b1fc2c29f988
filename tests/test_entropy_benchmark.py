"""benchmarks/entropy.py: coders come in the order that theory says, and to the sizes that it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from checkers import gauss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import entropy

from hvd_qsgd import EliasQSGD


def test_the_entropy_is_that_of_the_definition() -> None:
    # A fair coin has one bit, four equal levels have two, and one level has none.
    assert entropy.entropy_bytes(np.array([0, 1] * 40)) == pytest.approx(10)
    assert entropy.entropy_bytes(np.array([-1, 0, 1, 2] * 20)) == pytest.approx(20)
    assert entropy.entropy_bytes(np.full(80, -1)) == 0


@pytest.mark.parametrize("largest", [1, 7, 127])
def test_the_range_coder_comes_close_to_the_entropy_and_never_below(largest: int) -> None:
    pytest.importorskip("constriction")
    levels = np.clip(np.rint(gauss(20000) * largest / 3), -largest, largest).astype(np.int32)
    bound, table = entropy.entropy_bytes(levels), 2 * (2 * largest + 1)
    assert bound < entropy.range_coded_bytes(levels, largest) - table < 1.01 * bound + 8
    for seed in range(100):
        # Whatever the largest count is, it has its place in the table.
        count = 1000 + 7 * seed
        assert entropy.range_coded_bytes(np.arange(count) // (count - 1), 1) < 6 + 20
    # Levels that never come cost next to nothing.
    assert entropy.range_coded_bytes(np.zeros(20000, np.int32), largest) - table < 40


def test_a_coder_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = pytest.importorskip("constriction").stream.queue

    class Wrong:
        def __init__(self, coded: np.ndarray) -> None:
            self.coded = coded

        def decode(self, model: object, count: int) -> np.ndarray:
            return np.zeros(count, np.int32)

    monkeypatch.setattr(queue, "RangeDecoder", Wrong)
    with pytest.raises(AssertionError, match="did not give back"):
        entropy.range_coded_bytes(np.array([1, 0]), 1)


def test_bits_a_value_of_each_coder(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [gauss(5000), gauss(512, 1)]
    codec = EliasQSGD(4, 512)
    bits = entropy.measure(tensors, codec)
    fixed = sum(codec.quantizer.payload_size(len(x)) for x in tensors)
    elias = sum(len(codec.encode(x, key)) for key, x in enumerate(tensors))
    assert bits["fixed width"] == pytest.approx(8 * fixed / 5512) and bits["Elias"] == pytest.approx(8 * elias / 5512)
    assert bits["entropy"] < bits["Elias"] < 0.5 * bits["fixed width"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = entropy.measure(tensors, codec)
    assert "range coder" not in without and without["entropy"] == bits["entropy"]
    rows = [{"task": "t", "levels": "l", "bits_a_value": {**without, "Elias": 1.6}}]
    assert "1.60 (20.0x) | not installed |" in entropy.table(rows)
