"""Identity and Cast: what they send is what NumPy and ml_dtypes make of the values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkers import check_config, check_same_bits, float32_arrays, gauss, hard_arrays
from hypothesis import given

from hvd_qsgd import Cast, Codec, ConfigError, Identity, PayloadError

HARD = hard_arrays()
CODECS: list[tuple[Codec, Any]] = [
    (Identity(), np.float32),
    (Cast(), np.float16),
    (Cast("bfloat16"), ml_dtypes.bfloat16),
]
EACH = pytest.mark.parametrize(("codec", "dtype"), CODECS)


def check_rounding(codec: Codec, dtype: Any, x: np.ndarray) -> None:
    """The payload holds the values in the dtype, and decoding gives exactly those."""
    with np.errstate(over="ignore"):
        sent = x.astype(dtype)
    payload = codec.encode(x)
    assert len(payload) == codec.payload_size(x.size) == sent.nbytes
    check_same_bits(np.frombuffer(payload.tobytes(), dtype).astype(np.float32), sent.astype(np.float32))
    decoded = codec.decode(payload, x.shape)
    check_same_bits(decoded, sent.astype(np.float32))
    check_same_bits(codec.encode(decoded), payload)


@EACH
@given(x=float32_arrays())
def test_values_are_rounded_to_nearest_even(codec: Codec, dtype: Any, x: np.ndarray) -> None:
    check_rounding(codec, dtype, x)


@EACH
@pytest.mark.parametrize("name", HARD)
def test_hard_values_are_rounded_to_nearest_even(codec: Codec, dtype: Any, name: str) -> None:
    check_rounding(codec, dtype, HARD[name])


@EACH
def test_halves_between_two_numbers_are_rounded_to_even(codec: Codec, dtype: Any) -> None:
    numbers = np.arange(2**15, dtype=np.uint16).view(np.float16 if dtype is np.float32 else dtype).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    middles = ((numbers[:-1].astype(np.float64) + numbers[1:]) / 2).astype(np.float32)
    for x in (middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))):
        check_rounding(codec, dtype, np.concatenate([x, -x]))


def test_rounding_check_fails_on_truncation() -> None:
    class Truncated(Cast):
        def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
            return super().encode_into((x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), out, key, first)

    with pytest.raises(AssertionError):
        check_rounding(Truncated("bfloat16"), ml_dtypes.bfloat16, gauss(100))


@EACH
def test_every_number_of_the_format_survives(codec: Codec, dtype: Any) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16 if dtype is np.float32 else dtype)
    numbers = every.astype(np.float32)
    check_same_bits(codec.decode(codec.encode(numbers), numbers.shape), numbers)


def test_every_nan_is_sent_as_one_bit_pattern() -> None:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFF0001], np.uint32).view(np.float32)
    for codec, pattern in ((Cast(), 0x7E00), (Cast("bfloat16"), 0x7FC0)):
        assert set(codec.encode(nans).view("<u2").tolist()) == {pattern}


def test_identity_sends_the_bits() -> None:
    patterns = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    np.testing.assert_array_equal(Identity().encode(patterns.view(np.float32)).view("<u4"), patterns)


@EACH
def test_config_is_a_record(codec: Codec, dtype: Any) -> None:
    check_config(codec)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype='float64' is not one of 'float16', 'bfloat16'"):
        Cast("float64")


@EACH
@pytest.mark.parametrize("wrong", [-1, 1, 4])
def test_a_payload_of_a_wrong_size_is_refused(codec: Codec, dtype: Any, wrong: int) -> None:
    with pytest.raises(PayloadError, match="payload of 5 elements has"):
        codec.decode(np.zeros(codec.payload_size(5) + wrong, np.uint8), 5)


@EACH
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 5)])
def test_any_shape_comes_back(codec: Codec, dtype: Any, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    check_same_bits(codec.decode(codec.encode(x), shape), x)


@EACH
def test_an_unknown_mode_is_refused(codec: Codec, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="mode='plus' is not one of"):
        codec.decode_into(codec.encode(np.ones(3)), np.ones(3, np.float32), "plus")
