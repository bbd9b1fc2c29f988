"""Checkers that several test files share; the test files list data and call them.

Every checker is itself seen to fail: on one flipped bit, on a biased quantizer, on a setting
that was lost. Those tests stand in the file that uses the checker most.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvd_qsgd import QSGD, Codec, codec_from_config
from hvd_qsgd.codecs import CODECS
from hvd_qsgd.codecs.base import MODES, Kernels
from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import Job, Piece, start_exchange
from hvd_qsgd.exchanges.base import Steps, ToHost
from hvd_qsgd.kernels import kernels_for

# Tests must not depend on the speed of the machine, and the same commit must give the same verdict.
settings.register_profile(
    "hvd_qsgd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("hvd_qsgd")

FLT_MAX = np.float32(np.finfo(np.float32).max)
SMALLEST = np.float32(2.0**-149)
#: What fills memory that nobody may write to, and how much of it stands on either side. 3 makes payloads unaligned.
FILLER, GUARD = 0xA5, 3


def gauss(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


def hard_arrays(bucket: int = 512) -> dict[str, np.ndarray]:
    """Inputs on which an implementation is likely to be wrong, by what is hard about them."""
    rng = np.random.default_rng(7)
    arrays = {f"{length} elements": gauss(length, length) for length in (0, 1, 2, 7, 8, 9, 17, 100)}
    for extra in (-1, 0, 1, 3):
        arrays[f"2 buckets {extra:+d}"] = gauss(2 * bucket + extra, 3)
    base = gauss(3 * bucket + 5, 4)

    def changed(**values: Any) -> np.ndarray:
        x = base.copy()
        for position, value in values.items():
            x[int(position[1:])] = value
        return x

    arrays["zeros"] = np.zeros(2 * bucket + 3, np.float32)
    arrays["minus zeros"] = -np.zeros(bucket + 1, np.float32)
    arrays["a zero bucket"] = base.copy()
    arrays["a zero bucket"][bucket : 2 * bucket] = 0
    arrays["a NaN"] = changed(**{f"_{bucket + 1}": np.nan})
    arrays["infinities"] = changed(_0=np.inf, **{f"_{3 * bucket + 4}": -np.inf})
    arrays["the largest number"] = changed(_3=FLT_MAX, **{f"_{bucket + 3}": -FLT_MAX})
    arrays["only largest numbers"] = np.where(base > 0, FLT_MAX, -FLT_MAX)
    arrays["subnormal"] = (base * np.float32(2.0**-130)).astype(np.float32)
    arrays["the smallest numbers"] = rng.integers(-3, 4, bucket + 9).astype(np.float32) * SMALLEST
    arrays["around 2^-100"] = np.ldexp(base, rng.integers(-104, -96)).astype(np.float32)
    arrays["all magnitudes"] = np.ldexp(base, rng.integers(-140, 120, len(base))).astype(np.float32)
    arrays["ties"] = (rng.integers(-14, 15, 2 * bucket + 1) / 2).astype(np.float32)
    arrays["all equal"] = np.full(bucket + 2, -0.3, np.float32)
    arrays["sparse"] = np.where(rng.random(4 * bucket) < 0.01, gauss(4 * bucket), 0).astype(np.float32)
    return arrays


def float32_arrays(most: int = 80) -> st.SearchStrategy[np.ndarray]:
    """Short float32 arrays with every kind of number in them."""
    return hnp.arrays(np.float32, st.integers(0, most), elements=st.floats(width=32))


def qsgd_codecs(**fixed: Any) -> st.SearchStrategy[QSGD]:
    fields: dict[str, Any] = {
        "bits": st.integers(2, 8),
        "bucket_size": st.sampled_from([8, 16, 24, 40, 64]),
        "norm": st.sampled_from(["max", "l2"]),
        "rounding": st.sampled_from(["stochastic", "nearest"]),
    }
    return st.builds(QSGD, **{**fields, **{name: st.just(value) for name, value in fixed.items()}})


# -- bits -----------------------------------------------------------------------------------


def check_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """Equal dtype, shape and bits; a NaN equals a NaN, whatever its bits."""
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        a, b = (np.where(np.isnan(v), np.array(0, v.dtype), v) for v in (a, b))
    differ = np.flatnonzero(a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8))
    assert differ.size == 0, f"{differ.size} bytes differ, the first at {differ[0]}"


def flip_bit(array: np.ndarray, bit: int) -> np.ndarray:
    """A copy with one bit flipped."""
    flipped = np.array(array)
    flipped.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << (bit % 8)
    return flipped


# -- codecs and kernels -----------------------------------------------------------------------


def check_config(codec: Codec) -> None:
    """A configuration is a frozen record, survives JSON and pickle, compares equal and can be read."""
    again = codec_from_config(json.loads(json.dumps(codec.config())))
    for other in (again, pickle.loads(pickle.dumps(codec)), eval(repr(codec), {c.__name__: c for c in CODEC_TYPES})):
        assert type(other) is type(codec)
        assert other == codec
        assert hash(other) == hash(codec)
        assert other.config() == codec.config()
    for field in dataclasses.fields(codec):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(codec, field.name, getattr(codec, field.name))


CODEC_TYPES = tuple(CODECS.values())


def as_is(array: np.ndarray) -> Any:
    return array


def wrapper(backend: str) -> Callable[[np.ndarray], Any]:
    """What makes an array of the backend of a NumPy array, in the same memory."""
    if backend != "torch":
        return as_is
    import torch

    return torch.from_numpy


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy between guards: all of it, and the part in the middle."""
    whole = np.empty(array.nbytes + 2 * GUARD * array.itemsize, np.uint8)
    whole[:] = FILLER
    typed = whole.view(array.dtype)
    typed[GUARD : GUARD + array.size] = array
    return whole, typed[GUARD : GUARD + array.size]


