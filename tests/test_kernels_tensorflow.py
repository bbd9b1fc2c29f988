"""Kernels in TensorFlow operations, compiled by XLA, give the bytes of the NumPy code."""

from __future__ import annotations

import numpy as np
import pytest
from checkers import check_kernels, gauss, hard_arrays

from hvd_qsgd import QSGD, Cast, Codec, Identity, PayloadError, TopK
from hvd_qsgd.kernels import kernels_for

pytest.importorskip("tensorflow", reason="TensorFlow is not installed in this environment")

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


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("codec", [QSGD(), TopK(0.1)], ids=str)
def test_hard_arrays(codec: Codec, name: str) -> None:
    check_kernels(codec, kernels_for(codec, "tensorflow"), HARD[name], KEY)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codecs_and_positions(codec: Codec) -> None:
    kernels = kernels_for(codec, "tensorflow")
    for seed, key in enumerate((0, 2**64 - 1, KEY)):
        x = gauss(3 * 512 + 17, seed)
        x[700:710] = (0, -0.0, 1e-3, -1e-3, 1e20, -7, 1, 1, np.nan if seed else 2, 3)
        check_kernels(codec, kernels, x, key, first=512 * codec.granularity * seed)


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

    with pytest.raises(AssertionError):
        check_kernels(codec, Wrong(codec), gauss(100))


@pytest.mark.parametrize("codec", [QSGD(), TopK(), Identity(), Cast()], ids=str)
def test_payloads_of_another_length(codec: Codec) -> None:
    payload = codec.encode(gauss(100))
    with pytest.raises(PayloadError):
        kernels_for(codec, "tensorflow").decode_into(payload[:-1], np.zeros(100, np.float32))
