"""Error feedback: the invariant, and the guard against residuals that grow without bound."""

from __future__ import annotations

import numpy as np
import pytest
from checkers import check_exchange, check_same_bits, gauss, qsgd_codecs
from hypothesis import given
from hypothesis import strategies as st

from hvd_qsgd import QSGD, Cast, Codec, ConfigError, Identity, TopK
from hvd_qsgd.codecs.random_words import key_of
from hvd_qsgd.feedback import EF21, ErrorFeedback, Feedback, LoCo, check_feedback


def residuals(codec: Codec, steps: int, length: int = 8192) -> list[float]:
    """Root mean square of the residual of each step, under a fresh Gaussian gradient each step."""
    feedback = ErrorFeedback()
    sizes = []
    for step in range(steps):
        corrected = feedback.correct("w", gauss(length, step))
        codec.decode_into(codec.encode(corrected, key_of(0, step)), corrected, "subtract")
        feedback.keep("w", corrected)
        sizes.append(float(np.sqrt(np.square(corrected, dtype=np.float64).mean())))
    return sizes


def accepted(codec: Codec) -> bool:
    try:
        check_feedback(codec)
    except ConfigError:
        return False
    return True


# The residual after 1, 10 and 50 steps, measured by an independent program.
BOUNDED = [
    (QSGD(norm="l2", rounding="nearest"), 0.85, 1.87, 2.49),
    (QSGD(bits=2, bucket_size=128), 1.15, 3.91, 3.91),
    (QSGD(bits=2, bucket_size=128, rounding="nearest"), 0.74, 1.15, 1.11),
    (QSGD(), 0.18, 0.18, 0.20),
    (QSGD(bits=8, norm="l2"), 0.07, 0.07, 0.07),
]


@pytest.mark.parametrize(("codec", "first", "tenth", "fiftieth"), BOUNDED, ids=str)
def test_accepted_codecs_keep_residuals_bounded(codec: Codec, first: float, tenth: float, fiftieth: float) -> None:
    assert accepted(codec)
    sizes = residuals(codec, 50)
    # The tenth and the fiftieth depend on the sample more than the first does.
    assert sizes[0] == pytest.approx(first, rel=0.08)
    assert sizes[9] == pytest.approx(tenth, rel=0.25)
    assert sizes[49] == pytest.approx(fiftieth, rel=0.25)
    assert max(sizes[25:]) < 2 * max(sizes[:25])


def test_refused_codec_makes_residuals_explode() -> None:
    codec = QSGD(norm="l2")
    assert not accepted(codec)
    sizes = residuals(codec, 50)
    assert sizes[0] == pytest.approx(1.26, rel=0.05)
    assert sizes[9] > 5 * sizes[0]
    assert sizes[49] > 10 * sizes[9]
    assert sizes[49] > 100


@pytest.mark.parametrize("codec", [TopK(ratio=0.1), Cast(), Identity()], ids=str)
def test_other_codecs_are_accepted_and_bounded(codec: Codec) -> None:
    assert accepted(codec)
    sizes = residuals(codec, 60)
    # TopK leaves at most q = sqrt(1 - ratio) of what it is given: the sum of q, q^2, ... times the input.
    contraction = 0.9**0.5
    assert max(sizes) <= contraction / (1 - contraction)
    assert max(sizes[50:]) <= 1.1 * max(sizes[40:50])


@pytest.mark.parametrize("bits", range(2, 9))
def test_exactly_the_codecs_without_a_contraction_are_refused(bits: int) -> None:
    s = 2 ** (bits - 1) - 1
    for d in (*range(8, 2000, 8), 4096, 16128, 16136, 65536):
        assert accepted(QSGD(bits=bits, bucket_size=d, norm="l2")) == (min(d / s**2, d**0.5 / s) < 1)
        assert accepted(QSGD(bits=bits, bucket_size=d, norm="l2", rounding="nearest"))
        assert accepted(QSGD(bits=bits, bucket_size=d))


def test_the_refusal_names_the_numbers_and_two_remedies() -> None:
    with pytest.raises(ConfigError, match=r"= 3\.23 is not below 1") as refused:
        check_feedback(QSGD(norm="l2"))
    for remedy in ('rounding="nearest"', "error_feedback=False"):
        assert remedy in str(refused.value)


