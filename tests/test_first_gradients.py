"""What is remembered of a first gradient, which may be zero or of low rank, must not harm the later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from checkers import gauss
from test_summed import Cluster

from hvd_qsgd import (
    QSGD,
    Cast,
    Codec,
    EliasQSGD,
    GlobalTopK,
    Identity,
    IntSGD,
    MinMax,
    PowerSGD,
    RandomK,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.codecs import CODECS
from hvd_qsgd.codecs.topk_threshold import METHODS
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.exchanges.powersgd import orthogonalized
from hvd_qsgd.feedback import EF21, FEEDBACKS, ErrorFeedback, Feedback, LoCo, MomentumCorrection

SHAPE = (40, 50)
STEPS = 10
ALL: list[Codec] = [
    QSGD(),
    TopK(0.1),
    GlobalTopK(0.1),
    RowTopK(0.1),
    *(ThresholdTopK(0.1, method=method) for method in METHODS),
    Sign(),
    RandomK(0.1),
    EliasQSGD(),
    Scaled(EliasQSGD()),
    MinMax(),
    Identity(),
    Cast(),
    PowerSGD(4),
    IntSGD(),
]
PAIRS = [(exchange, codec) for codec in ALL for exchange in exchanges_for(codec)]
BACKENDS = ["numpy", "torch"]
ZERO = np.zeros(SHAPE, np.float32)
ONE = np.outer(gauss(40, 1), gauss(50, 2))
BEGINNINGS = {"zero": [ZERO], "rank one": [ONE], "gone for long": [ONE] + [ZERO] * 20}
KINDS: list[tuple[Feedback, Codec]] = [
    *((kind, codec) for kind in (ErrorFeedback(), ErrorFeedback("int8"), EF21()) for codec in (TopK(0.1), PowerSGD(4))),
    (LoCo(), QSGD()),
    (MomentumCorrection(0.5), TopK(0.1)),
]


def later(rank: int) -> np.ndarray:
    """Gradients of rank 4, and a little more."""
    exact = gauss(40 * 4, 3).reshape(40, 4) @ gauss(4 * 50, 4).reshape(4, 50)
    return (exact + 0.01 * gauss(2000, 5 + rank).reshape(SHAPE)).astype(np.float32)


def error_after(beginning: Sequence[np.ndarray], *how: Any, number: int = 0) -> float:
    """Relative error of the sum of the later steps, after some first ones."""
    cluster = Cluster(how[0], 2, *how[1:])
    cluster.number = number
    for x in beginning:
        cluster.step([[x], [x]])
    total = np.zeros(2000)
    for _ in range(STEPS):
        total += cluster.step([[later(0)], [later(1)]])[0].pieces[0].out
    wanted = STEPS * (later(0).astype(np.float64) + later(1)).reshape(-1) / 2
    return float(np.linalg.norm(total - wanted) / np.linalg.norm(wanted))


def check(beginning: str, *how: Any) -> None:
    first = BEGINNINGS[beginning]
    # The same random words as behind the beginning.
    clean = error_after([], *how, number=len(first))
    assert error_after(first, *how) <= 1.05 * clean + 0.01, clean


def test_every_codec_and_feedback_is_here() -> None:
    assert {codec.name for codec in ALL} == {*CODECS} - {"rows"}
    assert {type(kind) for kind, _ in KINDS} == {*FEEDBACKS.values()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize(("exchange", "codec"), PAIRS, ids=str)
def test_codecs_recover(exchange: str, codec: Codec, beginning: str, backend: str) -> None:
    check(beginning, codec, backend, False, exchange)


@pytest.mark.parametrize(("kind", "codec"), KINDS, ids=str)
def test_feedback_recovers(kind: Feedback, codec: Codec) -> None:
    check("zero", codec, "numpy", True, exchanges_for(codec)[0], kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
def test_powersgd_does_not_depend_on_the_size_of_gradients(scale: float, backend: str) -> None:
    outcomes = []
    for factor in (1.0, scale):
        cluster = Cluster(PowerSGD(4), 2, backend)
        for x in (ONE, later(0), later(0), later(0)):
            out = cluster.step([[(x * factor).astype(np.float32)]] * 2)[0].pieces[0].out / factor
        outcomes.append(out)
    np.testing.assert_allclose(outcomes[1], outcomes[0], atol=0.05)
    np.testing.assert_allclose(outcomes[0], later(0).reshape(-1), atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_are_drawn_anew_on_all_ranks_alike(backend: str) -> None:
    cluster = Cluster(PowerSGD(4), 3, backend)
    seen = []
    for x in (ZERO, ZERO, ONE, later(0)):
        cluster.step([[x]] * 3)
        factors = [np.array(memory[0]["q"]) for memory in cluster.memories]
        assert all(np.array_equal(factor, factors[0]) for factor in factors)
        assert np.linalg.matrix_rank(factors[0]) == 4
        seen.append(factors[0])
    assert not np.array_equal(seen[0], seen[1]) and np.abs(seen[2]).max() == 1
    # As it is in a checkpoint that was saved before columns were drawn anew, or where two are the same.
    for factor in (0, 2):
        for memory in cluster.memories:
            memory[0]["q"][:, 1] = factor * memory[0]["q"][:, 0]
        errors = []
        for _ in range(3):
            out = cluster.step([[later(0)]] * 3)[0].pieces[0].out
            errors.append(float(np.abs(out - later(0).reshape(-1)).max()))
        assert errors[0] > 1 > 0.1 > errors[2]


def test_columns_far_apart_in_size_become_orthonormal() -> None:
    matrix = gauss(200).reshape(50, 4) * np.array([1e-30, 1, 1e30, 1e-10], np.float32)
    basis = orthogonalized(matrix)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
