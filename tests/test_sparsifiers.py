"""RandomK, RowTopK, GlobalTopK, ThresholdTopK, SIDCo's fits and Sign, by what their sources say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import (
    as_is,
    check_chi_square,
    check_config,
    check_exchange,
    check_normal,
    check_same_bits,
    gauss,
    hard_arrays,
    make_jobs,
    run_exchange,
    wrapper,
)
from hypothesis import given
from hypothesis import strategies as st

from hvd_qsgd import Codec, ConfigError, ExchangeError, GlobalTopK, PayloadError, RandomK, RowTopK, Sign, ThresholdTopK
from hvd_qsgd.codecs import TopK, sidco
from hvd_qsgd.codecs.topk_threshold import METHODS, MOST
from hvd_qsgd.kernels import kernels_for

HARD = hard_arrays()


def round_trip(codec: Codec, x: np.ndarray, key: int = 0) -> np.ndarray:
    return codec.decode(codec.encode(x, key), x.shape)


@pytest.mark.parametrize(
    "codec",
    [
        RandomK(0.2, True),
        RowTopK(0.1, 64),
        GlobalTopK(k=5),
        ThresholdTopK(0.1, method="sidco-gamma", every=3),
        Sign(64),
    ],
)
def test_config_is_a_record(codec: Codec) -> None:
    check_config(codec)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda ratio=ratio, kind=kind: kind(ratio) for ratio in (0, 1.1, True, "1") for kind in (RandomK, RowTopK)),
        lambda: RowTopK(0.1, 1),
        lambda: RowTopK(0.1, 65537),
        lambda: ThresholdTopK(0.1, method="sidco"),
        lambda: ThresholdTopK(0.1, every=0),
        lambda: ThresholdTopK(k=3),
        lambda: Sign(12),
        lambda: Sign(0),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


# -- RandomK -----------------------------------------------------------------------------------


@given(ratio=st.floats(0.001, 1), length=st.integers(0, 300), key=st.integers(0, 2**64 - 1))
def test_random_positions_are_one_of_each_part(ratio: float, length: int, key: int) -> None:
    codec = RandomK(ratio)
    positions, sizes = codec.positions(length, key)
    count = codec.sum_length(length)
    assert len(positions) == count >= ratio * length and sizes.sum() == (length if count else 0)
    starts = np.cumsum(sizes) - sizes
    assert ((starts <= positions) & (positions < starts + sizes)).all()
    assert count == 0 or sizes.max() - sizes.min() <= 1


def test_every_element_is_as_likely_as_any_other() -> None:
    codec, draws = RandomK(0.05), 4000
    counts = np.zeros(200)
    for key in range(draws):
        counts[codec.positions(200, (key * 0x9E3779B97F4A7C15) % 2**64)[0]] += 1
    check_chi_square(counts, draws / 20, "positions")


def test_unbiased_random_k_has_the_input_as_its_mean_and_the_promised_error() -> None:
    codec, x, draws = RandomK(0.1, unbiased=True), gauss(100), 4000
    decoded = np.array([round_trip(codec, x, key * 7919).astype(np.float64) for key in range(draws)])
    # Each value is ten times itself with probability 0.1.
    for i in (0, 50, 99):
        check_normal((decoded[:, i].mean() - x[i]) / (abs(x[i]) * (9 / draws) ** 0.5), f"mean of element {i}")
    error = np.square(decoded - x).sum(axis=1).mean() / np.square(x, dtype=np.float64).sum()
    assert error == pytest.approx(codec.omega, rel=0.05) and codec.omega == 9


def test_biased_random_k_sends_values_as_they_are() -> None:
    x = gauss(100)
    decoded = round_trip(RandomK(0.1), x)
    kept = np.flatnonzero(decoded)
    assert len(kept) == 10
    check_same_bits(decoded[kept], x[kept])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_messages_of_random_k_add_up(ranks: int, unbiased: bool) -> None:
    """linear gives the mean that allgather gives, for one value in place of each payload."""
    inputs = [[gauss(1000, rank), gauss(77, 100 + rank)] for rank in range(ranks)]
    codec = RandomK(0.1, unbiased)
    linear, gathered = (check_exchange(exchange, codec, inputs) for exchange in ("linear", "allgather"))
    for piece, other in zip(linear[0].pieces, gathered[0].pieces):
        np.testing.assert_allclose(piece.out, other.out, atol=1e-6)
    assert linear[0].wire_bytes == 2 * (ranks - 1) / ranks * 4 * (2 + 100 + 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_not_finite_is_seen_by_all(value: float) -> None:
    inputs = [[gauss(1000, rank), gauss(50)] for rank in range(3)]
    inputs[1][0][123] = value
    jobs = check_exchange("linear", RandomK(0.01), inputs)
    assert np.isnan(jobs[0].pieces[0].out).all()
    assert np.isfinite(jobs[0].pieces[1].out).all()


def test_what_random_k_did_not_send_stays() -> None:
    inputs = [[gauss(1000, rank)] for rank in range(3)]
    jobs = make_jobs(RandomK(0.1), inputs, keep_error=True)
    run_exchange("linear", jobs)
    for job, arrays in zip(jobs, inputs):
        piece = job.pieces[0]
        positions, _ = RandomK(0.1).positions(1000, piece.key())
        expected = arrays[0].copy()
        expected[positions] = 0
        check_same_bits(piece.x, expected)


def test_ranks_that_mean_different_sums_find_out() -> None:
    inputs = [[gauss(1000, rank)] for rank in range(2)]
    jobs = make_jobs([RandomK(0.1), RandomK(0.1, unbiased=True)], inputs)
    with pytest.raises(ExchangeError, match="do not agree on what they add up"):
        run_exchange("linear", jobs)


@pytest.mark.parametrize("change", ["step", "stream"])
def test_ranks_that_draw_other_positions_find_out(change: str) -> None:
    """As with another seed, or after a rank that had joined comes back."""
    inputs = [[gauss(1000, rank)] for rank in range(2)]
    jobs = make_jobs(RandomK(0.1), inputs)
    piece = jobs[1].pieces[0]
    setattr(piece, change, getattr(piece, change) + 1)
    with pytest.raises(ExchangeError, match=r"another seed, or other steps behind them.*reset\(\)"):
        run_exchange("linear", jobs)


# -- RowTopK -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("codec", [RowTopK(0.1, 64), RowTopK(0.5, 7), RowTopK(1, 100)], ids=str)
def test_the_largest_of_each_row_are_kept(codec: RowTopK, name: str) -> None:
    x = HARD[name]
    decoded = round_trip(codec, x)
    for start in range(0, x.size, codec.row):
        row, found = x[start : start + codec.row], decoded[start : start + codec.row]
        if not np.isfinite(row).all():
            assert np.isnan(found).all()
            continue
        kept = sorted(range(row.size), key=lambda i: (-abs(float(row[i])), i))[: codec.kept(row.size)]
        expected = np.zeros_like(row)
        expected[kept] = row[kept]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_positions_of_rows_that_are_not_ascending_or_too_large_are_refused(backend: str) -> None:
    codec, wrap = RowTopK(0.5, 4), as_is if backend != "torch" else wrapper("torch")
    values = np.ones(3, "<f4").view(np.uint8)
    for positions in ([1, 1, 0], [2, 1, 0], [0, 1, 2]):
        packed = sum(position << (2 * i) for i, position in enumerate(positions))
        payload = np.append(values, np.uint8(packed))
        out = np.ones(6, np.float32)
        with pytest.raises(PayloadError, match="not ascending or too large"):
            kernels_for(codec, backend).decode_into(wrap(payload), wrap(out))
        assert (out == 1).all()


# -- GlobalTopK --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_largest_of_all_tensors_are_kept(ranks: int) -> None:
    inputs = [[gauss(300, rank), 10 * gauss(200, 50 + rank), 0.01 * gauss(500, rank)] for rank in range(ranks)]
    inputs = [[x.astype(np.float32) for x in arrays] for arrays in inputs]
    jobs = check_exchange("allgather", GlobalTopK(0.1), inputs, keep_error=True)
    total = np.zeros(1000)
    for job, arrays in zip(jobs, inputs):
        whole = np.concatenate(arrays)
        sent = round_trip(TopK(k=100), whole)
        total += sent
        check_same_bits(np.concatenate([piece.x for piece in job.pieces]), whole - sent)
    np.testing.assert_allclose(np.concatenate([piece.out for piece in jobs[0].pieces]), total / ranks, atol=1e-6)
    # The small tensor gets nothing: it is not a share of each.
    assert not jobs[0].pieces[2].out.any() and jobs[0].pieces[1].out.any()


# -- ThresholdTopK -----------------------------------------------------------------------------


def encode(kernels: Any, x: np.ndarray, wrap: Any = as_is) -> np.ndarray:
    payload = np.empty(kernels.codec.payload_size(x.size), np.uint8)
    return payload[: kernels.encode_into(wrap(x), wrap(payload))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_t"])
def test_the_number_of_values_follows_the_ratio(method: str, draw: str) -> None:
    """All values above some threshold and no others, and about as many as were asked for."""
    codec, rng = ThresholdTopK(0.01, method=method), np.random.default_rng(0)
    backends = ("numpy", "numba", "torch")
    memories: list[dict[str, Any]] = [{}, {}, {}]
    counts = []
    for _ in range(40):
        x = getattr(rng, draw)(*[5] * (draw == "standard_t"), size=20000).astype(np.float32)
        made = [
            encode(kernels_for(codec, backend).with_memory(memory), x, wrapper(backend))
            for backend, memory in zip(backends, memories)
        ]
        for other in made[1:]:
            check_same_bits(other, made[0])
        decoded = codec.decode(made[0], x.shape)
        kept = decoded != 0
        counts.append(int(kept.sum()))
        check_same_bits(decoded[kept], x[kept])
        assert np.abs(x[kept]).min() >= np.abs(x[~kept]).max()
        assert counts[-1] <= MOST * 200
    assert memories[0] == memories[1] == memories[2]
    # A fit of a family that the data is not of is off where more stages would make it send even more.
    assert 150 <= np.mean(counts[20:]) <= (340 if method == "sidco-pareto" else 260), counts


def test_an_exact_threshold_is_used_again_and_renewed_in_time() -> None:
    codec, memory = ThresholdTopK(0.01, every=3), {}
    kernels = codec.with_memory(memory)
    thresholds = []
    for seed in range(6):
        encode(kernels, gauss(10000, seed))
        thresholds.append(memory["threshold"])
    assert len(set(thresholds[:3])) == len(set(thresholds[3:])) == 1 and thresholds[0] != thresholds[3]
    encode(kernels, 1000 * gauss(10000, 7))
    assert memory["threshold"] > 100 * thresholds[0]
    check_same_bits(codec.encode(gauss(10000)), TopK(0.01).encode(gauss(10000)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HARD)
def test_hard_data_is_sent_or_marked(method: str, name: str) -> None:
    codec, memory, x = ThresholdTopK(0.1, method=method), {}, HARD[name]
    for _ in range(12):
        decoded = codec.decode(encode(kernels_for(codec, "numba").with_memory(memory), x), x.shape)
        if np.isfinite(x).all():
            assert ((decoded == x) | (decoded == 0)).all()
        else:
            assert np.isnan(decoded).all()


# -- SIDCo --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "draw"),
    [
        ("exponential", lambda rng, n: rng.exponential(2, n)),
        ("pareto", lambda rng, n: rng.exponential(2, n)),
        ("pareto", lambda rng, n: (rng.random(n) ** -0.2 - 1) / 0.2),
        ("gamma", lambda rng, n: rng.gamma(0.6, 3, n)),
    ],
)
@pytest.mark.parametrize("ratio", [0.1, 0.01])
def test_a_fit_of_the_right_family_finds_the_quantile(fit: str, draw: Any, ratio: float) -> None:
    x = draw(np.random.default_rng(1), 400_000).astype(np.float32)
    achieved = float((x > sidco.tail(sidco.moments(x), ratio, fit)).mean())
    # gamma is an expansion for small ratios; a fit by moments of a heavy tail is no better than its moments.
    assert achieved == pytest.approx(ratio, rel=0.25)


def test_stages_help_where_the_family_is_wrong() -> None:
    x = np.abs(np.random.default_rng(2).standard_t(3, 400_000)).astype(np.float32)
    errors = [
        abs(np.log(float((x > sidco.threshold(x, 0.001, "exponential", stages)).mean()) / 0.001)) for stages in (1, 4)
    ]
    assert errors[1] < errors[0] / 2


def test_stages_follow_the_achieved_number() -> None:
    memory: dict[str, Any] = {}
    for _ in range(sidco.ADAPT_EVERY):
        sidco.adapt(memory, 0.5, 0.01)
    assert memory["stages"] == 2
    for _ in range(50 * sidco.ADAPT_EVERY):
        sidco.adapt(memory, 0.5, 0.01)
    assert memory["stages"] == sidco.most_stages(0.01) == 7
    for _ in range(50 * sidco.ADAPT_EVERY):
        sidco.adapt(memory, 2.0, 0.01)
    assert memory["stages"] == 1


# -- Sign ---------------------------------------------------------------------------------------


@given(length=st.integers(0, 100), bucket=st.sampled_from([8, 16, 24]), seed=st.integers(0, 99))
def test_values_become_the_mean_magnitude_of_their_bucket(length: int, bucket: int, seed: int) -> None:
    x = gauss(length, seed)
    decoded = round_trip(Sign(bucket), x)
    assert len(Sign(bucket).encode(x)) == 4 * -(-length // bucket) + -(-length // 8)
    for start in range(0, length, bucket):
        part = x[start : start + bucket]
        mean = np.abs(part, dtype=np.float64).mean()
        np.testing.assert_allclose(decoded[start : start + bucket], np.where(part < 0, -mean, mean), rtol=1e-6)


def test_sign_keeps_its_share_of_the_norm() -> None:
    x = gauss(512)
    error = np.square(round_trip(Sign(), x).astype(np.float64) - x).sum() / np.square(x, dtype=np.float64).sum()
    share = np.abs(x).sum(dtype=np.float64) ** 2 / 512 / np.square(x, dtype=np.float64).sum()
    assert error == pytest.approx(1 - share, rel=1e-4)


def test_a_bucket_that_is_not_finite_spoils_itself_alone() -> None:
    x = gauss(24)
    x[9] = np.inf
    decoded = round_trip(Sign(8), x)
    assert np.isnan(decoded[8:16]).all() and np.isfinite(decoded[:8]).all() and np.isfinite(decoded[16:]).all()
    assert not round_trip(Sign(8), np.zeros(9, np.float32)).any()
