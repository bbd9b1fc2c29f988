"""TopK, as its NumPy code specifies it: which values are kept, where they stand, and what damage does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from checkers import (
    FLT_MAX,
    SMALLEST,
    check_config,
    check_guards,
    check_same_bits,
    flip_bit,
    float32_arrays,
    gauss,
    guarded,
    hard_arrays,
    wrapper,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qsgd import ConfigError, PayloadError, TopK
from hvd_qsgd.codecs.base import MODES
from hvd_qsgd.codecs.topk import BITMAP, GAPS, HEADER, NOT_FINITE, PLAIN
from hvd_qsgd.kernels import kernels_for

HARD = hard_arrays()
CODECS = st.one_of(
    st.builds(TopK, ratio=st.floats(0.001, 1), values=st.sampled_from(["float32", "float16"])),
    st.builds(TopK, k=st.integers(1, 100), values=st.sampled_from(["float32", "float16"])),
)


def round_trip(codec: TopK, x: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(x), x.shape)


def header(payload: np.ndarray) -> tuple[int, int, int]:
    return HEADER.unpack(payload[: HEADER.size].tobytes())


def sorted_choice(x: np.ndarray, k: int) -> np.ndarray:
    """What is kept, by sorting: the largest magnitudes, of equal ones those that stand first, no zeros."""
    order = sorted(range(x.size), key=lambda i: (-abs(float(x[i])), i))
    return np.array([i for i in sorted(order[:k]) if x[i] != 0], int)


# -- configuration and sizes --------------------------------------------------------------------


@given(codec=CODECS)
def test_config_is_a_record(codec: TopK) -> None:
    check_config(codec)


def test_k_takes_the_place_of_the_default_ratio() -> None:
    assert TopK(k=5) == TopK(ratio=0.5, k=5) != TopK(k=6)
    assert TopK().config() == {"codec": "topk", "ratio": 0.01, "k": None, "values": "float32"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ratio": 0}, r"ratio=0 must be a number above 0 and at most 1 .* or give k"),
        ({"ratio": 1.01}, r"ratio=1\.01 "),
        ({"ratio": -0.1}, r"ratio=-0\.1 "),
        ({"ratio": math.nan}, r"ratio=nan "),
        ({"ratio": None}, r"ratio=None "),
        ({"ratio": True}, r"ratio=True "),
        ({"ratio": "1%"}, r"ratio='1%' "),
        ({"k": 0}, r"k=0 must be a whole number from 1 to"),
        ({"k": 2**32}, r"k=4294967296 "),
        ({"k": 1.5}, r"k=1\.5 "),
        ({"values": "int8"}, r"values='int8' is not one of 'float32', 'float16'"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopK(**setting)


def test_numpy_integers_make_a_configuration_that_survives_json() -> None:
    check_config(TopK(k=np.int64(4)))


@pytest.mark.parametrize(
    ("codec", "length", "kept"),
    [
        (TopK(), 0, 0),
        (TopK(), 1, 1),
        (TopK(), 1000, 10),
        (TopK(ratio=0.001), 10, 1),
        (TopK(ratio=1), 10, 10),
        (TopK(ratio=0.25), 10, 2),
        (TopK(k=3), 2, 2),
        (TopK(k=2**32 - 1), 7, 7),
    ],
)
def test_number_of_values_kept(codec: TopK, length: int, kept: int) -> None:
    assert codec.kept(length) == kept
    assert header(codec.encode(np.arange(1.0, length + 1)))[2] == kept


@given(codec=CODECS, x=float32_arrays())
def test_payload_size_is_an_upper_bound(codec: TopK, x: np.ndarray) -> None:
    assert len(codec.encode(x)) <= codec.payload_size(x.size)


def bytes_of_forms(length: int, count: int) -> dict[int, int]:
    """The size of each form, from its description; of gaps the size with the best number of low bits."""
    width = math.ceil(math.log2(length)) if length > 1 else 0
    gaps = [math.ceil(count * r / 8) + math.ceil(((length - 1) // 2**r + count) / 8) for r in range(width + 1)]
    return {PLAIN: math.ceil(count * width / 8), BITMAP: math.ceil(length / 8), GAPS: min(gaps)}


@given(length=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_positions_take_the_smallest_of_three_forms(length: int, share: float, seed: int) -> None:
    count = max(1, round(share * length))
    x = gauss(length, seed)
    payload = TopK(k=count).encode(x)
    sizes = bytes_of_forms(length, count)
    assert len(payload) == HEADER.size + 4 * count + min(sizes.values())
    assert sizes[header(payload)[0]] == min(sizes.values())


@pytest.mark.parametrize(("k", "length", "form"), [(1, 1000, PLAIN), (10, 1000, GAPS), (500, 1000, BITMAP)])
def test_every_form_occurs(k: int, length: int, form: int) -> None:
    x = gauss(length)
    assert header(TopK(k=k).encode(x))[0] == form
    np.testing.assert_array_equal(np.flatnonzero(round_trip(TopK(k=k), x)), sorted_choice(x, k))


def test_one_percent_costs_about_nine_bits_a_position() -> None:
    length, count = 10**6, 10**4
    size = len(TopK().encode(gauss(length))) - HEADER.size - 4 * count
    # 2 + log2(n / k) is what Elias promises; no code of positions can be below log2 of their number of choices.
    least = (math.lgamma(length + 1) - math.lgamma(count + 1) - math.lgamma(length - count + 1)) / math.log(2)
    assert least <= size * 8 <= count * (2 + math.log2(length / count)) <= 1.1 * least


# -- which values ---------------------------------------------------------------------------------


def check_choice(codec: TopK, x: np.ndarray) -> None:
    """The decoded array holds what sorting chooses, and nothing else."""
    decoded = round_trip(codec, x)
    if not np.isfinite(x).all():
        assert np.isnan(decoded).all()
        return
    kept = sorted_choice(x, codec.kept(x.size))
    assert header(codec.encode(x))[2] == len(kept)
    expected = np.zeros_like(x)
    with np.errstate(over="ignore"):
        sent = x if codec.values == "float32" else np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    expected[kept] = sent[kept]
    # Of the decoded zeros none is negative.
    check_same_bits(decoded, expected + np.float32(0))


@given(codec=CODECS, x=float32_arrays())
def test_what_sorting_chooses_is_kept(codec: TopK, x: np.ndarray) -> None:
    check_choice(codec, x)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("codec", [TopK(), TopK(k=1), TopK(ratio=0.3, values="float16"), TopK(ratio=1), TopK(k=10**6)])
def test_what_sorting_chooses_is_kept_on_hard_data(codec: TopK, name: str) -> None:
    check_choice(codec, HARD[name])


def test_choice_check_fails_on_one_wrong_position() -> None:
    class LastOfEqual(TopK):
        def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
            return super().encode_into(np.ascontiguousarray(x[::-1]), out, key, first)

    check_choice(TopK(k=2), np.ones(3, np.float32))
    with pytest.raises(AssertionError):
        check_choice(LastOfEqual(k=2), np.array([1, 2, 3], np.float32))


@given(codec=CODECS, seed=st.integers(0, 99), length=st.integers(0, 60))
def test_of_equal_magnitudes_the_first_is_kept(codec: TopK, seed: int, length: int) -> None:
    x = np.random.default_rng(seed).integers(-2, 3, length).astype(np.float32)
    check_choice(codec, x)


def test_zeros_are_never_sent() -> None:
    x = np.array([0, -0.0, 0, 1, 0], np.float32)
    for codec in (TopK(ratio=1), TopK(k=3)):
        assert header(codec.encode(x))[2] == 1
        check_same_bits(round_trip(codec, x), np.array([0, 0, 0, 1, 0], np.float32))
    assert len(TopK(ratio=1).encode(np.zeros(1000))) == HEADER.size


def test_everything_is_kept_exactly_with_ratio_one() -> None:
    x = np.concatenate([gauss(100), [FLT_MAX, -FLT_MAX, SMALLEST, -SMALLEST]]).astype(np.float32)
    check_same_bits(round_trip(TopK(ratio=1), x), x)


def test_float16_values_saturate() -> None:
    codec = TopK(ratio=1, values="float16")
    x = np.array([1e30, -FLT_MAX, 65504, 65520, 1 / 3, 1e-8, 1e-30], np.float32)
    expected = np.array([65504, -65504, 65504, 65504, np.float16(1 / 3), np.float16(1e-8), 0], np.float32)
    check_same_bits(round_trip(codec, x), expected)
    assert len(codec.encode(x)) == len(TopK(ratio=1).encode(x)) - 2 * 7


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 500, 999])
def test_a_tensor_that_is_not_finite_decodes_to_nan_as_a_whole(value: float, position: int) -> None:
    x = gauss(1000)
    x[position] = value
    payload = TopK().encode(x)
    assert (len(payload), header(payload)[0]) == (HEADER.size, NOT_FINITE)
    assert np.isnan(TopK().decode(payload, 1000)).all()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 5, 7)])
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    x = gauss(math.prod(shape), 1).reshape(shape)
    check_same_bits(round_trip(TopK(ratio=1), x), x)


@given(codec=CODECS, x=float32_arrays())
def test_encoding_what_was_decoded_changes_nothing(codec: TopK, x: np.ndarray) -> None:
    decoded = round_trip(codec, x)
    check_same_bits(round_trip(codec, decoded), decoded)


# -- damage -----------------------------------------------------------------------------------------


def decode_guarded(backend: str, codec: TopK, payload: np.ndarray, length: int, mode: str) -> np.ndarray | None:
    """The outcome, or None for a PayloadError, which must leave the output as it was, like all that lies around it."""
    whole, out = guarded(np.ones(length, np.float32))
    try:
        with np.errstate(all="ignore"):
            kernels_for(codec, backend).decode_into(wrapper(backend)(payload.copy()), wrapper(backend)(out), mode)
    except PayloadError:
        assert (out == 1).all()
        return None
    finally:
        check_guards(whole)
    return out


def check_damaged(codec: TopK, payload: np.ndarray, length: int) -> None:
    """Every backend refuses the payload, or all decode it to the same values."""
    mode = MODES[len(payload) % 3]
    outcomes = [decode_guarded(backend, codec, payload, length, mode) for backend in ("numpy", "numba", "torch")]
    assert len({outcome is None for outcome in outcomes}) == 1
    for outcome in outcomes[1:]:
        if outcome is not None and outcomes[0] is not None:
            check_same_bits(outcome, outcomes[0])


@settings(max_examples=150)
@given(codec=CODECS, payload=st.binary(max_size=60), length=st.integers(0, 100))
def test_random_bytes_are_refused_or_decoded_safely(codec: TopK, payload: bytes, length: int) -> None:
    check_damaged(codec, np.frombuffer(payload, np.uint8), length)


@settings(max_examples=300)
@given(
    codec=CODECS,
    form=st.integers(0, 4),
    low_bits=st.integers(0, 34),
    count=st.integers(0, 20),
    length=st.integers(0, 100),
    seed=st.integers(0, 99),
    zeros=st.booleans(),
)
def test_headers_that_lie_are_refused_or_decoded_safely(
    codec: TopK, form: int, low_bits: int, count: int, length: int, seed: int, zeros: bool
) -> None:
    """The size is what the header announces, so that the body is read."""
    body = count * codec.value_bytes
    if count and form == PLAIN:
        body += math.ceil(count * low_bits / 8)
    elif count and form == BITMAP:
        body += math.ceil(length / 8)
    elif count and form == GAPS:
        body += math.ceil(count * low_bits / 8) + math.ceil((((length - 1) >> low_bits) + count) / 8)
    data = np.random.default_rng(seed).integers(0, 256, body, np.uint8) * (not zeros)
    payload = np.concatenate([np.frombuffer(HEADER.pack(form, low_bits, count), np.uint8), data.astype(np.uint8)])
    check_damaged(codec, payload, length)


@settings(max_examples=200)
@given(codec=CODECS, length=st.integers(1, 80), seed=st.integers(0, 99), bit=st.integers(0, 2**16))
def test_a_flipped_bit_is_refused_or_decoded_safely(codec: TopK, length: int, seed: int, bit: int) -> None:
    payload = codec.encode(gauss(length, seed))
    check_damaged(codec, flip_bit(payload, bit % (8 * len(payload))), length)


@given(codec=CODECS, length=st.integers(1, 80), cut=st.integers(-9, 9).filter(bool), other=st.integers(1, 5000))
def test_a_payload_that_does_not_fit_is_refused(codec: TopK, length: int, cut: int, other: int) -> None:
    payload = codec.encode(gauss(length))
    resized = np.concatenate([payload, np.zeros(9, np.uint8)])[: max(len(payload) + cut, 0)]
    with pytest.raises(PayloadError, match=r"bytes, but \d+ came"):
        codec.decode(resized, length)
    check_damaged(codec, payload, other)


def test_positions_that_are_not_ascending_or_too_large_are_refused() -> None:
    values = np.ones(2, "<f4").view(np.uint8)
    for form, low_bits, length, positions in [
        (PLAIN, 8, 200, [3, 3]),
        (PLAIN, 8, 200, [4, 3]),
        (PLAIN, 8, 200, [3, 200]),
        (BITMAP, 0, 9, [0b1, 0b11]),
        (BITMAP, 0, 9, [0, 0b10]),
        (BITMAP, 0, 9, [0b111, 0]),
        (GAPS, 3, 8, [0b001_001, 0b11]),
        (GAPS, 3, 8, [0b001_001, 0b1]),
    ]:
        head = np.frombuffer(HEADER.pack(form, low_bits, 2), np.uint8)
        payload = np.concatenate([head, values, np.array(positions, np.uint8)])
        for backend in ("numpy", "numba", "torch"):
            assert decode_guarded(backend, TopK(), payload, length, "set") is None, (backend, form, positions)
