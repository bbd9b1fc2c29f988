"""The three exchanges among simulated ranks: the same bits everywhere, the right mean, the promised bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import (
    check_exchange,
    check_same_bits,
    check_same_on_all_ranks,
    flip_bit,
    gauss,
    make_inputs,
    make_jobs,
    run_exchange,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qsgd import (
    QSGD,
    Cast,
    Codec,
    ConfigError,
    EliasQSGD,
    ExchangeError,
    GlobalTopK,
    Identity,
    IntSGD,
    PowerSGD,
    RandomK,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
    UnsupportedError,
)
from hvd_qsgd.collectives.simulated import perform, simulate
from hvd_qsgd.exchanges import EXCHANGES, Job, choose_exchange, exchanges_for
from hvd_qsgd.exchanges import check_exchange as check_choice
from hvd_qsgd.exchanges.base import AllReduce, Steps, phase_of, shards_of

RANKS = (1, 2, 3, 4, 7, 16, 64)
CODECS: list[Codec] = [
    QSGD(),
    QSGD(bits=2, bucket_size=16),
    QSGD(bits=8, norm="l2"),
    QSGD(bits=5, bucket_size=64, rounding="nearest"),
    TopK(ratio=0.1),
    TopK(ratio=1, values="float16"),
    Identity(),
    Cast(),
    Cast("bfloat16"),
    Sign(64),
    RandomK(0.1),
    RandomK(0.5, unbiased=True),
    RowTopK(0.1, 64),
    EliasQSGD(),
    GlobalTopK(0.1),
    ThresholdTopK(0.1),
    Scaled(QSGD(norm="l2")),
    Scaled(RandomK(0.1, unbiased=True)),
]
PAIRS = [(exchange, codec) for codec in CODECS for exchange in exchanges_for(codec)]
EACH_PAIR = pytest.mark.parametrize(("exchange", "codec"), PAIRS, ids=lambda v: v if isinstance(v, str) else str(v))
QSGD_PAIRS = pytest.mark.parametrize("exchange", exchanges_for(QSGD()))


def own_decoded(codec: Codec, inputs: list[list[np.ndarray]], piece: int) -> list[np.ndarray]:
    """What each rank's payload of a piece decodes to, encoded apart from any exchange."""
    decoded = []
    for job in make_jobs(codec, inputs):
        x = job.pieces[piece].x
        decoded.append(codec.decode(codec.encode(x, job.pieces[piece].key()), x.shape))
    return decoded


def mean_of(arrays: list[np.ndarray]) -> np.ndarray:
    return np.mean([array.astype(np.float64) for array in arrays], axis=0)


# -- ranks that differ ----------------------------------------------------------------------------


@pytest.mark.parametrize(("exchange", "codec"), [*PAIRS, ("powersgd", PowerSGD(2)), ("intsgd", IntSGD())], ids=str)
@pytest.mark.parametrize("other", [{"shape": (40, 25)}, {"dtype": "float16"}], ids=str)
def test_tensors_of_another_shape_or_type_are_refused(exchange: str, codec: Codec, other: dict[str, Any]) -> None:
    for learned in ({}, {"square": 1.0}):
        jobs = make_jobs(codec, make_inputs(2, (1000,)))
        for job in jobs:
            job.pieces[0].shape, job.pieces[0].memory = (25, 40), dict(learned)
        for name, value in other.items():
            setattr(jobs[1].pieces[0], name, value)
        with pytest.raises(ExchangeError):
            run_exchange(exchange, jobs)


# -- the same bits --------------------------------------------------------------------------------


@EACH_PAIR
@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_end_with_the_same_bits(exchange: str, codec: Codec, ranks: int) -> None:
    lengths = (1000, 0, 1, 515) if ranks <= 16 else (0, 1, 130)
    jobs = check_exchange(exchange, codec, make_inputs(ranks, lengths))
    assert not any((piece.out == -77).any() for job in jobs for piece in job.pieces)


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "ranks"), [("scatter_gather", 1024), ("allreduce", 1024), ("allgather", 256)])
def test_all_of_a_thousand_ranks_end_with_the_same_bits(exchange: str, ranks: int) -> None:
    """allgather decodes the payloads of all ranks on all ranks: a quarter is enough."""
    codec = QSGD(bits=8, bucket_size=8)
    inputs = make_inputs(ranks, (51,))
    jobs = check_exchange(exchange, codec, inputs, backend="numba")
    level = max(float(np.abs(x[0]).max()) for x in inputs) / codec.levels
    exact = mean_of([x[0] for x in inputs])
    # The mean of that many rounding errors is small against one of them; so is the second one.
    assert np.abs(jobs[0].pieces[0].out - exact).max() < 0.3 * level


