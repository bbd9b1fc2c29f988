"""QSGD, as its NumPy code specifies it: sizes, errors, statistics and every edge case."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkers import (
    FLT_MAX,
    SMALLEST,
    check_config,
    check_normal,
    check_same_bits,
    float32_arrays,
    gauss,
    hard_arrays,
    qsgd_codecs,
)
from hypothesis import given
from hypothesis import strategies as st

from hvd_qsgd import QSGD, ConfigError, PayloadError, UnsupportedError, codec_from_config
from hvd_qsgd.codecs.bits import pack_planes, pack_stream, plane_widths, planes_size, unpack_planes, unpack_stream
from hvd_qsgd.codecs.random_words import key_of, stream_of

HARD = hard_arrays()
BITS = range(2, 9)


def keys(count: int) -> list[int]:
    return [key_of(stream_of(0, 0, "test"), step) for step in range(count)]


def bucket_scales(codec: QSGD, x: np.ndarray) -> np.ndarray:
    """The scale of every element in float64, computed another way than the codec does."""
    scales = []
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, x.size, codec.bucket_size):
            bucket = x[start : start + codec.bucket_size].astype(np.float64)
            scale = np.abs(bucket).max() if codec.norm == "max" else math.sqrt(math.fsum(bucket**2))
            scales += [float(np.float32(scale))] * bucket.size
    return np.array(scales)


# -- configuration and sizes --------------------------------------------------------------------


@given(codec=qsgd_codecs())
def test_config_is_a_record(codec: QSGD) -> None:
    check_config(codec)


def test_defaults_are_those_of_the_documentation() -> None:
    assert QSGD().config() == {
        "codec": "qsgd",
        "bits": 4,
        "bucket_size": 512,
        "norm": "max",
        "rounding": "stochastic",
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bits": 1}, r"bits=1 must be a whole number from 2 to 8"),
        ({"bits": 9}, r"bits=9 "),
        ({"bits": 4.0}, r"bits=4\.0 "),
        ({"bits": True}, r"bits=True "),
        ({"bits": "4"}, r"bits='4' "),
        ({"bucket_size": 0}, r"bucket_size=0 must be a whole number from 8 to 65536"),
        ({"bucket_size": 65544}, r"bucket_size=65544 "),
        ({"bucket_size": 500}, r"use 496 or 504"),
        ({"norm": "L2"}, r"norm='L2' is not one of 'max', 'l2'"),
        ({"rounding": None}, r"rounding=None is not one of 'stochastic', 'nearest'"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QSGD(**setting)


@pytest.mark.parametrize("config", [{}, {"codec": "QSGD"}, {"codec": "qsgd", "bit": 4}, {"codec": "qsgd", "bits": 99}])
def test_a_wrong_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        codec_from_config(config)


def test_numpy_integers_make_a_configuration_that_survives_json() -> None:
    check_config(QSGD(bits=np.int64(4)))


@given(codec=qsgd_codecs(), length=st.integers(0, 300))
def test_payload_size_is_scales_and_whole_bytes_of_every_plane(codec: QSGD, length: int) -> None:
    expected = 0
    for start in range(0, length, codec.bucket_size):
        elements = min(codec.bucket_size, length - start)
        # One plane for each binary digit of b; every plane starts at a byte.
        planes = [math.ceil(elements * 2**digit / 8) for digit in range(4) if codec.bits >> digit & 1]
        expected += 4 + sum(planes)
    assert codec.payload_size(length) == expected
    assert len(codec.encode(np.zeros(length))) == expected


@pytest.mark.parametrize("bits", BITS)
def test_whole_buckets_take_exactly_bits_and_a_scale(bits: int) -> None:
    assert QSGD(bits=bits).payload_size(512 * 10) * 8 == 5120 * bits + 10 * 32
    # A size that divides evenly has no bucket of padding.
    assert QSGD(bits=bits).buckets(512) == 1
    assert QSGD(bits=bits).buckets(0) == 0


@given(bits=st.integers(1, 8), rows=st.integers(0, 3), length=st.integers(0, 70), seed=st.integers(0, 99))
def test_planes_give_back_what_was_packed(bits: int, rows: int, length: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, length), dtype=np.uint8)
    packed = np.full((rows, planes_size(length, bits)), 0xEE, np.uint8)
    pack_planes(codes, bits, packed)
    np.testing.assert_array_equal(unpack_planes(packed, length, bits), codes)
    # What is not a code is zero.
    assert np.unpackbits(packed).sum() == np.unpackbits(codes).sum()
    assert sum(plane_widths(bits)) == bits


@given(width=st.integers(0, 32), seed=st.integers(0, 99), count=st.integers(0, 40))
def test_streams_give_back_what_was_packed(width: int, seed: int, count: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width, count)
    packed = pack_stream(values, width)
    assert len(packed) == math.ceil(count * width / 8)
    assert int.from_bytes(packed.tobytes(), "little") == sum(int(v) << (i * width) for i, v in enumerate(values))
    np.testing.assert_array_equal(unpack_stream(packed, count, width), values)


# -- errors ---------------------------------------------------------------------------------------


def check_error(codec: QSGD, x: np.ndarray, key: int = 0, slack: float = 2.0**-15) -> None:
    """No element is further from its decoded value than the codec promises; ``slack`` is in levels."""
    decoded = codec.decode(codec.encode(x, key), x.shape)
    scales = bucket_scales(codec, x)
    finite = np.isfinite(scales)
    np.testing.assert_array_equal(np.isnan(decoded), ~finite)
    levels = 1.0 if codec.rounding == "stochastic" else 0.5
    error = np.abs(decoded[finite].astype(np.float64) - x[finite])
    # Subnormal numbers have no finer steps than the smallest one.
    assert (error <= (levels + slack) * scales[finite] / codec.levels + SMALLEST).all()
    assert not decoded[scales == 0].any()


@given(codec=qsgd_codecs(), x=float32_arrays(), key=st.integers(0, 2**64 - 1))
def test_error_is_at_most_a_level_or_half_a_level(codec: QSGD, x: np.ndarray, key: int) -> None:
    check_error(codec, x, key)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_error_bound_holds_on_hard_data(name: str, bits: int, norm: str, rounding: str) -> None:
    check_error(QSGD(bits=bits, norm=norm, rounding=rounding), HARD[name])


def test_error_check_fails_on_one_wrong_code() -> None:
    class OneWrongCode(QSGD):
        def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
            size = super().encode_into(x, out, key, first)
            out[size - 1] ^= 0x20
            return size

    check_error(QSGD(), gauss(512))
    with pytest.raises(AssertionError):
        check_error(OneWrongCode(), gauss(512))


@pytest.mark.parametrize("bits", BITS)
def test_nearest_rounding_errs_by_half_a_level_and_2_to_the_minus_15(bits: int) -> None:
    rng = np.random.default_rng(0)
    codec = QSGD(bits=bits, bucket_size=65536, rounding="nearest")
    for _ in range(8):
        # Around the middle between two levels, where rounding errors decide.
        middles = rng.integers(-codec.levels, codec.levels, 65536) + 0.5 + rng.integers(-6, 7, 65536) * 2.0**-17
        largest = np.float32(rng.uniform(1, 2))
        x = (middles / codec.levels * largest).astype(np.float32)
        x[0] = largest
        check_error(codec, x, slack=2.0**-15)


@given(x=float32_arrays(), bits=st.integers(2, 8))
def test_max_scale_is_exact_and_the_largest_value_comes_back(x: np.ndarray, bits: int) -> None:
    codec = QSGD(bits=bits, bucket_size=16)
    decoded = codec.decode(codec.encode(x), x.shape)
    for start in range(0, x.size, 16):
        bucket, got = x[start : start + 16], decoded[start : start + 16]
        if np.isfinite(bucket).all():
            largest = np.abs(bucket).max()
            assert np.abs(got).max() == largest
            check_same_bits(got[np.abs(bucket) == largest], bucket[np.abs(bucket) == largest] + np.float32(0))


@given(x=float32_arrays(200), bucket_size=st.sampled_from([8, 24, 64, 200]))
def test_l2_scale_is_the_norm_within_one_ulp(x: np.ndarray, bucket_size: int) -> None:
    codec = QSGD(bucket_size=bucket_size, norm="l2")
    scales = codec.scales(x)
    expected = bucket_scales(codec, x)[::bucket_size]
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(scales), ~finite)
    with np.errstate(over="ignore"):
        ulps = np.spacing(expected[finite].astype(np.float32))
    assert (np.abs(scales[finite] - expected[finite]) <= ulps).all()


@pytest.mark.parametrize("bits", BITS)
def test_values_on_levels_are_kept_whatever_the_key(bits: int) -> None:
    codec = QSGD(bits=bits)
    x = np.arange(-codec.levels, codec.levels + 1, dtype=np.float32)
    for key in keys(20):
        np.testing.assert_allclose(codec.decode(codec.encode(x, key), x.shape), x, rtol=2e-7)


@pytest.mark.parametrize("bits", BITS)
def test_no_mantissa_takes_the_largest_value_past_the_largest_level(bits: int) -> None:
    """Why levels need no clipping: with all its roundings, a value of the size of the scale is exactly at level s."""
    largest = np.float32(QSGD(bits=bits).levels << 16)
    for start in range(0, 2**23, 2**20):
        scales = (np.uint32(0x3F800000 + start) + np.arange(2**20, dtype=np.uint32)).view(np.float32)
        assert (np.rint(largest / scales * scales) == largest).all()


@given(bits=st.integers(2, 8), seed=st.integers(0, 99), length=st.integers(1, 100))
def test_nearest_rounding_of_a_decoded_gradient_changes_nothing(bits: int, seed: int, length: int) -> None:
    codec = QSGD(bits=bits, bucket_size=16, rounding="nearest")
    payload = codec.encode(gauss(length, seed))
    check_same_bits(codec.encode(codec.decode(payload, length)), payload)


def test_nearest_rounding_ignores_the_key_and_ties_go_up() -> None:
    codec = QSGD(bits=3, rounding="nearest")
    x = np.array([3, 0.5, -0.5, 1.5, -1.5, 0, -3], np.float32)
    np.testing.assert_array_equal(codec.decode(codec.encode(x, 5), 7), np.array([3, 1, 0, 2, -1, 0, -3], np.float32))
    check_same_bits(codec.encode(x, 5), codec.encode(x, 6))


# -- statistics -------------------------------------------------------------------------------------


def check_unbiased(codec: QSGD, x: np.ndarray, copies: int = 256, draws: int = 40) -> None:
    """The mean error of one bucket over many draws is nought: of all elements, away from zero, and of each.

    ``copies`` buckets side by side are as good as as many keys; several keys are drawn as well.
    """
    tiled = np.tile(x, copies)
    level = bucket_scales(codec, x)[0] / codec.levels
    errors = np.concatenate(
        [
            (codec.decode(codec.encode(tiled, key), tiled.shape) - tiled).reshape(copies, -1) / level
            for key in keys(draws)
        ]
    ).astype(np.float64)
    count = len(errors)
    fractions = np.abs(x.astype(np.float64)) / level % 1
    variances = fractions * (1 - fractions)
    moving = variances > 1e-3
    deviation = math.sqrt(variances[moving].sum() * count)
    check_normal(float(errors[:, moving].sum()) / deviation, "mean error")
    check_normal(float((errors * np.sign(x))[:, moving].sum()) / deviation, "mean error away from zero")
    scores = errors[:, moving].sum(axis=0) / np.sqrt(variances[moving] * count)
    freedom = int(moving.sum())
    check_normal(float((scores**2).sum() - freedom) / math.sqrt(2 * freedom), "errors of single elements")
    # Neither more variance in one element than it needs, nor elements that are rounded together.
    spread = float((errors[:, moving].sum(axis=1) ** 2).mean() / variances[moving].sum())
    check_normal((spread - 1) / math.sqrt(2 / count), "variance of the sum over a bucket")


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", [1, 2.0**-120, 1e30])
def test_stochastic_rounding_is_unbiased(norm: str, bits: int, scale: float) -> None:
    check_unbiased(QSGD(bits=bits, bucket_size=64, norm=norm), gauss(64, bits) * np.float32(scale))


class EveryFraction(QSGD):
    """Draws each of the 2^16 random numbers once."""

    def _fractions(self, shape: tuple[int, ...], key: int, bucket: int) -> np.ndarray:
        return np.arange(2**16, dtype=np.int32)[None, :]


@given(bits=st.integers(2, 8), value=st.floats(-1, 1, width=32), scale=st.floats(1, 2, width=32))
def test_bias_is_at_most_2_to_the_minus_17_and_float32_rounding(bits: int, value: float, scale: float) -> None:
    codec = EveryFraction(bits=bits, bucket_size=2**16)
    rows = np.full((1, 2**16), value, np.float32)
    levels = codec._levels(rows, np.array([scale], np.float32), 0, 0)
    bias = float(levels.mean()) - value * codec.levels / scale
    assert abs(bias) <= 2.0**-17 + 2 * codec.levels * 2.0**-24


class Shifted(QSGD):
    """Rounds up too often by one level in a hundred."""

    def _fractions(self, shape: tuple[int, ...], key: int, bucket: int) -> np.ndarray:
        return super()._fractions(shape, key, bucket) + np.int32(655)


class Shrunk(QSGD):
    """Rounds towards zero too often by one level in a hundred."""

    def _levels(self, rows: np.ndarray, scales: np.ndarray, key: int, bucket: int) -> np.ndarray:
        step = scales[:, None] / np.float32(self.levels)
        return super()._levels(rows - np.sign(rows) * step * np.float32(0.01), scales, key, bucket)


class SameWordForAll(QSGD):
    """Unbiased in each element, but all elements of a bucket are rounded by one random number."""

    def _fractions(self, shape: tuple[int, ...], key: int, bucket: int) -> np.ndarray:
        return np.repeat(super()._fractions(shape, key, bucket)[:, :1], shape[1], axis=1)


@pytest.mark.parametrize("codec", [Shifted, Shrunk, SameWordForAll, QSGD])
def test_unbiasedness_check_catches_a_hundredth_of_a_level(codec: type[QSGD]) -> None:
    rounding = "nearest" if codec is QSGD else "stochastic"
    with pytest.raises(AssertionError, match="standard deviations"):
        check_unbiased(codec(bucket_size=64, rounding=rounding), gauss(64, 4))


def mean_squared_error(codec: QSGD, x: np.ndarray, draws: int) -> tuple[float, float]:
    """Mean over draws of the squared error, and of the share of zeros."""
    decoded = [codec.decode(codec.encode(x, key), x.shape) for key in keys(draws)]
    squares = [float(((d.astype(np.float64) - x) ** 2).sum()) for d in decoded]
    return float(np.mean(squares)), float(np.mean([1 - np.count_nonzero(d) / x.size for d in decoded]))


SHAPES = {
    "gauss": gauss(4096, 1),
    "laplace": np.random.default_rng(1).laplace(size=4096).astype(np.float32),
    "equal": np.full(4096, 0.7, np.float32),
    "one large": np.concatenate([[50], gauss(4095, 2)]).astype(np.float32),
    "sparse": np.where(np.arange(4096) % 64 == 5, gauss(4096, 3), 0).astype(np.float32),
}


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bucket_size", [64, 512, 4096])
def test_variance_with_l2_norm_is_within_lemma_3_1(data: str, bits: int, bucket_size: int) -> None:
    codec = QSGD(bits=bits, bucket_size=bucket_size, norm="l2")
    x = SHAPES[data]
    bound = min(bucket_size / codec.levels**2, math.sqrt(bucket_size) / codec.levels)
    assert codec.variance_bound() == pytest.approx(bound)
    error, zeros = mean_squared_error(codec, x, 20)
    assert error <= bound * float((x.astype(np.float64) ** 2).sum())
    # (iii): at most s (s + sqrt(d)) of d values are sent as something else than zero.
    assert (1 - zeros) * bucket_size <= codec.levels * (codec.levels + math.sqrt(bucket_size))


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_variance_with_max_norm_is_at_most_a_quarter_of_a_squared_level(data: str, bits: int) -> None:
    codec = QSGD(bits=bits, bucket_size=512)
    x = SHAPES[data]
    error, _ = mean_squared_error(codec, x, 20)
    assert error <= float((bucket_scales(codec, x) ** 2).sum()) / (4 * codec.levels**2)


@pytest.mark.parametrize("bits", BITS)
def test_variance_bound_of_max_norm_is_reached_between_levels(bits: int) -> None:
    codec = QSGD(bits=bits)
    x = np.full(512, 0.5, np.float32)
    x[0] = codec.levels
    error, _ = mean_squared_error(codec, x, 50)
    assert error == pytest.approx(511 / 4, rel=1e-3)


# Relative variance E||Q(v)-v||^2 / ||v||^2 and share of zeros, measured by an independent program.
MEASURED = [
    ("gauss", 64, 2, 5.55, 0.90, 1.05, 0.68),
    ("gauss", 128, 2, 7.94, 0.93, 1.28, 0.71),
    ("gauss", 512, 4, 1.59, 0.75, 0.0385, 0.19),
    ("gauss", 512, 8, 0.0052, 0.07, 0.0001, 0.01),
    ("gauss", 8192, 4, 9.36, 0.94, 0.0548, 0.22),
    ("laplace", 512, 4, 1.32, 0.79, 0.0792, 0.36),
    ("laplace", 128, 2, 6.86, 0.94, 1.61, 0.82),
]


@pytest.mark.parametrize(("data", "bucket_size", "bits", "l2", "l2_zeros", "largest", "largest_zeros"), MEASURED)
def test_relative_variance_is_what_was_measured(
    data: str, bucket_size: int, bits: int, l2: float, l2_zeros: float, largest: float, largest_zeros: float
) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal if data == "gauss" else rng.laplace)(size=256 * bucket_size).astype(np.float32)
    square = float((x.astype(np.float64) ** 2).sum()) / 256
    for norm, variance, zeros in (("l2", l2, l2_zeros), ("max", largest, largest_zeros)):
        codec = QSGD(bits=bits, bucket_size=bucket_size, norm=norm)
        decoded = codec.decode(codec.encode(x, 1), x.shape).reshape(256, -1)
        errors = ((decoded.astype(np.float64) - x.reshape(256, -1)) ** 2).sum(axis=1) / square
        shares = 1 - np.count_nonzero(decoded, axis=1) / bucket_size
        # Theirs is the mean of 64 buckets, ours of 256, and they printed so many digits.
        for made, printed, digits in ((errors, variance, 5e-3 if variance > 1 else 5e-5), (shares, zeros, 5e-3)):
            deviation = float(made.std()) * (1 / 64 + 1 / 256) ** 0.5
            assert abs(float(made.mean()) - printed) <= 4 * deviation + digits, norm
            # So few that a wrong number would be seen.
            assert 4 * deviation <= 0.25 * printed + digits


# -- edge cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["max", "l2"])
def test_a_zero_bucket_has_scale_zero_and_decodes_to_zeros(norm: str) -> None:
    codec = QSGD(norm=norm)
    for x in (np.zeros(512, np.float32), np.zeros(513, np.float32), -np.zeros(5, np.float32)):
        payload = codec.encode(x)
        assert not payload[: 4 * codec.buckets(x.size)].any()
        check_same_bits(codec.decode(payload, x.shape), np.zeros_like(x))


@given(
    codec=qsgd_codecs(bucket_size=16), position=st.integers(0, 52), value=st.floats(width=32), seed=st.integers(0, 9)
)
def test_a_value_touches_its_own_bucket_only(codec: QSGD, position: int, value: float, seed: int) -> None:
    """53 elements: three buckets and a tail. NaN and infinities are among the values."""
    x = gauss(53, seed)
    changed = x.copy()
    changed[position] = value
    bucket = position // 16
    before, after = (codec.decode(codec.encode(v, seed), 53) for v in (x, changed))
    others = np.arange(53) // 16 != bucket
    check_same_bits(after[others], before[others])
    # A norm may be too large for float32 although the value is not.
    assert np.isnan(after[~others]).all() == (not math.isfinite(bucket_scales(codec, changed)[position]))


def test_a_tail_is_encoded_as_if_it_were_alone() -> None:
    for norm in ("max", "l2"):
        codec = QSGD(norm=norm, rounding="nearest")
        tail = gauss(7, 1) * np.float32(1e-3)
        payload = codec.encode(np.concatenate([gauss(1024), tail]))
        alone = codec.encode(tail)
        check_same_bits(payload[8:12], alone[:4])
        check_same_bits(payload[-4:], alone[4:])


def test_numbers_of_every_magnitude_survive() -> None:
    codec = QSGD(bits=8)
    for value in (SMALLEST, np.float32(2.0**-126), np.float32(2.0**-100), np.float32(1), FLT_MAX):
        x = np.array([value, -value, 0, -0.0], np.float32)
        check_same_bits(codec.decode(codec.encode(x), 4), np.array([value, -value, 0, 0], np.float32))


def test_finite_values_whose_norm_float32_cannot_hold_decode_to_nan() -> None:
    x = np.full(4, FLT_MAX)
    assert np.isnan(QSGD(norm="l2").decode(QSGD(norm="l2").encode(x), 4)).all()
    check_same_bits(QSGD().decode(QSGD().encode(x), 4), x)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (2, 0, 3), (3, 5, 7)])
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    codec = QSGD(rounding="nearest")
    x = gauss(math.prod(shape), 1).reshape(shape)
    decoded = codec.decode(codec.encode(x), shape)
    assert (decoded.shape, decoded.dtype) == (shape, np.float32)
    check_same_bits(decoded.reshape(-1), codec.decode(codec.encode(x.reshape(-1)), x.size))


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.longdouble, np.int8, np.uint16, np.int64]
)
def test_any_real_dtype_is_encoded_like_its_float32_values(dtype: Any) -> None:
    x = (gauss(600, 2) * 10).astype(np.int8 if np.issubdtype(dtype, np.unsignedinteger) else np.float32)
    x = np.abs(x).astype(dtype)
    check_same_bits(QSGD().encode(x, 1), QSGD().encode(x.astype(np.float32), 1))


def test_float64_values_that_float32_cannot_hold_count_as_infinite() -> None:
    x = np.ones(1000)
    x[600] = 1e300
    decoded = QSGD().decode(QSGD().encode(x), 1000)
    assert np.isnan(decoded[512:]).all()
    assert (decoded[:512] == 1).all()


def test_arrays_that_are_not_contiguous_are_encoded_in_c_order() -> None:
    x = gauss(60 * 70, 3).reshape(60, 70)
    for view in (x.T, x[::2, ::3], x[::-1], np.asfortranarray(x), np.broadcast_to(x[0], (5, 70))):
        check_same_bits(QSGD().encode(view, 9), QSGD().encode(view.copy(order="C"), 9))
    swapped = x.astype(">f4")
    check_same_bits(QSGD().encode(swapped, 9), QSGD().encode(x, 9))


@pytest.mark.parametrize("x", [np.ones(3, complex), np.array(["1"]), np.array([None]), np.ones(2, "M8[s]"), [b"1"]])
def test_what_is_not_a_real_number_is_refused(x: Any) -> None:
    with pytest.raises(ConfigError, match="only real numbers"):
        QSGD().encode(x)


@pytest.mark.parametrize("x", [np.ones(3, bool), np.ones(3, [("field", "f4")])])
def test_what_is_not_a_number_is_refused(x: np.ndarray) -> None:
    with pytest.raises(ConfigError):
        QSGD().encode(x)


@given(codec=qsgd_codecs(), seed=st.integers(0, 99), cut=st.integers(0, 5), length=st.integers(0, 200))
def test_a_tensor_encoded_in_parts_has_the_codes_of_the_whole(codec: QSGD, seed: int, cut: int, length: int) -> None:
    x = gauss(length, seed)
    at = min(cut * codec.bucket_size, length // codec.bucket_size * codec.bucket_size)
    start = 3 * codec.bucket_size
    whole = np.empty(codec.payload_size(length), np.uint8)
    codec.encode_into(x, whole, seed, start)
    decoded = codec.decode(whole, length)
    for low, high in ((0, at), (at, length)):
        part = np.empty(codec.payload_size(high - low), np.uint8)
        codec.encode_into(x[low:high], part, seed, start + low)
        check_same_bits(codec.decode(part, high - low), decoded[low:high])


def test_the_key_and_the_place_decide_how_values_are_rounded() -> None:
    x = gauss(512)
    payloads = {QSGD().encode(x, key).tobytes() for key in keys(5)}
    out = np.empty(QSGD().payload_size(512), np.uint8)
    for first in (512, 1024):
        QSGD().encode_into(x, out, keys(1)[0], first)
        payloads.add(out.tobytes())
    assert len(payloads) == 7
    check_same_bits(QSGD().encode(x, 3), QSGD().encode(x, 3))


@given(codec=qsgd_codecs(), length=st.integers(0, 100), wrong=st.integers(-9, 9).filter(bool))
def test_a_payload_of_a_wrong_size_is_refused(codec: QSGD, length: int, wrong: int) -> None:
    size = codec.payload_size(length) + wrong
    with pytest.raises(PayloadError, match=r"bytes, but \d+ came\. Decode with the configuration"):
        codec.decode(np.zeros(max(size, 0) if size >= 0 else codec.payload_size(length) + 1, np.uint8), length)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode='plus' is not one of"):
        QSGD().decode_into(QSGD().encode(np.ones(3)), np.ones(3, np.float32), "plus")


def test_lane_width_is_the_smallest_that_holds_the_sum() -> None:
    for bits in BITS:
        codec = QSGD(bits=bits)
        for ranks in (*range(1, 70), 255, 256, 1023, 1024, 10**6):
            width = codec.lane_width(ranks)
            assert ranks * 2 * codec.levels < 2**width
            assert ranks * 2 * codec.levels >= 2 ** (width - 1)
            for length in (0, 1, 31, 32, 33, 1000):
                buckets = [512] * (length // 512) + [length % 512]
                words = sum(math.ceil(bucket / (32 // width)) for bucket in buckets)
                assert codec.lanes_length(length, ranks) == words
    with pytest.raises(UnsupportedError, match="Use fewer bits or the scatter_gather exchange"):
        QSGD(bits=8).lane_width(2**25)
