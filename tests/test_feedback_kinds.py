"""Each kind of feedback against its formulas, over simulated ranks and every exchange of a codec."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from checkers import as_is, check_same_bits, gauss, run_exchange, run_torch_exchange, wrapper

from hvd_qsgd import QSGD, Codec, ConfigError, ExchangeError, Scaled, ThresholdTopK, TopK, codec_from_config
from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.exchanges import Job, Piece, exchanges_for
from hvd_qsgd.feedback import (
    EF21,
    FEEDBACKS,
    ErrorFeedback,
    Feedback,
    LoCo,
    MomentumCorrection,
    check_feedback,
    feedback_from_config,
)
from hvd_qsgd.feedback.store import KEPT_AS, Store
from hvd_qsgd.kernels import kernels_for

RANKS = 4
KINDS: list[Feedback] = [
    ErrorFeedback(),
    ErrorFeedback("bfloat16"),
    ErrorFeedback("int8"),
    EF21(),
    LoCo(),
    LoCo(0.5, 5, "float32"),
    MomentumCorrection(),
    MomentumCorrection(0.5, nesterov=True, masking=False, clip=1.0),
]
PAIRS = [
    ("allgather", TopK(ratio=0.1)),
    *((exchange, QSGD(bits=3, rounding="nearest")) for exchange in exchanges_for(QSGD())),
    *((exchange, Scaled(QSGD(norm="l2"))) for exchange in exchanges_for(QSGD())),
]
EACH_PAIR = pytest.mark.parametrize(("exchange", "codec"), PAIRS, ids=str)


def step(
    kinds: list[Feedback],
    codec: Codec,
    exchange: str,
    inputs: list[np.ndarray],
    number: int,
    backend: str = "numba",
) -> list[Job]:
    """One step of a tensor on all ranks; the means are in the jobs' pieces."""
    wrap, jobs = wrapper(backend), []
    for rank, (kind, x) in enumerate(zip(kinds, inputs)):
        corrected = kind.correct("w", wrap(x), len(kinds))
        piece = Piece("w", corrected, wrap(np.empty_like(x)), stream_of(0, rank, "w"), number, keep_error=True)

        def empty(length: int, dtype: str) -> Any:
            return wrap(np.empty(length, dtype))

        jobs.append(Job("job", [piece], kernels_for(codec, backend), rank, len(kinds), empty))
    (run_torch_exchange if backend == "torch" else run_exchange)(exchange, jobs)
    for kind, job in zip(kinds, jobs):
        piece = job.pieces[0]
        settle = kind.keep if np.isfinite(piece.out).all() else kind.discard
        settle("w", piece.x, piece.out)
    return jobs


def gradients(number: int, ranks: int = RANKS) -> list[np.ndarray]:
    return [gauss(1500, 100 * number + rank) + np.float32(rank) for rank in range(ranks)]


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_settings_survive_json_and_a_fresh_one_is_empty(kind: Feedback) -> None:
    again = feedback_from_config(json.loads(json.dumps(kind.config())))
    assert type(again) is type(kind) and again.config() == kind.config() and str(again) == str(kind)
    used = kind.fresh()
    step([used], QSGD(), "allgather", gradients(0, 1), 0)
    assert used.arrays()
    assert not used.fresh().arrays() and not kind.arrays()