@EACH_PAIR
def test_numba_and_numpy_end_with_the_same_bits(exchange: str, codec: Codec) -> None:
    inputs = make_inputs(3)
    specified, made = (check_exchange(exchange, codec, inputs, backend=backend) for backend in ("numpy", "numba"))
    for piece, other in zip(made[0].pieces, specified[0].pieces):
        check_same_bits(piece.out, other.out)


@EACH_PAIR
def test_the_result_may_take_the_memory_of_the_input(exchange: str, codec: Codec) -> None:
    inputs = make_inputs(4)
    expected = check_exchange(exchange, codec, inputs)
    jobs = make_jobs(codec, inputs)
    for job in jobs:
        for piece in job.pieces:
            piece.out = piece.x
    run_exchange(exchange, jobs)
    for job in jobs:
        for piece, other in zip(job.pieces, expected[0].pieces):
            check_same_bits(piece.out, other.out)


@pytest.mark.parametrize(("exchange", "collective"), [("allgather", 0), ("scatter_gather", 1), ("allreduce", 1)])
def test_the_check_for_the_same_bits_fails_on_one_flipped_bit(exchange: str, collective: int) -> None:
    """In what one rank receives, in its last third, where there are codes."""
    jobs = make_jobs(QSGD(bucket_size=16), make_inputs(4, (256,)))
    run_exchange(exchange, jobs, tamper=(2, collective, lambda array: flip_bit(array, array.nbytes * 8 - 60)))
    with pytest.raises(AssertionError):
        check_same_on_all_ranks(jobs)


# -- the right mean -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [codec for codec in CODECS if not codec.whole_buffer], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_allgather_gives_the_sum_in_rank_order_over_n_exactly(codec: Codec, ranks: int) -> None:
    inputs = make_inputs(ranks)
    jobs = check_exchange("allgather", codec, inputs)
    for i, piece in enumerate(jobs[0].pieces):
        total = np.zeros(len(piece.x), np.float32)
        for decoded in own_decoded(codec, inputs, i):
            total = total + decoded
        check_same_bits(piece.out, total / np.float32(ranks))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 16])
def test_scatter_gather_adds_at_most_one_level_of_the_mean(rounding: str, norm: str, ranks: int) -> None:
    codec = QSGD(bucket_size=32, norm=norm, rounding=rounding)
    inputs = make_inputs(ranks)
    jobs = check_exchange("scatter_gather", codec, inputs)
    for i, piece in enumerate(jobs[0].pieces):
        mean = mean_of(own_decoded(codec, inputs, i))
        level = np.repeat(codec.scales(mean.astype(np.float32)), 32)[: len(mean)] / codec.levels
        error = np.abs(piece.out - mean)
        assert (error <= level * (0.5 if rounding == "nearest" else 1) * (1 + 1e-4)).all()
        if len(mean) > 100 and ranks > 2 and norm == "max":
            # A tight bound; with a single rank nothing is left to be rounded.
            assert error.max() > 0.4 * level.min()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 16])
def test_allreduce_gives_the_mean_of_what_is_decoded_on_common_scales(bits: int, norm: str, ranks: int) -> None:
    codec = QSGD(bits=bits, bucket_size=32, norm=norm)
    inputs = make_inputs(ranks)
    jobs = check_exchange("allreduce", codec, inputs)
    for i, piece in enumerate(jobs[0].pieces):
        common = np.max([codec.scales(x[i]) for x in inputs], axis=0).astype(np.float32)
        decoded = []
        for job in make_jobs(codec, inputs):
            x, words = job.pieces[i].x, np.empty(codec.lanes_length(len(piece.x), ranks), np.int32)
            codec.to_lanes(x, common.view(np.int32), ranks, words, job.pieces[i].key())
            own = np.empty_like(x)
            codec.from_lanes(words, common.view(np.int32), ranks, own, 1)
            decoded.append(own)
            level = np.repeat(common, 32)[: len(x)] / codec.levels
            assert (np.abs(own.astype(np.float64) - x) <= level * (1 + 1e-4)).all()
        exact = mean_of(decoded)
        scale = np.repeat(common, 32)[: len(exact)]
        np.testing.assert_array_less(np.abs(piece.out - exact), 4 * np.spacing(scale) + 1e-45)


