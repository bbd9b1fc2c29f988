"""The random words: fixed values, uniform, and without traces of their keys."""

from __future__ import annotations

import numpy as np
import pytest
from checkers import check_chi_square, check_normal
from hypothesis import given
from hypothesis import strategies as st

from hvd_qsgd.codecs.random_words import key_of, stream_of, words

KEYS = [key_of(stream_of(0, 0, "w"), step) for step in range(8)]
COUNT = 1 << 18


def words_one_by_one(key: int, first: int, count: int) -> list[int]:
    """The function of docs/wire-format.md in Python's own integers."""
    result = []
    for index in range(first, first + count):
        h = (index + key) % 2**32
        h = ((h ^ (h >> 16)) * 0x21F0AAAD) % 2**32
        h = (((h ^ (h >> 15)) + (key >> 32)) * 0xD35A2D97) % 2**32
        result.append(h ^ (h >> 15))
    return result


GOLDEN_WORDS = [
    (0x0000000000000000, 0, "00000000 06d3fa73 0da7f4e7 0d6fdefa"),
    (0xFFFFFFFFFFFFFFFF, 0, "065aa4e6 2ca58b22 3379acce 3a4db68a"),
    (0x0123456789ABCDEF, 2**32 - 2, "451385d6 1fa7cbb2 1351b552 a9d09066"),
    (0xE220A8397B1DCDAF, 256, "9ef84ca8 79deba1b 0b037c12 ad7fd7b2"),
]


@pytest.mark.parametrize(("key", "first", "expected"), GOLDEN_WORDS)
def test_words_have_golden_values(key: int, first: int, expected: str) -> None:
    assert " ".join(f"{word:08x}" for word in words(key, first, 4)) == expected


def test_key_of_counts_through_splitmix64() -> None:
    # The published first outputs for the seeds 0 and 1234567.
    assert key_of(0, 0) == 0xE220A8397B1DCDAF
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [key_of(1234567, step, phase) for step in (0, 1) for phase in (0, 1)] == expected


GOLDEN_STREAMS = [
    (0, 0, "", 0x0E7494F907A55052),
    (0, 0, "w", 0x69D3E695B1F2C727),
    (1, 0, "w", 0xA8AAF6CCE15E3C8F),
    (-1, 3, "Gewicht/\N{GREEK SMALL LETTER ALPHA}", 0x99AB0ACB9F713AA9),
]


@pytest.mark.parametrize(("seed", "rank", "name", "expected"), GOLDEN_STREAMS)
def test_stream_of_has_golden_values(seed: int, rank: int, name: str, expected: int) -> None:
    assert stream_of(seed, rank, name) == expected


def test_streams_differ_by_seed_rank_and_name() -> None:
    streams = {stream_of(seed, rank, name) for seed in range(5) for rank in range(100) for name in ("a", "b", "ab")}
    assert len(streams) == 5 * 100 * 3
    assert len({key_of(7, step, phase) for step in range(1000) for phase in (0, 1)}) == 2000


@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**34), count=st.integers(0, 20))
def test_words_equal_their_definition(key: int, first: int, count: int) -> None:
    made = words(key, first, count)
    assert made.dtype == np.uint32
    assert made.tolist() == words_one_by_one(key, first, count)


@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**33), count=st.integers(0, 50), cut=st.integers(0, 50))
def test_words_do_not_depend_on_how_they_are_asked_for(key: int, first: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    parts = [words(key, first, cut), words(key, first + cut, count - cut)]
    np.testing.assert_array_equal(np.concatenate(parts), words(key, first, count))


@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**34), count=st.integers(0, 50))
def test_torch_makes_the_same_words(key: int, first: int, count: int) -> None:
    torch = pytest.importorskip("torch")
    from hvd_qsgd.kernels.torch.qsgd import words as torch_words

    made = torch_words(key, first, count, torch.device("cpu"))
    assert made.dtype == torch.int32
    np.testing.assert_array_equal(made.numpy().view(np.uint32), words(key, first, count))