def test_all_kinds_are_registered_and_others_refused() -> None:
    assert {type(kind) for kind in KINDS} == set(FEEDBACKS.values())
    with pytest.raises(ConfigError, match=f"Unknown feedback 'ef22'; known are {', '.join(sorted(FEEDBACKS))}"):
        feedback_from_config({"feedback": "ef22"})
    with pytest.raises(ConfigError, match="does not fit"):
        feedback_from_config({"feedback": "ef", "beta": 1})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ErrorFeedback("float16"),
        lambda: LoCo(1.0),
        lambda: LoCo(-0.1),
        lambda: LoCo(reset=0),
        lambda: LoCo(kept_as="int4"),
        lambda: MomentumCorrection(1.0),
        lambda: MomentumCorrection(clip=0.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(("kept_as", "loss", "size"), [("float32", 0, 4), ("bfloat16", 2**-8, 2), ("int8", 1 / 250, 1)])
def test_a_store_keeps_values_as_small_as_promised(kept_as: str, loss: float, size: int, backend: str) -> None:
    wrap = as_is if backend == "numpy" else wrapper("torch")
    store = Store(kept_as)
    for seed in range(3):
        x = gauss(2000, seed)
        store.put("w", wrap(x.copy()))
        kept = np.asarray(store.get("w"))
        assert np.abs(kept - x).max() <= loss * np.abs(x).max()
        assert (np.abs(kept - x).max() > 0) == (loss > 0)
        assert len(store._kept["w"]) * store._kept["w"].itemsize <= 2000 * size * 1.01
        # Kept a second time it is the same: checkpoints in float32 are exact.
        store.put("w", wrap(kept.copy()))
        check_same_bits(np.asarray(store.get("w")), kept)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@EACH_PAIR
def test_resuming_equals_going_on(kind: Feedback, exchange: str, codec: Codec) -> None:
    def run(kinds: list[Feedback], numbers: range) -> list[np.ndarray]:
        return [step(kinds, codec, exchange, gradients(n), n)[0].pieces[0].out for n in numbers]

    uninterrupted = [kind.fresh() for _ in range(RANKS)]
    expected = run(uninterrupted, range(6))
    first = [kind.fresh() for _ in range(RANKS)]
    run(first, range(3))
    resumed = [kind.fresh() for _ in range(RANKS)]
    for old, new in zip(first, resumed):
        new.load({path: array.copy() for path, array in old.arrays().items()}, old.numbers())
    for mean, wanted in zip(run(resumed, range(3, 6)), expected[3:]):
        check_same_bits(mean, wanted)
    forgotten = run([kind.fresh() for _ in range(RANKS)], range(3, 6))
    assert not np.array_equal(forgotten[-1], expected[-1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("exchange", "codec"),
    [*PAIRS[:2], ("scatter_gather", PAIRS[2][1]), ("allgather", ThresholdTopK(0.1, method="sample"))],
    ids=str,
)
def test_torch_tensors_are_remembered_like_numpy_arrays(kind: Feedback, exchange: str, codec: Codec) -> None:
    """As on a GPU: kernels, exchange and memory are those of torch."""
    both = {backend: [kind.fresh() for _ in range(RANKS)] for backend in ("numba", "torch")}
    for number in range(4):
        jobs = [step(kinds, codec, exchange, gradients(number), number, backend)[0] for backend, kinds in both.items()]
        outs = [job.pieces[0].out for job in jobs]
        # Norms, by which MomentumCorrection clips, are sums in another order.
        np.testing.assert_allclose(outs[1].numpy(), outs[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(*both.values()):
        assert one.numbers() == other.numbers() and one.arrays().keys() == other.arrays().keys()
        for path, array in one.arrays().items():
            np.testing.assert_allclose(other.arrays()[path].numpy(), array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_finite_leaves_no_trace(kind: Feedback) -> None:
    codec = TopK(ratio=0.1)
    kinds, spoiled = ([kind.fresh() for _ in range(2)] for _ in range(2))
    for number in range(4):
        expected = step(kinds, codec, "allgather", gradients(number, 2), number)
        inputs = gradients(number, 2)
        inputs[1][7] = np.nan
        bad = step(spoiled, codec, "allgather", inputs, number)
        assert np.isnan(bad[0].pieces[0].out).all()
        good = step(spoiled, codec, "allgather", gradients(number, 2), number)
        check_same_bits(good[0].pieces[0].out, expected[0].pieces[0].out)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_memory_of_another_kind_is_refused(kind: Feedback) -> None:
    with pytest.raises(ConfigError, match="does not know"):
        kind.fresh().load({"another/w": np.ones(3, np.float32)}, {})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_tensor_of_another_length_is_refused(kind: Feedback) -> None:
    kinds = [kind.fresh()]
    step(kinds, QSGD(), "allgather", gradients(0, 1), 0)
    with pytest.raises(ConfigError, match=r"1500 elements for 'w'.* 1501 .*reset\(\)"):
        kinds[0].correct("w", gauss(1501))


# -- EF21 --------------------------------------------------------------------------------------


def averager(kinds: list[EF21]) -> Any:
    return lambda name, array: np.mean([kind.own.get(name) for kind in kinds], axis=0, dtype=np.float64)


@EACH_PAIR
def test_ef21_keeps_the_mean_of_the_estimates(exchange: str, codec: Codec) -> None:
    kinds = [EF21() for _ in range(RANKS)]
    for number in range(30):
        jobs = step(kinds, codec, exchange, gradients(number), number)
        own = averager(kinds)("w", None)
        np.testing.assert_allclose(jobs[0].pieces[0].out, own, atol=2e-5)
        for kind, job in zip(kinds, jobs):
            check_same_bits(kind.mean.get("w"), jobs[0].pieces[0].out)
            check_same_bits(job.pieces[0].out, jobs[0].pieces[0].out)
            kind.check(averager(kinds))


@EACH_PAIR
def test_ef21_finds_gradients_that_stand_still(exchange: str, codec: Codec) -> None:
    kinds, inputs = [EF21() for _ in range(RANKS)], gradients(0)
    errors = []
    for number in range(150):
        jobs = step(kinds, codec, exchange, inputs, number)
        errors.append(float(np.linalg.norm(jobs[0].pieces[0].out - np.mean(inputs, axis=0, dtype=np.float64))))
    assert errors[-1] < 1e-3 * errors[0] < errors[0]


def test_ef21_notices_a_lost_state() -> None:
    kinds = [EF21() for _ in range(RANKS)]
    for number in range(3):
        step(kinds, TopK(ratio=0.1), "allgather", gradients(number), number)
    kinds[1].own.put("w", kinds[0].own.get("w").copy())
    with pytest.raises(ExchangeError, match=r"EF21: the estimate of 'w' .*reset\(\)"):
        kinds[0].check(averager(kinds))


# -- LoCo --------------------------------------------------------------------------------------


def test_loco_is_a_moving_average_that_is_reset() -> None:
    codec = QSGD(bits=3, rounding="nearest")
    kind, average = LoCo(0.75, 4, "float32"), np.zeros(1500)
    for number in range(9):
        x = gauss(1500, number)
        step([kind], codec, "allgather", [x], number)
        h = (x + average.astype(np.float32)).astype(np.float32)
        error = h - codec.decode(codec.encode(h), h.shape)
        average = 0.75 * average + 0.25 * error.astype(np.float64)
        if number % 4 == 3:
            average[:] = 0
        np.testing.assert_allclose(kind.average.get("w"), average, atol=1e-5)
        assert kind.numbers() == {"steps/w": (number + 1) % 4}


# -- DGC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_momentum_correction_is_the_formula(nesterov: bool, masking: bool) -> None:
    kind = MomentumCorrection(0.5, nesterov, masking)
    u, v = np.zeros(1500), np.zeros(1500)
    for number in range(6):
        x = gauss(1500, number)
        mean = step([kind], TopK(ratio=0.1), "allgather", [x], number)[0].pieces[0].out
        u = 0.5 * (u + x) if nesterov else 0.5 * u + x
        v = v + u + (x if nesterov else 0)
        largest = np.argsort(-np.abs(v))[:150]
        expected = np.zeros(1500)
        expected[largest] = v[largest]
        np.testing.assert_allclose(mean, expected, atol=1e-5)
        v[largest] = 0
        if masking:
            u[largest] = 0


def test_sending_everything_with_momentum_correction_is_momentum() -> None:
    kind, buffer = MomentumCorrection(0.9, masking=False), np.zeros(1500)
    for number in range(5):
        x = gauss(1500, number)
        buffer = 0.9 * buffer + x
        mean = step([kind], TopK(ratio=1), "allgather", [x], number)[0].pieces[0].out
        np.testing.assert_allclose(mean, buffer, atol=1e-5)


def test_each_rank_clips_its_share() -> None:
    kind, x = MomentumCorrection(clip=3.0), gauss(1500)
    corrected = kind.correct("w", x, ranks=4)
    assert np.linalg.norm(corrected) == pytest.approx(3 / 2, rel=1e-5)
    np.testing.assert_allclose(corrected / corrected[0], x / x[0], rtol=1e-5)
    small = (x / 1000).astype(np.float32)
    check_same_bits(MomentumCorrection(clip=3.0).correct("w", small, 4), small)


# -- Scaled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", exchanges_for(QSGD()))
def test_scaling_bounds_residuals_that_would_grow(exchange: str) -> None:
    def sizes(codec: Codec) -> list[float]:
        kinds = [ErrorFeedback() for _ in range(2)]
        found = []
        for number in range(60):
            step(kinds, codec, exchange, gradients(number, 2), number)
            found.append(float(np.sqrt(np.mean(kinds[0].residual.get("w") ** 2))))
        return found

    bounded, unbounded = sizes(Scaled(QSGD(norm="l2"))), sizes(QSGD(norm="l2"))
    assert max(bounded[30:]) < 2 * max(bounded[:30])
    assert unbounded[-1] > 50 * max(bounded)


def test_scaled_divides_by_one_plus_omega() -> None:
    codec, x = QSGD(norm="l2"), gauss(1500)
    scaled = Scaled(codec)
    assert scaled.factor == np.float32(1 / (1 + 512**0.5 / 7))
    check_same_bits(scaled.encode(x, 3), codec.encode(x, 3))
    check_same_bits(scaled.decode(scaled.encode(x, 3), 1500), codec.decode(codec.encode(x, 3), 1500) * scaled.factor)
    assert codec_from_config(json.loads(json.dumps(scaled.config()))) == scaled
    check_feedback(scaled)
    for refused in (QSGD(), TopK(), "qsgd"):
        with pytest.raises(ConfigError, match="needs no scaling"):
            Scaled(refused)


def test_kept_as_lists_what_stores_know() -> None:
    assert set(KEPT_AS) == {"float32", "bfloat16", "int8"}