@QSGD_PAIRS
def test_the_mean_is_unbiased(exchange: str) -> None:
    codec, ranks, steps = QSGD(bits=3, bucket_size=32), 4, 200
    inputs = make_inputs(ranks, (96,))
    exact = mean_of([x[0] for x in inputs])
    errors = np.array(
        [check_exchange(exchange, codec, inputs, step=step)[0].pieces[0].out - exact for step in range(steps)]
    )
    deviation = errors.std(axis=0) / steps**0.5
    scores = errors.mean(axis=0)[deviation > 0] / deviation[deviation > 0]
    assert np.abs(scores).max() < 5
    assert 0.5 < (scores**2).mean() < 1.6
    # Steps draw new random numbers.
    assert (errors.std(axis=0) > 0).mean() > 0.9


@QSGD_PAIRS
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_tensor_that_travels_in_parts_has_the_mean_of_the_whole(exchange: str, ranks: int) -> None:
    codec = QSGD(bucket_size=16)
    inputs = make_inputs(ranks, (1000,))
    whole = check_exchange(exchange, codec, inputs)[0].pieces[0].out
    jobs = make_jobs(codec, [[x[0][:320], x[0][320:]] for x in inputs])
    for job in jobs:
        job.pieces[1].first, job.pieces[1].stream = 320, job.pieces[0].stream
    run_exchange(exchange, jobs)
    check_same_bits(np.concatenate([piece.out for piece in jobs[0].pieces]), whole)


def test_ranks_and_pieces_round_independently() -> None:
    """If all ranks drew the same numbers, their errors would not average out."""
    x = gauss(512)
    jobs = make_jobs(QSGD(), [[x, x]] * 4)
    payloads = {QSGD().encode(piece.x, piece.key()).tobytes() for job in jobs for piece in job.pieces}
    assert len(payloads) == 8
    assert jobs[0].pieces[0].key(phase=1) != jobs[0].pieces[0].key()


# -- lanes ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(bits=st.integers(2, 8), ranks=st.integers(1, 1024), signs=st.sampled_from(["+", "-", "+-", "random"]))
def test_lanes_never_overflow(bits: int, ranks: int, signs: str) -> None:
    """With every level at its extreme; the simulated allreduce refuses sums that int32 cannot hold."""
    codec = QSGD(bits=bits, bucket_size=8)
    x = np.ones((ranks, 40), np.float32)
    if signs == "-":
        x = -x
    elif signs == "+-":
        x[1::2] = -1
    elif signs == "random":
        x = np.sign(np.random.default_rng(ranks).standard_normal(x.shape)).astype(np.float32)
    jobs = make_jobs(codec, [[row] for row in x])
    run_exchange("allreduce", jobs)
    check_same_on_all_ranks(jobs)
    np.testing.assert_allclose(jobs[0].pieces[0].out, x.sum(axis=0) / ranks, rtol=3e-7, atol=1e-7)


@given(bits=st.integers(2, 8), ranks=st.integers(1, 2**24), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 9))
def test_sums_of_lanes_fit_int32_whatever_the_number_of_ranks(bits: int, ranks: int, sign: int, seed: int) -> None:
    codec = QSGD(bits=bits, bucket_size=64)
    if ranks * 2 * codec.levels >= 2**32:
        with pytest.raises(UnsupportedError):
            codec.lane_width(ranks)
        return
    x = np.where(np.random.default_rng(seed).random(64) < 0.5 * (seed > 0), -sign, sign).astype(np.float32)
    agreed = codec.scales(x).view(np.int32)
    words = np.empty(codec.lanes_length(64, ranks), np.int32)
    codec.to_lanes(x, agreed, ranks, words)
    sums = words.astype(np.int64) * ranks
    np.testing.assert_array_equal(sums, sums.astype(np.int32))
    mean = np.empty_like(x)
    codec.from_lanes(sums.astype(np.int32), agreed, ranks, mean, ranks)
    np.testing.assert_allclose(mean, x, rtol=3e-7)