def halves(key: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    drawn = words(key, first, COUNT)
    return drawn & 0xFFFF, drawn >> 16


def check_uniform(values: np.ndarray) -> None:
    """16-bit values: their upper and lower bytes are uniform, and so is each bit."""
    for shift in (0, 8):
        counts = np.bincount((values >> shift) & 0xFF, minlength=256)
        check_chi_square(counts, len(values) / 256, f"byte at bit {shift}")
    for bit in range(16):
        ones = int(((values >> bit) & 1).sum())
        check_normal((ones - len(values) / 2) / (len(values) / 4) ** 0.5, f"bit {bit}")


@pytest.mark.parametrize("key", [0, 1, 2**32, 2**64 - 1, *KEYS])
@pytest.mark.parametrize("half", [0, 1])
def test_halves_of_words_are_uniform(key: int, half: int) -> None:
    check_uniform(halves(key)[half])


def test_uniformity_check_fails_when_one_value_in_a_hundred_is_changed() -> None:
    values = halves(KEYS[0])[0].copy()
    values[::100] |= 1
    with pytest.raises(AssertionError, match="standard deviations"):
        check_uniform(values)


def test_pairs_of_neighbours_are_uniform() -> None:
    drawn = words(KEYS[0], 0, COUNT)
    for shift in (0, 8, 16, 24):
        byte = (drawn >> shift) & 0x1F
        check_chi_square(
            np.bincount(byte[:-1] * 32 + byte[1:], minlength=1024), (COUNT - 1) / 1024, f"pairs at {shift}"
        )


def check_uncorrelated(a: np.ndarray, b: np.ndarray) -> None:
    """Correlation of two sequences of 16-bit values, and of each of their bits."""
    x, y = (v / 65535 - 0.5 for v in (a, b))
    check_normal(float((x * y).sum()) / (len(x) ** 0.5 / 12), "correlation")
    for bit in (0, 7, 15):
        equal = int((((a >> bit) ^ (b >> bit)) & 1).sum())
        check_normal((equal - len(a) / 2) / (len(a) / 4) ** 0.5, f"agreement of bit {bit}")


PAIRS = {
    "the halves of one word": (halves(KEYS[0])[0], halves(KEYS[0])[1]),
    "consecutive words": (halves(KEYS[0])[0], halves(KEYS[0], 1)[0]),
    "a bucket and the next": (halves(KEYS[0])[0], halves(KEYS[0], 256)[0]),
    "consecutive steps": (halves(KEYS[0])[0], halves(KEYS[1])[0]),
    "two ranks": (halves(KEYS[0])[0], halves(key_of(stream_of(0, 1, "w"), 0))[0]),
    "two tensors": (halves(KEYS[0])[0], halves(key_of(stream_of(0, 0, "v"), 0))[0]),
    "two seeds": (halves(KEYS[0])[0], halves(key_of(stream_of(1, 0, "w"), 0))[0]),
    "both phases": (halves(KEYS[0])[0], halves(key_of(stream_of(0, 0, "w"), 0, 1))[0]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_words_are_uncorrelated(pair: str) -> None:
    check_uncorrelated(*PAIRS[pair])


def test_correlation_check_fails_when_one_value_in_fifty_is_shared() -> None:
    a, b = PAIRS["two ranks"]
    b = b.copy()
    b[::50] = a[::50]
    with pytest.raises(AssertionError, match="standard deviations"):
        check_uncorrelated(a, b)


def test_the_same_element_draws_uniformly_over_many_steps() -> None:
    stream = stream_of(0, 0, "w")
    drawn = np.concatenate([words(key_of(stream, step), 12345, 2) for step in range(20000)])
    check_chi_square(np.bincount(drawn >> 24, minlength=256), len(drawn) / 256, "upper byte over steps")
    check_chi_square(np.bincount(drawn & 0xFF, minlength=256), len(drawn) / 256, "lower byte over steps")