def check_kernels(
    codec: Codec, kernels: Kernels, x: np.ndarray, key: int = 0, first: int = 0, wrap: Any = as_is
) -> None:
    """Kernels give the bytes of the codec's own NumPy code, and read and write nothing else."""
    size = codec.payload_size(x.size)
    expected, made = (np.full(size + 2 * GUARD, FILLER, np.uint8) for _ in range(2))
    used = codec.encode_into(x, expected[GUARD:], key, first)
    assert used <= size
    assert used == size or codec.variable_size
    assert set(expected[:GUARD]) == set(expected[GUARD + size :]) == {FILLER}
    given = x.copy()
    assert kernels.encode_into(wrap(given), wrap(made[GUARD:]), key, first) == used
    check_same_bits(made, expected)
    check_same_bits(given, x)

    payload = expected[GUARD : GUARD + used]
    before = np.linspace(-3, 5, x.size, dtype=np.float32)
    decoded = np.zeros(x.size, np.float32)
    codec.decode_into(payload, decoded)
    with np.errstate(over="ignore", invalid="ignore"):
        outcomes = {"set": decoded, "add": before + decoded, "subtract": before - decoded}
    for mode in MODES:
        for implementation, convert in ((codec, as_is), (kernels, wrap)):
            whole, out = guarded(before)
            with np.errstate(over="ignore", invalid="ignore"):
                implementation.decode_into(convert(payload), convert(out), mode)
                if mode == "set":
                    implementation.decode_into(convert(payload), convert(out), mode)
            check_same_bits(out, outcomes[mode])
            check_guards(whole)
    check_same_bits(made, expected)
    check_average(codec, kernels, x, key, wrap)


def check_guards(whole: np.ndarray) -> None:
    """Nothing was written around an array of 4-byte elements that :func:`guarded` made."""
    edge = 4 * GUARD
    assert set(whole[:edge]) == set(whole[len(whole) - edge :]) == {FILLER}


def check_average(codec: Codec, kernels: Kernels, x: np.ndarray, key: int, wrap: Any) -> None:
    """Payloads anywhere in a message become the sum of their values, in order, over their number."""
    parts, spans, at = [], [], GUARD
    total = np.full(x.size, -0.0, np.float32)
    for rank in range(3):
        with np.errstate(over="ignore"):
            values = x * np.float32(rank - 0.5)
        payload = codec.encode(values, (key + rank) % 2**64)
        parts += [np.full(GUARD, FILLER, np.uint8), payload]
        spans.append((at, at + len(payload)))
        at += len(payload) + GUARD
        with np.errstate(over="ignore", invalid="ignore"):
            total = total + codec.decode(payload, x.shape)
            for implementation, convert in ((codec, as_is), (kernels, wrap)):
                whole, out = guarded(np.ones(x.size, np.float32))
                implementation.average_into(convert(np.concatenate(parts)), spans, convert(out))
                check_same_bits(out, total / np.float32(len(spans)))
                check_guards(whole)
    with np.errstate(invalid="ignore"):
        assert kernels.all_finite(wrap(x.copy())) == codec.all_finite(x) == bool(np.isfinite(x).all())