def test_a_sum_that_overflows_is_refused() -> None:
    words = np.full(3, 2**30, np.int32)
    with pytest.raises(ExchangeError, match="overflows int32"):
        perform([AllReduce("a", words, "sum")] * 2, 2)


@pytest.mark.parametrize("joined", [1, 2])
def test_a_rank_that_has_joined_contributes_nothing(joined: int) -> None:
    """Horovod lets such a rank contribute zero bits to the sum and the maximum."""
    inputs = make_inputs(4, (100, 3))
    jobs = make_jobs(QSGD(bucket_size=16, rounding="nearest"), inputs)[: 4 - joined]
    steps = [EXCHANGES["allreduce"](job) for job in jobs]
    outcomes: list[Any] = [None] * len(jobs)
    for _ in range(2):
        requests: list[Any] = [rank.send(outcome) for rank, outcome in zip(steps, outcomes)]
        absent = AllReduce(requests[0].name, np.zeros_like(requests[0].array), requests[0].op)
        outcomes = perform(requests + [absent] * joined, 4)[: len(jobs)]
    for rank, outcome in zip(steps, outcomes):
        with pytest.raises(StopIteration):
            rank.send(outcome)
    check_same_on_all_ranks(jobs)
    for i, piece in enumerate(jobs[0].pieces):
        exact = mean_of([x[i] for x in inputs[: 4 - joined]])
        largest = max(float(np.abs(x[i]).max()) for x in inputs)
        assert np.abs(piece.out - exact).max() <= largest / QSGD().levels / 2 * 1.001


