"""EliasQSGD: the code itself, its length against the paper's bounds, and what damage does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from checkers import check_config, check_same_bits, flip_bit, gauss
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qsgd import QSGD, ConfigError, EliasQSGD, PayloadError
from hvd_qsgd.codecs.elias import FIXED_WIDTH, omega_codes, pack_levels, unpack_levels
from hvd_qsgd.kernels import kernels_for


def omega(value: int) -> str:
    """Elias omega code by its definition."""
    code = "0"
    while value > 1:
        binary = f"{value:b}"
        code = binary + code
        value = len(binary) - 1
    return code


def bits_of(codec: EliasQSGD, x: np.ndarray, key: int) -> int:
    """The paper's count: 32 bits of norm and the code; the count of levels is ours."""
    return 8 * (len(codec.encode(x, key)) - 4)


def test_omega_codes_have_the_published_lengths() -> None:
    _, lengths = omega_codes(np.arange(1, 17))
    assert lengths.tolist() == [1, 3, 3, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 11]


@given(st.lists(st.integers(1, 2**32 - 1), max_size=20))
def test_omega_codes_are_those_of_the_definition(values: list[int]) -> None:
    codes, lengths = omega_codes(np.array(values, np.uint64))
    assert [f"{int(code):0{int(length)}b}" for code, length in zip(codes, lengths)] == [omega(v) for v in values]


def test_levels_are_distance_sign_and_magnitude() -> None:
    packed, count = pack_levels(np.array([0, 0, 3, 0, -1]))
    expected = omega(3) + "0" + omega(3) + omega(2) + "1" + omega(1)
    assert count == 2
    assert "".join(map(str, np.unpackbits(packed, bitorder="little")[: len(expected)])) == expected


@pytest.mark.parametrize(
    ("length", "bits", "seed"), [(4096, 2, 0), (65536, 2, 1), (3969, 7, 2), (16129, 8, 3), (512, 4, 4), (8192, 4, 5)]
)
def test_expected_length_is_below_the_bound_of_theorem_3_2(length: int, bits: int, seed: int) -> None:
    codec, x = EliasQSGD(bits, 65536), gauss(length, seed)
    s = codec.quantizer.levels
    root = length**0.5
    bound = (3 + 1.5 * np.log2(2 * (s * s + length) / (s * (s + root)))) * s * (s + root) + 32
    mean = np.mean([bits_of(codec, x, key) for key in range(10)])
    assert mean <= bound


@pytest.mark.parametrize("length", [3969, 16129])
@pytest.mark.parametrize("laplace", [False, True])
def test_with_root_n_levels_a_value_takes_at_most_2_8_bits(length: int, laplace: bool) -> None:
    """Corollary 3.3. Both lengths are squares of a number of levels."""
    codec = EliasQSGD({3969: 7, 16129: 8}[length], 65536)
    assert codec.quantizer.levels**2 == length
    x = np.random.default_rng(0).laplace(size=length).astype(np.float32) if laplace else gauss(length)
    mean = np.mean([bits_of(codec, x, key) for key in range(10)])
    assert 2.0 * length < mean <= 2.8 * length + 32


def test_with_one_level_about_root_n_values_are_sent() -> None:
    codec, x = EliasQSGD(2, 65536), gauss(4096)
    counts = [np.count_nonzero(codec.decode(codec.encode(x, key), x.shape)) for key in range(20)]
    assert np.mean(counts) <= 1 + 4096**0.5
    # What was measured for this project by another program: 0.169 bits a value.
    assert np.mean([bits_of(codec, x, key) for key in range(20)]) / 4096 == pytest.approx(0.169, rel=0.1)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@given(
    bits=st.integers(2, 8),
    bucket=st.sampled_from([8, 64, 512]),
    norm=st.sampled_from(["max", "l2"]),
    length=st.integers(0, 700),
    key=st.integers(0, 2**64 - 1),
)
def test_values_are_those_of_qsgd(backend: str, bits: int, bucket: int, norm: str, length: int, key: int) -> None:
    codec, plain = EliasQSGD(bits, bucket, norm), QSGD(bits, bucket, norm)
    x = gauss(length, bits)
    out, payload = np.empty(length, np.float32), np.empty(codec.payload_size(length), np.uint8)
    kernels = kernels_for(codec, backend)
    payload = payload[: kernels.encode_into(x, payload, key)]
    kernels.decode_into(payload, out)
    check_same_bits(out, plain.decode(plain.encode(x, key), x.shape))
    assert len(payload) <= 4 + plain.payload_size(length)