def check_lanes(codec: QSGD, kernels: Any, x: np.ndarray, ranks: int, key: int = 0, wrap: Any = as_is) -> None:
    """The functions behind the allreduce exchange give the bits of the codec's own NumPy code."""
    agreements, lanes, means = [], [], []
    for implementation, convert in ((codec, as_is), (kernels, wrap)):
        whole, agreed = guarded(np.zeros(codec.agreement_length(x.size), np.int32))
        implementation.agree_into(convert(x.copy()), convert(agreed))
        agreements.append(whole)
        # On scales of another rank that are larger, and on its own.
        larger = agreed.copy()
        larger[::2] += 1 << 23
        for scales in (agreed, np.where(larger < 0x7F800000, larger, agreed)):
            whole, words = guarded(np.zeros(codec.lanes_length(x.size, ranks), np.int32))
            implementation.to_lanes(convert(x.copy()), convert(scales), ranks, convert(words), key, codec.bucket_size)
            lanes.append(whole)
            for sums, count in ((words, 1), (words * np.int32(ranks), ranks)):
                whole, out = guarded(np.zeros(x.size, np.float32))
                with np.errstate(over="ignore"):
                    implementation.from_lanes(convert(sums), convert(scales), ranks, convert(out), count)
                # Canonical, because NaN has many bit patterns.
                out[np.isnan(out)] = np.nan
                means.append(whole)
    for outcomes in (agreements, lanes, means):
        half = len(outcomes) // 2
        for specified, made in zip(outcomes[:half], outcomes[half:]):
            check_same_bits(made, specified)
            check_guards(made)


def check_halves(codec: QSGD, kernels: Any, x: np.ndarray, dtype: str, key: int = 0, ranks: int = 3) -> None:
    """Kernels over torch tensors take half precision for the values that it stands for, and round once to it."""
    import torch

    half = getattr(torch, dtype)
    source = torch.from_numpy(x).to(half)
    values = source.to(torch.float32).numpy()

    def rounded(specified: np.ndarray) -> np.ndarray:
        return torch.from_numpy(specified).to(half).to(torch.float32).numpy()

    def check(made: torch.Tensor, specified: np.ndarray) -> None:
        check_same_bits(made.to(torch.float32).numpy(), rounded(specified))

    payload = codec.encode(values, key)
    made = torch.full((len(payload) + GUARD,), FILLER, dtype=torch.uint8)
    kernels.encode_into(source, made, key)
    check_same_bits(made.numpy(), np.append(payload, np.full(GUARD, FILLER, np.uint8)))
    with np.errstate(over="ignore", invalid="ignore"):
        for mode in MODES:
            expected, out = values.copy(), source.clone()
            codec.decode_into(payload, expected, mode)
            kernels.decode_into(made[: len(payload)], out, mode)
            check(out, expected)
        for gap in (0, 3):
            message = np.tile(np.append(payload, np.zeros(gap, np.uint8)), ranks)
            spans = [(r * (len(payload) + gap), r * (len(payload) + gap) + len(payload)) for r in range(ranks)]
            spans[-1] = spans[0] if gap else spans[-1]
            expected, out = np.empty_like(values), torch.empty_like(source)
            codec.average_into(message, spans, expected)
            kernels.average_into(torch.from_numpy(message), spans, out)
            check(out, expected)
        agreed, lanes = codec.agreement_length(x.size), codec.lanes_length(x.size, ranks)
        specified, found = (
            [np.zeros(agreed, np.int32), np.zeros(lanes, np.int32), np.zeros(x.size, np.float32)],
            [torch.zeros(agreed, dtype=torch.int32), torch.zeros(lanes, dtype=torch.int32), torch.zeros_like(source)],
        )
        for implementation, array, (scales, words, means) in ((codec, values, specified), (kernels, source, found)):
            implementation.agree_into(array, scales)
            implementation.to_lanes(array, scales, ranks, words, key)
            implementation.from_lanes(words, scales, ranks, means, 1)
    for one, other in zip(found[:2], specified[:2]):
        check_same_bits(one.numpy(), other)
    check(found[2], specified[2])


# -- exchanges --------------------------------------------------------------------------------


def make_inputs(ranks: int, lengths: tuple[int, ...] = (1000, 0, 1, 515), seed: int = 0) -> list[list[np.ndarray]]:
    """Normally distributed parts of every rank, for :func:`make_jobs`."""
    return [[gauss(length, seed + 100 * rank + i) for i, length in enumerate(lengths)] for rank in range(ranks)]


