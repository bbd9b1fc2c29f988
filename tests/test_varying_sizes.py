"""Payloads whose size depends on the values, over scatter_gather."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import (
    check_exchange,
    check_same_bits,
    check_same_on_all_ranks,
    flip_bit,
    make_inputs,
    make_jobs,
    run_exchange,
)

from hvd_qsgd import QSGD, EliasQSGD, ExchangeError, PayloadError
from hvd_qsgd.collectives.simulated import perform
from hvd_qsgd.exchanges import EXCHANGES, Job, choose_exchange
from hvd_qsgd.exchanges.base import Segment, shards_of


def test_payloads_of_varying_size_stand_in_messages_of_just_their_bytes() -> None:
    """Both phases, byte for byte as the wire format says, and the mean that follows from the payloads."""
    codec, ranks = EliasQSGD(bucket_size=64), 3
    jobs = make_jobs(codec, make_inputs(ranks, (300, 0, 1, 130)))
    shards = [shards_of(job) for job in jobs]
    steps = [EXCHANGES["scatter_gather"](job) for job in jobs]

    def payload_of(x: np.ndarray, segment: Segment, phase: int = 0) -> np.ndarray:
        out = np.empty(codec.payload_size(x.size), np.uint8)
        return out[: codec.encode_into(x, out, segment.piece.key(phase), segment.first)]

    requests: list[Any] = [rank.send(None) for rank in steps]
    decoded: dict[tuple[str, int], list[np.ndarray]] = {}
    for job, of_rank, request in zip(jobs, shards, requests):
        payloads = [[payload_of(s.of(s.piece.x), s) for s in segments] for segments in of_rank]
        check_messages(request.array, job, payloads)
        assert request.splits == [length_of(parts) for parts in payloads]
        for segments, parts in zip(of_rank, payloads):
            for segment, part in zip(segments, parts):
                values = codec.decode(part, segment.stop - segment.start)
                decoded.setdefault((segment.piece.name, segment.first), []).append(values)

    replies: list[Any] = [rank.send(outcome) for rank, outcome in zip(steps, perform(requests, ranks))]
    means = {}
    for rank, reply in enumerate(replies):
        payloads = [[]]
        for segment in shards[rank][rank]:
            first, *others = decoded[segment.piece.name, segment.first]
            mean = sum(others, first) / np.float32(ranks)
            payloads[0].append(payload_of(mean, segment, phase=1))
            means[segment.piece.name, segment.first] = codec.decode(payloads[0][-1], mean.shape)
        check_messages(reply.array, jobs[rank], payloads)

    for rank, outcome in zip(steps, perform(replies, ranks)):
        with pytest.raises(StopIteration):
            rank.send(outcome)
    check_same_on_all_ranks(jobs)
    pieces = {piece.name: piece for piece in jobs[0].pieces}
    for (name, first), mean in means.items():
        check_same_bits(pieces[name].out[first : first + len(mean)], mean)
    for rank, job in enumerate(jobs):
        others = sum(len(reply.array) for reply in replies) - len(replies[rank].array)
        assert job.wire_bytes == sum(requests[rank].splits) - requests[rank].splits[rank] + others


def length_of(payloads: list[np.ndarray]) -> int:
    return 4 + sum(4 + -(-len(payload) // 4) * 4 for payload in payloads)


def check_messages(made: np.ndarray, job: Job, messages: list[list[np.ndarray]]) -> None:
    """A message each: fingerprint, sizes, payloads; what stands between payloads is undefined."""
    assert len(made) == sum(map(length_of, messages))
    at = 0
    for payloads in messages:
        words = np.array([job.fingerprint("scatter_gather"), *map(len, payloads)], "<u4").view(np.uint8)
        check_same_bits(made[at : at + len(words)], words)
        at += len(words)
        for payload in payloads:
            check_same_bits(made[at : at + len(payload)], payload)
            at += -(-len(payload) // 4) * 4


@pytest.mark.parametrize("collective", [0, 1])
@pytest.mark.parametrize("bit", [32, 32 + 9, 32 + 31])
def test_a_wrong_size_of_a_payload_is_an_error(collective: int, bit: int) -> None:
    """The word behind the fingerprint: a little or much too large or too small."""

    def change(outcome: Any) -> Any:
        return (flip_bit(outcome[0], bit), outcome[1]) if isinstance(outcome, tuple) else flip_bit(outcome, bit)

    jobs = make_jobs(EliasQSGD(bucket_size=64), make_inputs(4, (1000,)))
    with pytest.raises((ExchangeError, PayloadError)):
        run_exchange("scatter_gather", jobs, tamper=(2, collective, change))


def test_entropy_coding_saves_bytes_over_scatter_gather_too() -> None:
    inputs = make_inputs(8, (1 << 15,))
    fixed, coded = (
        check_exchange("scatter_gather", codec, inputs, backend="numba")[0].wire_bytes
        for codec in (QSGD(norm="l2"), EliasQSGD())
    )
    assert coded < 0.5 * fixed
    # Asked for, not chosen: a second coarse rounding is worse than more bytes.
    assert choose_exchange("by_ranks", EliasQSGD(), 8) == "allgather"