def test_it_saves_what_it_is_for_and_never_costs_more_than_a_word() -> None:
    x = gauss(1 << 16)
    assert len(EliasQSGD().encode(x)) < 0.45 * QSGD(norm="l2").payload_size(x.size)
    dense = EliasQSGD(8, norm="max")
    payload = dense.encode(x)
    assert len(payload) == dense.payload_size(x.size) == 4 + dense.quantizer.payload_size(x.size)
    assert np.frombuffer(payload[4 * 128 : 4 * 129].tobytes(), "<u4")[0] == FIXED_WIDTH


# -- damage -----------------------------------------------------------------------------------------


def decoded(backend: str, codec: EliasQSGD, payload: np.ndarray, length: int) -> np.ndarray | None:
    out = np.ones(length, np.float32)
    try:
        with np.errstate(all="ignore"):
            kernels_for(codec, backend).decode_into(payload.copy(), out)
    except PayloadError:
        assert (out == 1).all()
        return None
    return out


def check_damaged(codec: EliasQSGD, payload: np.ndarray, length: int) -> None:
    """Both backends refuse the payload, or decode it to the same values."""
    first, second = (decoded(backend, codec, payload, length) for backend in ("numpy", "numba"))
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        check_same_bits(second, first)


@settings(max_examples=200)
@given(payload=st.binary(max_size=60), length=st.integers(0, 60), count=st.integers(0, 70))
def test_random_bytes_are_refused_or_decoded_safely(payload: bytes, length: int, count: int) -> None:
    codec = EliasQSGD(3, 8)
    scales = np.ones(codec.quantizer.buckets(length), "<f4").view(np.uint8)
    body = np.frombuffer(payload, np.uint8)
    check_damaged(codec, np.concatenate([scales, np.array([count], "<u4").view(np.uint8), body]), length)
    check_damaged(codec, body, length)


@settings(max_examples=200)
@given(length=st.integers(1, 300), seed=st.integers(0, 99), bit=st.integers(0, 2**16))
def test_a_flipped_bit_is_refused_or_decoded_safely(length: int, seed: int, bit: int) -> None:
    payload = EliasQSGD(bucket_size=64).encode(gauss(length, seed))
    check_damaged(EliasQSGD(bucket_size=64), flip_bit(payload, bit % (8 * len(payload))), length)


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: np.append(p, np.uint8(0)), lambda p: p[:3]])
def test_a_payload_of_a_wrong_size_is_refused(change: Any) -> None:
    payload = EliasQSGD().encode(gauss(1000))
    for backend in ("numpy", "numba"):
        assert decoded(backend, EliasQSGD(), change(payload), 1000) is None
        assert decoded(backend, EliasQSGD(), payload, 1000) is not None


def test_levels_come_back() -> None:
    levels = np.random.default_rng(0).integers(-3, 4, 500)
    packed, count = pack_levels(levels)
    np.testing.assert_array_equal(unpack_levels(packed, count, 500, 3), levels)
    with pytest.raises(PayloadError):
        unpack_levels(packed, count, 500, 2)
    with pytest.raises(PayloadError):
        unpack_levels(packed, count, 499, 3)


def test_settings() -> None:
    check_config(EliasQSGD(3, 64, "max", "nearest"))
    assert json.loads(json.dumps(EliasQSGD().config()))["codec"] == "qsgd_elias"
    assert EliasQSGD(rounding="nearest").biased and not EliasQSGD().biased
    assert EliasQSGD().omega == QSGD(norm="l2").omega > 1
    for wrong in ({"bits": 9}, {"bucket_size": 12}, {"norm": "l1"}):
        with pytest.raises(ConfigError):
            EliasQSGD(**wrong)