def make_jobs(
    codecs: Codec | Sequence[Codec],
    inputs: Sequence[Sequence[np.ndarray]],
    *,
    backend: str = "numpy",
    keep_error: bool = False,
    step: int = 0,
) -> list[Job]:
    """One job a rank; ``inputs[rank][i]`` is the rank's part of piece ``i`` and stays as it is."""
    ranks = len(inputs)
    codecs = [codecs] * ranks if isinstance(codecs, Codec) else codecs
    jobs = []
    for rank, (codec, arrays) in enumerate(zip(codecs, inputs)):
        owner = 0 if codec.shared_randomness else rank
        pieces = [
            Piece(f"t{i}", x.copy(), np.full_like(x, -77), stream_of(0, owner, f"t{i}"), step, keep_error=keep_error)
            for i, x in enumerate(arrays)
        ]
        jobs.append(Job("job", pieces, kernels_for(codec, backend), rank, ranks, np.empty))
    return jobs


def tampered(steps: Steps, collective: int, change: Callable[[Any], Any]) -> Generator[Any, Any, None]:
    """The exchange of one rank, which receives something else from one of its collectives."""
    outcome, number = None, 0
    while True:
        try:
            request = steps.send(outcome)
        except StopIteration:
            return
        outcome = yield request
        if number == collective:
            outcome = change(outcome)
        number += 1


def run_exchange(
    exchange: str, jobs: Sequence[Job], tamper: tuple[int, int, Callable[[Any], Any]] | None = None
) -> None:
    """Run all ranks to the end. ``tamper``: rank, number of the collective and what happens to its outcome."""
    steps: list[Any] = [start_exchange(exchange, job) for job in jobs]
    if tamper is not None:
        rank, collective, change = tamper
        steps[rank] = tampered(steps[rank], collective, change)
    with np.errstate(over="ignore", invalid="ignore"):
        simulate(steps)


def run_torch_exchange(exchange: str, jobs: Sequence[Job], around: Callable[[Steps], Any] = iter) -> None:
    """The same for jobs whose arrays are torch tensors; ``around`` may change what each rank asks for and gets."""
    import torch

    def to_numpy(steps: Steps) -> Generator[Any, Any, None]:
        outcome: Any = None
        while True:
            try:
                request = steps.send(outcome)
            except StopIteration:
                return
            request.array = request.array.numpy()
            outcome = yield request
            if isinstance(request, ToHost):
                continue
            received = isinstance(outcome, tuple)
            outcome = (torch.from_numpy(outcome[0]), *outcome[1:]) if received else torch.from_numpy(outcome)

    simulate([to_numpy(around(start_exchange(exchange, job))) for job in jobs])


def check_same_on_all_ranks(jobs: Sequence[Job]) -> None:
    """Every rank holds the same bits, those of NaN among them, in every element."""
    for job in jobs[1:]:
        for piece, other in zip(job.pieces, jobs[0].pieces):
            np.testing.assert_array_equal(piece.out.view(np.uint32), other.out.view(np.uint32))


def check_exchange(exchange: str, codec: Codec, inputs: Sequence[Sequence[np.ndarray]], **options: Any) -> list[Job]:
    """Run an exchange and check what holds for all of them; returns the finished jobs."""
    jobs = make_jobs(codec, inputs, **options)
    run_exchange(exchange, jobs)
    check_same_on_all_ranks(jobs)
    for job, arrays in zip(jobs, inputs):
        assert job.payload_bytes == sum(piece.payload_bytes for piece in job.pieces)
        assert (job.wire_bytes == 0) == (len(inputs) == 1)
        if not options.get("keep_error"):
            for piece, x in zip(job.pieces, arrays):
                check_same_bits(piece.x, x)
    return jobs


# -- statistics -------------------------------------------------------------------------------

#: Standard deviations. A right implementation exceeds 5 in one of 1.7 million tests; seeds are fixed besides.
CONFIDENCE = 5.0


def check_normal(z: float, what: str) -> None:
    assert abs(z) < CONFIDENCE, f"{what}: {z:.1f} standard deviations from what was promised"


def check_chi_square(counts: np.ndarray, expected: float, what: str) -> None:
    """Counts of equally likely outcomes; with these many degrees of freedom chi-square is nearly normal."""
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    check_normal((statistic - freedom) / (2 * freedom) ** 0.5, f"{what}: chi-square")
