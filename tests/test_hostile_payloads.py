"""Whatever bytes come, a decoder decodes them or says that they are no payload, and then it has written nothing."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from checkers import as_is, check_guards, flip_bit, gauss, guarded, make_jobs, run_exchange, wrapper

from hvd_qsgd import (
    QSGD,
    Cast,
    Codec,
    EliasQSGD,
    GlobalTopK,
    Identity,
    MinMax,
    PayloadError,
    RandomK,
    Rows,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.codecs.base import MODES, Kernels
from hvd_qsgd.kernels import kernels_for

CODECS: list[Codec] = [
    QSGD(),
    QSGD(3, 8, "l2"),
    TopK(0.1),
    TopK(0.02),
    TopK(0.6),
    TopK(0.1, values="float16"),
    GlobalTopK(0.1),
    ThresholdTopK(0.1),
    RowTopK(0.2, 24),
    RandomK(0.3),
    Identity(),
    Cast(),
    Cast("bfloat16"),
    Sign(24),
    MinMax(3),
    EliasQSGD(),
    EliasQSGD(8, 64),
    Rows(TopK(0.2), 30),
    Rows(TopK(0.2, values="float16"), 30),
    Rows(QSGD(4, 16), 30),
    Rows(RowTopK(0.3, 7), 30),
    Rows(EliasQSGD(3, 16), 30),
    Scaled(EliasQSGD()),
    Scaled(RandomK(0.2, unbiased=True)),
]
#: Some whose last row is short, some that end with it.
LENGTHS = (1, 90, 101)
IN_TENSORFLOW: list[Codec] = [QSGD(3, 8, "l2"), TopK(0.1), Identity(), Cast()]
#: Where a head or a table may have its numbers, and what a hostile one says there.
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 90, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def hostile(payload: np.ndarray, seed: int, count: int) -> Iterator[np.ndarray]:
    """Payloads that are damaged: bytes at random, cut off, too long, bits flipped, numbers in heads changed."""
    rng = np.random.default_rng(seed)
    size = len(payload)
    for number in range(count):
        changed = payload.copy()
        kind = number % 6
        if kind == 0:
            changed = rng.integers(0, 256, rng.integers(0, 2 * size + 9), np.uint8)
        elif kind == 1:
            changed = payload[: rng.integers(0, size)]
        elif kind == 2:
            changed = np.append(payload, rng.integers(0, 256, rng.integers(1, 9), np.uint8))
        elif kind == 3:
            for _ in range(rng.integers(1, 4)):
                changed = flip_bit(changed, int(rng.integers(0, 8 * size)))
        elif kind == 4:
            at, width = 4 * rng.integers(0, min(size, 40) // 4 + 1), rng.choice([1, 4])
            head = np.array([rng.choice(NUMBERS)], "<u4").view(np.uint8)[:width]
            changed[at : at + width] = head[: len(changed[at : at + width])]
        else:
            # Its size and head are right, and so it comes far.
            at = rng.integers(0, size)
            changed[at:] = rng.integers(0, 256, size - at, np.uint8)
        yield np.ascontiguousarray(changed)


def outcome(kernels: Kernels, payloads: Sequence[np.ndarray], length: int, mode: str, wrap: Any = as_is) -> Any:
    """The bits that a payload, or the average of several, decodes to; None where it is refused."""
    before = np.linspace(-3, 5, length, dtype=np.float32)
    whole, out = guarded(before)
    ends = np.cumsum([len(payload) for payload in payloads]).tolist()
    message = np.concatenate(payloads)
    given = message.copy()
    try:
        with np.errstate(all="ignore"):
            if len(payloads) == 1:
                kernels.decode_into(wrap(given), wrap(out), mode)
            else:
                kernels.average_into(wrap(given), list(zip([0, *ends], ends)), wrap(out))
    except PayloadError:
        np.testing.assert_array_equal(out, before)
        return None
    finally:
        check_guards(whole)
        np.testing.assert_array_equal(given, message)
    return np.where(np.isnan(out), np.float32(np.nan), out).view(np.uint32).tolist()


def check_hostile(
    kernels: Kernels, codec: Codec, seed: int, count: int, wrap: Any = as_is, exact: bool = True
) -> tuple[int, int]:
    """Kernels refuse what the codec's own NumPy code refuses, and decode to its bits; returns how often they did each.

    Every damaged payload also comes as the last of three that are averaged. Without ``exact`` bits may differ.
    """
    refused = 0
    for length in LENGTHS:
        sound = codec.encode(gauss(length, seed))
        for number, payload in enumerate(hostile(sound, seed + length, count)):
            for payloads in ([payload], [sound, sound, payload]):
                mode = MODES[number % 3]
                expected = outcome(codec, payloads, length, mode)
                found = outcome(kernels, payloads, length, mode, wrap)
                assert found == expected if exact else (found is None) == (expected is None)
                refused += expected is None
    return refused, 2 * count * len(LENGTHS) - refused


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_hostile_payloads(codec: Codec, backend: str) -> None:
    refused, _ = check_hostile(
        kernels_for(codec, backend), codec, zlib.crc32(repr(codec).encode()), 36, wrapper(backend)
    )
    assert refused


@pytest.mark.parametrize("codec", IN_TENSORFLOW, ids=str)
def test_hostile_payloads_of_tensorflow(codec: Codec) -> None:
    """On the CPU it takes subnormal numbers for zero."""
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed in this environment")
    from test_kernels_tensorflow import Mirrored

    assert check_hostile(kernels_for(codec, "tensorflow"), codec, 5, 12, Mirrored, exact=False)[0]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("codec", [TopK(0.1), Rows(TopK(0.2), 30)], ids=str)
def test_an_exchange_with_a_bad_payload_writes_no_result(codec: Codec, backend: str) -> None:
    """Of none of its tensors, though the damage is in the last."""
    jobs = make_jobs(codec, [[gauss(1000, 10 * rank + i) for i in range(3)] for rank in range(2)], backend=backend)

    def damage(gathered: np.ndarray) -> np.ndarray:
        # The positions of the last payload.
        return np.append(gathered[:-12], np.zeros(12, np.uint8))

    with pytest.raises(PayloadError, match=r"ascending or too large|mark"):
        run_exchange("allgather", jobs, (0, 0, damage))
    assert all((piece.out == -77).all() for piece in jobs[0].pieces)


def test_they_reach_all_parts_of_a_payload() -> None:
    """Of codecs with a head, many are refused and many decoded."""
    for codec in (TopK(0.1), EliasQSGD(), RowTopK(0.2, 24), Rows(TopK(0.2), 30)):
        refused, decoded = check_hostile(codec, codec, 3, 60)
        assert min(refused, decoded) > 20, codec


def test_the_check_fails_if_something_is_written_first() -> None:
    class Hasty(Rows):
        def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
            out[:1] = 7
            super().decode_into(payload, out, mode)

    with pytest.raises(AssertionError):
        check_hostile(Hasty(TopK(0.2), 30), Rows(TopK(0.2), 30), 3, 6)


def test_the_check_fails_if_a_payload_is_not_looked_at() -> None:
    class Trusting(TopK):
        def check_header(self, payload: np.ndarray, length: int, size: int) -> tuple[int, int, int]:
            return super().check_header(payload[:size], length, size) if size > 12 else (0, 0, 0)

    with pytest.raises(AssertionError):
        check_hostile(Trusting(0.1), TopK(0.1), 3, 12)