# -- bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 16, 64])
def test_scatter_gather_sends_two_payloads_whatever_the_number_of_ranks(ranks: int) -> None:
    codec = QSGD(bucket_size=16)
    # Large for the number of ranks: a shard is then a share of the payload, but for a bucket and a header.
    inputs = make_inputs(1, (16 * 120 * ranks + 7,)) * ranks
    jobs = make_jobs(codec, inputs, backend="numba")
    run_exchange("scatter_gather", jobs)
    payload = codec.payload_size(len(inputs[0][0]))
    for job in jobs:
        assert job.wire_bytes == pytest.approx(2 * (ranks - 1) / ranks * payload, rel=0.01)
        assert job.payload_bytes == pytest.approx(payload, rel=1e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_allgather_sends_a_payload_to_each_other_rank(ranks: int) -> None:
    inputs = make_inputs(ranks, (512 * 4, 0, 3))
    for codec in (QSGD(), Identity()):
        payloads = sum(-(-codec.payload_size(len(x)) // 4) * 4 for x in inputs[0])
        jobs = check_exchange("allgather", codec, inputs)
        # A fingerprint and three sizes.
        assert {job.wire_bytes for job in jobs} == {(ranks - 1) * (payloads + 16)}
    jobs = check_exchange("allgather", TopK(), inputs)
    for job in jobs:
        assert job.wire_bytes == sum(
            16 + sum(-(-piece.payload_bytes // 4) * 4 for piece in other.pieces) for other in jobs if other is not job
        )


@pytest.mark.parametrize("ranks", RANKS)
def test_allreduce_sends_scales_and_lanes_twice(ranks: int) -> None:
    codec = QSGD()
    inputs = make_inputs(ranks, (512 * 4, 0, 3))
    width = next(w for w in range(33) if ranks * 2 * codec.levels < 2**w)
    words = 3 + (4 + 1) + sum(-(-bucket // (32 // width)) for bucket in (512, 512, 512, 512, 3))
    for job in check_exchange("allreduce", codec, inputs):
        assert job.wire_bytes == pytest.approx(2 * (ranks - 1) / ranks * 4 * words)


def test_by_ranks_takes_scatter_gather_from_four_ranks_where_the_codec_allows_it() -> None:
    assert [choose_exchange("by_ranks", QSGD(), ranks) for ranks in (1, 2, 3, 4, 64)] == ["allgather"] * 3 + [
        "scatter_gather"
    ] * 2
    assert choose_exchange("by_ranks", TopK(), 64) == "allgather"
    assert choose_exchange("allreduce", QSGD(), 2) == "allreduce"
    # It is the one that sends fewer bytes.
    for ranks, fewest in ((2, "allgather"), (4, "scatter_gather"), (8, "scatter_gather")):
        inputs = make_inputs(1, (512 * 100,)) * ranks
        sent = {e: check_exchange(e, QSGD(), inputs, backend="numba")[0].wire_bytes for e in exchanges_for(QSGD())}
        assert min(sent, key=lambda e: sent[e]) == fewest


@pytest.mark.parametrize(("exchange", "codec"), [("scatter_gather", TopK()), ("allreduce", Cast()), ("ring", QSGD())])
def test_an_exchange_that_cannot_carry_a_codec_is_refused(exchange: str, codec: Codec) -> None:
    with pytest.raises(ConfigError, match=f"exchange='{exchange}'"):
        check_choice(exchange, codec)
    check_choice("auto", codec)


# -- shards -----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    ranks=st.integers(1, 20),
    codec=st.sampled_from([QSGD(bucket_size=16), QSGD(bits=3, bucket_size=64), Identity(), Cast()]),
)
def test_shards_part_the_pieces_between_buckets(lengths: list[int], ranks: int, codec: Codec) -> None:
    jobs = make_jobs(codec, [[np.zeros(length, np.float32) for length in lengths]] * ranks)
    shards = shards_of(jobs[0])
    assert len(shards) == ranks
    covered: dict[str, int] = {piece.name: 0 for piece in jobs[0].pieces}
    units = []
    for segments in shards:
        for segment in segments:
            # In order and without a gap: every element is in one shard.
            assert covered[segment.piece.name] == segment.start < segment.stop
            covered[segment.piece.name] = segment.stop
            assert segment.first % codec.granularity == 0
            assert segment.stop == len(segment.piece.x) or segment.stop % codec.granularity == 0
        units.append(sum(-(-(segment.stop - segment.start) // codec.granularity) for segment in segments))
    assert [covered[piece.name] for piece in jobs[0].pieces] == lengths
    assert max(units) - min(units) <= 1
    # All ranks cut alike.
    for job in jobs[1:]:
        assert [[(s.piece.name, s.start, s.stop) for s in shard] for shard in shards_of(job)] == [
            [(s.piece.name, s.start, s.stop) for s in shard] for shard in shards
        ]


# -- error feedback -----------------------------------------------------------------------------------


def whole_numbers(ranks: int, lengths: tuple[int, ...]) -> list[list[np.ndarray]]:
    """Inputs on which nothing is rounded: sums and quotients of a power of two are exact."""
    rng = np.random.default_rng(ranks)
    return [[rng.integers(-1000, 1001, length).astype(np.float32) for length in lengths] for _ in range(ranks)]


CONSERVING = [
    ("allgather", TopK(ratio=0.2)),
    ("allgather", QSGD(bits=2, bucket_size=16, rounding="nearest")),
    ("scatter_gather", QSGD(bits=2, bucket_size=16, rounding="nearest")),
    ("allreduce", QSGD(bits=2, bucket_size=16, rounding="nearest")),
    ("scatter_gather", QSGD(bits=2, bucket_size=16)),
    ("scatter_gather", EliasQSGD(2, 16, "max", "nearest")),
    ("allgather", Identity()),
]


@pytest.mark.parametrize(("exchange", "codec"), CONSERVING, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_nothing_is_lost_that_no_residual_keeps(exchange: str, codec: Codec, ranks: int) -> None:
    """Sum of inputs = n * mean + sum of new residuals, exactly: with two bits, levels are -1, 0 and 1 scale."""
    inputs = whole_numbers(ranks, (200, 0, 1, 33))
    jobs = check_exchange(exchange, codec, inputs, keep_error=True)
    for i, piece in enumerate(jobs[0].pieces):
        residuals = np.sum([job.pieces[i].x.astype(np.float64) for job in jobs], axis=0)
        total = np.sum([x[i].astype(np.float64) for x in inputs], axis=0)
        np.testing.assert_array_equal(total, ranks * piece.out.astype(np.float64) + residuals)
    assert any(job.pieces[0].x.any() for job in jobs) == (codec != Identity())


@pytest.mark.parametrize("exchange", exchanges_for(QSGD()))
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("ranks", [3, 7])
def test_nothing_is_lost_but_by_float32_rounding(exchange: str, bits: int, ranks: int) -> None:
    inputs = make_inputs(ranks, (200, 1, 33))
    jobs = check_exchange(exchange, QSGD(bits=bits, bucket_size=16, rounding="nearest"), inputs, keep_error=True)
    for i, piece in enumerate(jobs[0].pieces):
        residuals = np.sum([job.pieces[i].x.astype(np.float64) for job in jobs], axis=0)
        total = np.sum([x[i].astype(np.float64) for x in inputs], axis=0)
        np.testing.assert_allclose(ranks * piece.out.astype(np.float64) + residuals, total, atol=1e-5)


@pytest.mark.parametrize("codec", [TopK(ratio=0.2), QSGD(rounding="nearest")], ids=str)
def test_a_residual_is_input_less_own_decoded_payload(codec: Codec) -> None:
    inputs = make_inputs(3)
    jobs = check_exchange("allgather", codec, inputs, keep_error=True)
    for i in range(4):
        for rank, decoded in enumerate(own_decoded(codec, inputs, i)):
            check_same_bits(jobs[rank].pieces[i].x, inputs[rank][i] - decoded)


# -- what is not finite -------------------------------------------------------------------------------


@QSGD_PAIRS
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_nan_on_one_rank_is_nan_on_all_in_its_bucket_only(exchange: str, norm: str, value: float, ranks: int) -> None:
    codec = QSGD(bucket_size=16, norm=norm)
    inputs = make_inputs(ranks, (100, 5, 40))
    clean = check_exchange(exchange, codec, inputs)[0]
    inputs[ranks - 1][0][37] = value
    inputs[0][2][39] = value
    jobs = check_exchange(exchange, codec, inputs)
    for piece, other, bucket in zip(jobs[0].pieces, clean.pieces, (range(32, 48), range(0), range(32, 40))):
        inside = np.isin(np.arange(len(piece.x)), bucket)
        assert np.isnan(piece.out[inside]).all()
        check_same_bits(piece.out[~inside], other.out[~inside])


def test_nan_on_one_rank_is_nan_everywhere_with_topk() -> None:
    inputs = make_inputs(3)
    inputs[1][3][7] = np.nan
    jobs = check_exchange("allgather", TopK(), inputs)
    assert [np.isnan(piece.out).all() for piece in jobs[0].pieces[:1]] == [False]
    assert np.isnan(jobs[0].pieces[3].out).all()


@pytest.mark.parametrize(("exchange", "codec"), [("allgather", Identity()), ("scatter_gather", Cast())], ids=str)
def test_nan_stays_at_its_element_without_quantization(exchange: str, codec: Codec) -> None:
    inputs = make_inputs(3)
    inputs[1][0][7] = np.nan
    jobs = check_exchange(exchange, codec, inputs)
    assert np.flatnonzero(np.isnan(jobs[0].pieces[0].out)).tolist() == [7]


# -- an exchange as its registry lists it ---------------------------------------------------------------


def test_an_exchange_of_nothing_works() -> None:
    for exchange in exchanges_for(QSGD()):
        for lengths in ((), (0,), (0, 0)):
            jobs: list[Job] = check_exchange(exchange, QSGD(), make_inputs(3, lengths))
            assert all(len(piece.out) == 0 for piece in jobs[0].pieces)


@pytest.mark.parametrize(
    ("name", "codec"), [*((name, QSGD()) for name in exchanges_for(QSGD())), ("linear", RandomK(0.1))], ids=str
)
def test_phases_are_the_collectives_that_come(name: str, codec: Codec) -> None:
    """Graphs are built for these phases before any exchange runs."""
    seen: list[list[str]] = []

    def recorded(steps: Steps) -> Steps:
        phases: list[str] = []
        seen.append(phases)
        outcome: Any = None
        while True:
            try:
                request = steps.send(outcome)
            except StopIteration:
                return
            phases.append(phase_of(request))
            outcome = yield request

    jobs = make_jobs(codec, [[gauss(2000, rank), gauss(700, rank)] for rank in range(3)])
    simulate([recorded(EXCHANGES[name](job)) for job in jobs])
    assert seen == [list(EXCHANGES[name].phases)] * 3
