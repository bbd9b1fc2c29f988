"""Kernels in TensorFlow operations, compiled by XLA, give the bytes of the NumPy code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import check_kernels, check_lanes, gauss, hard_arrays

from hvd_qsgd import QSGD, Cast, Codec, Identity, PayloadError, TopK
from hvd_qsgd.kernels import kernels_for

pytest.importorskip("tensorflow", reason="TensorFlow is not installed in this environment")

from hvd_qsgd.kernels.tensorflow.array import Array

#: In TensorFlow's threads the processor takes smaller numbers for zero.
SMALLEST_SCALE = 2.0**-100
HARD = {
    name: x
    for name, x in hard_arrays().items()
    if not np.any((x != 0) & (np.abs(x) < np.finfo(np.float32).tiny))
    and not (0 < np.max(np.abs(x), initial=0.0) < SMALLEST_SCALE)
}
KEY = 0x0123456789ABCDEF
CODECS: list[Codec] = [
    *(QSGD(bits) for bits in (2, 3, 5, 7, 8)),
    QSGD(5, norm="l2"),
    QSGD(2, norm="l2", rounding="nearest"),
    QSGD(3, bucket_size=8),
    TopK(ratio=0.3, values="float16"),
    TopK(k=1),
    Identity(),
    Cast(),
    Cast("bfloat16"),
]


class Mirrored(Array):
    """An array that writes into an array of NumPy's whatever is written into it, for the checkers to see."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array.copy())
        self._array = array

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, Mirrored):
            found._array = self._array[key]
        return found

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._array[...] = np.asarray(self)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("codec", [QSGD(), TopK(0.1)], ids=str)
def test_hard_arrays(codec: Codec, name: str) -> None:
    check_kernels(codec, kernels_for(codec, "tensorflow"), HARD[name], KEY, wrap=Mirrored)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codecs_and_positions(codec: Codec) -> None:
    kernels = kernels_for(codec, "tensorflow")
    for seed, key in enumerate((0, 2**64 - 1, KEY)):
        x = gauss(3 * 512 + 17, seed)
        x[700:710] = (0, -0.0, 1e-3, -1e-3, 1e20, -7, 1, 1, np.nan if seed else 2, 3)
        check_kernels(codec, kernels, x, key, first=512 * codec.granularity * seed)


@pytest.mark.parametrize("codec", [QSGD(), QSGD(3, norm="l2"), QSGD(2, rounding="nearest"), QSGD(8, 64)], ids=str)
@pytest.mark.parametrize("ranks", [1, 3, 1000])
def test_lanes(codec: QSGD, ranks: int) -> None:
    x = gauss(2 * 512 + 37, ranks)
    x[600:610] = (0, -0.0, 1e-3, -1e-3, 1e20, -7, 1, 1, np.nan if ranks == 3 else 2, 3)
    check_lanes(codec, kernels_for(codec, "tensorflow"), x, ranks, KEY, wrap=Mirrored)


def test_the_words_of_a_late_position() -> None:
    """Sums of key and position beyond 2^32."""
    codec = QSGD()
    check_kernels(codec, kernels_for(codec, "tensorflow"), gauss(1024), 0xFFFFFFFF, first=512 * (2**24 - 1))


def test_one_flipped_bit_is_found() -> None:
    codec = QSGD()

    class Wrong(type(kernels_for(codec, "tensorflow"))):  # type: ignore[misc]
        def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
            size = super().encode_into(x, out, key, first)
            out[size - 1] ^= 1
            return int(size)

    for wrap in (lambda array: array, Mirrored):
        with pytest.raises(AssertionError):
            check_kernels(codec, Wrong(codec), gauss(100), wrap=wrap)


@pytest.mark.parametrize("codec", [QSGD(), TopK(), Identity(), Cast()], ids=str)
def test_payloads_of_another_length(codec: Codec) -> None:
    payload = codec.encode(gauss(100))
    with pytest.raises(PayloadError):
        kernels_for(codec, "tensorflow").decode_into(payload[:-1], np.zeros(100, np.float32))


def test_arrays_are_written_like_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    expected = np.zeros(20, np.float32)
    array = Array.empty(20, "float32")
    for _ in range(50):
        low, high = sorted(int(i) for i in generator.integers(0, 21, 2))
        values = generator.standard_normal(high - low).astype(np.float32)
        for target in (expected, array):
            part = target[low:high]
            part += values
            part[: len(part) // 2] *= 2
            part[...] = part - 0.5
            target[generator.bit_generator.state["state"]["state"] % 20] = 1.5
        np.testing.assert_array_equal(np.asarray(array), expected)
    assert len(array) == array.size == 20 and list(array[3:5]) == list(expected[3:5])
    positions = np.array([1, 7])
    array[positions] = array[positions] / 2
    expected[positions] /= 2
    np.testing.assert_array_equal(array.copy(), expected)
    assert array.tobytes() == expected.tobytes() and array.norm() == pytest.approx(np.linalg.norm(expected))
    with pytest.raises(ValueError, match="3 values do not fit into 2"):
        array[:2] = np.zeros(3, np.float32)
    assert len(Array.empty(0, "uint8").tensor) == len(array[4:4].tensor) == 0
