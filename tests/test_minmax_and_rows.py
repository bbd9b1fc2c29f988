"""MinMax and Rows: what they promise about errors, ends and rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import FLT_MAX, check_config, check_same_bits, flip_bit, float32_arrays, gauss, hard_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qsgd import QSGD, Cast, Codec, ConfigError, Identity, MinMax, PayloadError, Rows, TopK, codec_from_config
from hvd_qsgd.codecs.base import MODES
from hvd_qsgd.kernels import kernels_for

HARD = hard_arrays()
INNER: list[Codec] = [TopK(0.2), TopK(k=3, values="float16"), QSGD(3, 16), MinMax(4), Identity(), Cast()]


def check_half_a_step(codec: MinMax, x: np.ndarray, margin: float = 1.0) -> None:
    """No value is off by more than half a step, apart from the rounding of the result to float32."""
    y = codec.decode(codec.encode(x), x.shape)
    if not np.isfinite(x).all():
        assert np.isnan(y).all()
    elif x.size:
        low, high = np.float64(x.min()), np.float64(x.max())
        step = (high - low) / (2**codec.bits - 1)
        rounding = np.maximum(np.abs(y.astype(np.float64)) * 2.0**-24, 2.0**-150)
        y64 = y.astype(np.float64)
        assert (np.abs(y64 - x) <= margin * (step / 2) * (1 + 1e-12) + rounding).all()
        check_same_bits(y[x == low] + np.float32(0), x[x == low] + np.float32(0))


@given(bits=st.integers(2, 8), x=float32_arrays())
def test_values_are_off_by_half_a_step_at_most(bits: int, x: np.ndarray) -> None:
    check_half_a_step(MinMax(bits), x)


@pytest.mark.parametrize("name", HARD)
def test_hard_values_are_off_by_half_a_step_at_most(name: str) -> None:
    for bits in (2, 5, 8):
        check_half_a_step(MinMax(bits), HARD[name])


def test_the_check_of_half_a_step_can_fail() -> None:
    check_half_a_step(MinMax(4), gauss(1000))
    with pytest.raises(AssertionError):
        check_half_a_step(MinMax(4), gauss(1000), margin=0.9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_equally_spaced_values_survive(bits: int) -> None:
    x = np.random.default_rng(0).permutation(np.arange(2**bits)).astype(np.float32) - 3
    check_same_bits(MinMax(bits).decode(MinMax(bits).encode(x), x.shape), x)


def test_what_a_relu_has_set_to_zero_stays_zero() -> None:
    x = np.maximum(gauss(1000), 0)
    y = MinMax(2).decode(MinMax(2).encode(x), x.shape)
    assert (y[x == 0] == 0).all()
    # All four codes are in use, of which a symmetric scale would waste half.
    assert len(np.unique(y)) == 4


def test_the_range_of_all_numbers_does_not_overflow() -> None:
    x = np.array([-FLT_MAX, 0, FLT_MAX], np.float32)
    check_same_bits(MinMax(2).decode(MinMax(2).encode(x), 3)[[0, 2]], x[[0, 2]])


def test_a_payload_takes_the_bytes_that_were_promised() -> None:
    assert [MinMax(bits).payload_size(800) for bits in range(2, 9)] == [8 + 100 * bits for bits in range(2, 9)]
    assert MinMax().payload_size(0) == 8


@pytest.mark.parametrize("inner", INNER, ids=str)
def test_every_row_is_encoded_as_if_alone(inner: Codec) -> None:
    x = gauss(70).reshape(-1)
    y = Rows(inner, 30).decode(Rows(inner, 30).encode(x), x.shape)
    # The first row has the key of the whole; with nearest rounding or none, keys do not matter.
    check_same_bits(y[:30], inner.decode(inner.encode(x[:30]), 30))
    if not isinstance(inner, QSGD):
        for start in (30, 60):
            row = x[start : start + 30]
            check_same_bits(y[start : start + 30], inner.decode(inner.encode(row), row.shape))


def test_rows_draw_different_random_words() -> None:
    x = np.tile(gauss(64), 50)
    y = Rows(QSGD(2), 64).decode(Rows(QSGD(2), 64).encode(x), x.shape).reshape(50, 64)
    assert len(np.unique(y, axis=0)) > 45


def test_topk_by_row_keeps_values_of_every_row() -> None:
    x = gauss(1000).reshape(10, 100) * np.arange(10)[:, None]
    assert ((Rows(TopK(0.1), 100).decode(Rows(TopK(0.1), 100).encode(x), x.shape) != 0).sum(axis=1) == 10)[1:].all()
    assert not ((TopK(0.1).decode(TopK(0.1).encode(x), x.shape) != 0).sum(axis=1) == 10)[1:].all()


@pytest.mark.parametrize("codec", [MinMax(), MinMax(3), *(Rows(inner, 7) for inner in INNER)], ids=str)
def test_config_is_a_record(codec: Codec) -> None:
    check_config(codec)


@pytest.mark.parametrize("codec", [MinMax(3), Rows(TopK(0.5), 7)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 5)])
def test_any_shape_comes_back(codec: Codec, shape: tuple[int, ...]) -> None:
    assert codec.decode(codec.encode(np.ones(shape, np.float32)), shape).shape == shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinMax(1), "bits=1 must be a whole number from 2 to 8"),
        (lambda: MinMax(9), "from 2 to 8"),
        (lambda: Rows(TopK(), 0), "length=0 must be"),
        (lambda: Rows("topk", 3), "must be a codec"),
        (lambda: Rows(Rows(TopK(), 3), 3), "must be a codec"),
        (lambda: codec_from_config({"codec": "rows", "inner": {"codec": "none"}, "length": 3}), "Unknown codec 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@given(data=st.binary(max_size=60), length=st.integers(0, 50), inner=st.sampled_from(INNER))
def test_random_bytes_are_refused_or_decoded(data: bytes, length: int, inner: Codec) -> None:
    codec = Rows(inner, 9)
    try:
        assert codec.decode(np.frombuffer(data, np.uint8), length).shape == (length,)
    except PayloadError as error:
        assert str(error)


@settings(max_examples=300)
@given(
    inner=st.sampled_from([TopK(0.2), TopK(0.5, values="float16"), TopK(1)]),
    length=st.integers(1, 80),
    seed=st.integers(0, 99),
    bit=st.integers(0, 2**16),
    mode=st.sampled_from(MODES),
)
def test_kernels_for_all_rows_refuse_a_flipped_bit_or_read_it_as_numpy_does(
    inner: TopK, length: int, seed: int, bit: int, mode: str
) -> None:
    """With NaN in the first row, whose payload is a header."""
    codec = Rows(inner, 9)
    x = gauss(length, seed)
    x[:9:4] = np.nan
    payload = codec.encode(x)
    damaged = flip_bit(payload, bit % (8 * len(payload)))
    outcomes = []
    for backend in ("numpy", "numba"):
        out = np.ones(length, np.float32)
        try:
            kernels_for(codec, backend).decode_into(damaged, out, mode)
            outcomes.append(out.view(np.uint32).tolist())
        except PayloadError as error:
            outcomes.append(str(error)[:40])
    assert outcomes[0] == outcomes[1]


def test_kernels_for_all_rows_say_where_a_message_has_no_room() -> None:
    codec = Rows(TopK(0.5), 10)
    with pytest.raises(PayloadError, match="does not fit into a buffer of 30"):
        kernels_for(codec, "numba").encode_into(gauss(40), np.empty(30, np.uint8))