def rounded_twice(codec: Codec, feedback: Feedback, ranks: int, steps: int = 40) -> list[float]:
    """Root mean square over ranks of what scatter_gather leaves to be fed back."""
    kinds, sizes = [feedback.fresh() for _ in range(ranks)], []
    for step in range(steps):
        inputs = [[kind.correct("w", gauss(512, 100 * step + rank), ranks)] for rank, kind in enumerate(kinds)]
        jobs = check_exchange("scatter_gather", codec, inputs, backend="numba", keep_error=True, step=step)
        errors = [job.pieces[0].x for job in jobs]
        sizes.append(float(np.sqrt(np.mean(np.square(errors, dtype=np.float64)))))
        for kind, job in zip(kinds, jobs):
            kind.keep("w", job.pieces[0].x, job.pieces[0].out)
    return sizes


@pytest.mark.parametrize("feedback", [ErrorFeedback(), EF21(), LoCo()], ids=repr)
@pytest.mark.parametrize(
    "codec",
    [QSGD(2, 128), QSGD(2, 128, rounding="nearest"), QSGD(3, 128), QSGD(4)],
    ids=lambda c: f"{c.bits}{c.rounding}",
)
@pytest.mark.parametrize("ranks", [4, 8])
def test_what_diverges_where_means_are_rounded_again_is_refused(codec: Codec, feedback: Feedback, ranks: int) -> None:
    sizes = rounded_twice(codec, feedback, ranks)
    diverges = max(sizes[20:]) > 20 * sizes[0]
    assert diverges or max(sizes[20:]) < 8 * sizes[0]
    for exchange in ("scatter_gather", "by_ranks", "auto"):
        if diverges:
            with pytest.raises(ConfigError, match=f"diverges with exchange='{exchange}'.*LoCo"):
                check_feedback(codec, feedback, exchange)
        else:
            check_feedback(codec, feedback, exchange)
    for exchange in ("allgather", "allreduce"):
        check_feedback(codec, feedback, exchange)


@given(
    codec=st.one_of(qsgd_codecs(rounding="nearest"), st.builds(TopK, ratio=st.floats(0.01, 1))),
    length=st.integers(0, 100),
    seed=st.integers(0, 99),
)
def test_input_and_old_residual_are_sent_or_kept(codec: Codec, length: int, seed: int) -> None:
    feedback = ErrorFeedback()
    feedback.keep("w", gauss(length, seed))
    x = gauss(length, seed + 1)
    corrected = feedback.correct("w", x)
    check_same_bits(x, gauss(length, seed + 1))
    payload = codec.encode(corrected)
    residual = corrected.copy()
    codec.decode_into(payload, residual, "subtract")
    sent = codec.decode(payload, x.shape).astype(np.float64)
    np.testing.assert_allclose(sent + residual, x.astype(np.float64) + gauss(length, seed), atol=1e-6)


def test_residuals_belong_to_names_and_the_first_step_has_none() -> None:
    feedback = ErrorFeedback()
    x = gauss(5)
    first = feedback.correct("a", x)
    assert first is not x
    check_same_bits(first, x)
    feedback.keep("a", np.ones(5, np.float32))
    check_same_bits(feedback.correct("a", x), x + np.float32(1))
    check_same_bits(feedback.correct("b", x), x)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["keep", "discard", "load"])), max_size=12))
def test_memory_that_is_used_again_changes_no_residual(steps: list[tuple[str, str]]) -> None:
    """What was discarded leaves the residual as it was, whatever was kept and discarded before."""
    feedback = ErrorFeedback()
    expected = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    for number, (name, action) in enumerate(steps):
        x = gauss(4, number)
        corrected = feedback.correct(name, x)
        check_same_bits(corrected, x + expected[name])
        check_same_bits(x, gauss(4, number))
        corrected *= np.float32(0.5)
        if action == "keep":
            expected[name] = corrected.copy()
            feedback.keep(name, corrected)
        elif action == "discard":
            feedback.discard(name, corrected)
        else:
            feedback.load({f"residual/{key}": value.copy() for key, value in expected.items()}, {})


def test_a_residual_of_another_length_is_refused_with_the_remedy() -> None:
    feedback = ErrorFeedback()
    feedback.keep("w", np.ones(5, np.float32))
    with pytest.raises(ConfigError, match=r"residual of 5 elements for 'w'.* a gradient of 6 .*reset\(\)"):
        feedback.correct("w", np.ones(6, np.float32))
