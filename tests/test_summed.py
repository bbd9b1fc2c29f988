"""PowerSGD and IntSGD: exchanges whose messages are added up, among simulated ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkers import (
    check_config,
    check_same_bits,
    check_same_on_all_ranks,
    gauss,
    run_exchange,
    run_torch_exchange,
)

from hvd_qsgd import ConfigError, ExchangeError, IntSGD, PowerSGD, UnsupportedError
from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.exchanges import Job, Piece
from hvd_qsgd.exchanges.powersgd import orthogonalized
from hvd_qsgd.feedback import ErrorFeedback, Feedback
from hvd_qsgd.kernels import kernels_for

SHAPES = [(40, 50), (6, 4), (32, 3, 5, 5), (50,)]
BACKENDS = ["numpy", "torch"]


class Cluster:
    """Ranks that keep residuals and memories from step to step."""

    def __init__(
        self,
        codec: Any,
        ranks: int,
        backend: str = "numpy",
        keep_error: bool = False,
        exchange: str = "",
        kind: Feedback | None = None,
    ) -> None:
        self.codec, self.ranks, self.backend, self.keep_error = codec, ranks, backend, keep_error
        self.exchange = exchange or codec.name
        self.feedback = [(kind or ErrorFeedback()).fresh() for _ in range(ranks)]
        self.memories: list[dict[int, dict[str, Any]]] = [{} for _ in range(ranks)]
        self.number = 0
        #: Ranks that have a step less behind them.
        self.late: set[int] = set()

    def step(self, inputs: list[list[np.ndarray]], tamper: Any = None) -> list[Job]:
        """Means are in the jobs' pieces, as NumPy arrays."""
        jobs = []
        for rank, arrays in enumerate(inputs):
            pieces = []
            for i, x in enumerate(arrays):
                flat = x.reshape(-1).copy()
                given = self.feedback[rank].correct(str(i), flat, self.ranks) if self.keep_error else flat
                owner = 0 if self.codec.shared_randomness else rank
                piece = Piece(
                    f"t{i}",
                    self.wrap(given),
                    self.wrap(np.zeros_like(flat)),
                    stream_of(0, owner, f"t{i}"),
                    self.number - (rank in self.late),
                    keep_error=self.keep_error,
                    shape=x.shape,
                    memory=self.memories[rank].setdefault(i, {}),
                )
                pieces.append(piece)
            backend = "numba" if self.backend == "numpy" else "torch"
            jobs.append(Job("job", pieces, kernels_for(self.codec, backend), rank, self.ranks, self.empty))
        if self.backend == "numpy":
            run_exchange(self.exchange, jobs, tamper)
        else:
            run_torch_exchange(self.exchange, jobs)
        for feedback, job in zip(self.feedback, jobs):
            for i, piece in enumerate(job.pieces):
                piece.x, piece.out = np.asarray(piece.x), np.asarray(piece.out)
                if self.keep_error:
                    settle = feedback.keep if np.isfinite(piece.out).all() else feedback.discard
                    settle(str(i), piece.x, piece.out)
        check_same_on_all_ranks(jobs)
        self.number += 1
        return jobs

    def wrap(self, array: np.ndarray) -> Any:
        if self.backend == "numpy":
            return array
        import torch

        return torch.from_numpy(array)

    def empty(self, length: int, dtype: str) -> Any:
        return self.wrap(np.empty(length, dtype))


def gradients(number: int, ranks: int, shapes: Any = SHAPES) -> list[list[np.ndarray]]:
    return [
        [gauss(int(np.prod(shape)), 1000 * number + 10 * rank + i).reshape(shape) for i, shape in enumerate(shapes)]
        for rank in range(ranks)
    ]


def means(inputs: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.mean([arrays[i] for arrays in inputs], axis=0, dtype=np.float64) for i in range(len(inputs[0]))]


# -- PowerSGD -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 50), (50, 3), (1, 4), (5, 1)])
def test_columns_become_orthonormal(shape: tuple[int, int]) -> None:
    matrix = gauss(shape[0] * min(shape)).reshape(shape[0], -1)
    basis = orthogonalized(matrix.copy())
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-4)
    np.testing.assert_allclose(basis @ (basis.T @ matrix), matrix, atol=1e-3)
    assert not orthogonalized(np.zeros((4, 2), np.float32)).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_low_rank_means_are_found_and_small_tensors_are_exact(ranks: int, backend: str) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((40, 3)), rng.standard_normal((3, 50))
    inputs = gradients(0, ranks)
    for rank in range(ranks):
        inputs[rank][0] = (left @ np.diag([rank + 1.0, 2, 1]) @ right).astype(np.float32)
    jobs = Cluster(PowerSGD(4), ranks, backend).step(inputs)
    wanted = means(inputs)
    np.testing.assert_allclose(jobs[0].pieces[0].out.reshape(40, 50), wanted[0], atol=1e-3)
    for i in (1, 3):
        np.testing.assert_allclose(jobs[0].pieces[i].out, wanted[i].reshape(-1), atol=1e-6)
    sent = 2 + 4 * 40 + 24 + 4 * 32 + 50 + 4 * 50 + 4 * 75
    assert jobs[0].wire_bytes == pytest.approx(2 * (ranks - 1) / ranks * 4 * sent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_powersgd_does_not_send_is_kept(backend: str) -> None:
    cluster = Cluster(PowerSGD(2), 3, backend, keep_error=True)
    old = [np.zeros(int(np.prod(shape))) for shape in SHAPES]
    for number in range(4):
        inputs = gradients(number, 3)
        jobs = cluster.step(inputs)
        for i, mean in enumerate(means(inputs)):
            residual = np.mean([job.pieces[i].x for job in jobs], axis=0, dtype=np.float64)
            np.testing.assert_allclose(jobs[0].pieces[i].out + residual, mean.reshape(-1) + old[i], atol=1e-5)
            old[i] = residual


def test_a_warm_start_finds_what_one_step_does_not() -> None:
    """The same gradient again and again: subspace iteration converges to its best approximation."""
    matrix = gauss(2000).reshape(40, 50)
    u, s, v = np.linalg.svd(matrix)
    best = np.linalg.norm(matrix - (u[:, :2] * s[:2]) @ v[:2])
    cluster = Cluster(PowerSGD(2), 2)
    errors = []
    for _ in range(100):
        jobs = cluster.step([[matrix], [matrix]])
        errors.append(np.linalg.norm(jobs[0].pieces[0].out.reshape(40, 50) - matrix) / best)
    assert errors[-1] < 1.01 < errors[0]


def test_backends_find_the_same_factors() -> None:
    outcomes = []
    for backend in BACKENDS:
        cluster = Cluster(PowerSGD(2), 2, backend, keep_error=True)
        for number in range(3):
            jobs = cluster.step(gradients(number, 2))
        outcomes.append([piece.out for piece in jobs[0].pieces])
    for one, other in zip(*outcomes):
        np.testing.assert_allclose(one, other, atol=1e-4)


# -- IntSGD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_integers_lie_on_the_grid_that_past_means_give(ranks: int, backend: str) -> None:
    codec = IntSGD(8, fineness=4.0, beta=0.5)
    cluster = Cluster(codec, ranks, backend)
    square: list[float] = []
    for number in range(4):
        inputs = gradients(number, ranks)
        jobs = cluster.step(inputs)
        for i, (piece, mean) in enumerate(zip(jobs[0].pieces, means(inputs))):
            out = piece.out.astype(np.float64)
            if number:
                step = (2 * ranks * square[i] / out.size) ** 0.5 / 4
                levels = out * ranks / step
                np.testing.assert_allclose(levels, np.round(levels), atol=1e-2)
                assert np.abs(out - mean.reshape(-1)).max() <= step * (1 + 1e-4)
            norm = float(np.square(out).sum())
            if number == 0:
                square.append(norm)
            else:
                square[i] = 0.5 * square[i] + 0.5 * norm
            assert piece.memory["square"] == pytest.approx(square[i], rel=1e-5)
    assert jobs[0].wire_bytes < 2 * (ranks - 1) / ranks * 4 * sum(int(np.prod(s)) for s in SHAPES) or ranks == 1


def test_rounding_to_integers_is_unbiased_and_clips() -> None:
    codec = IntSGD(3, fineness=1.0)
    cluster, x = Cluster(codec, 1), gauss(2000)
    x[0] = 100.0
    cluster.step([[x]])
    start = cluster.memories[0][0]["square"]
    total = np.zeros(2000)
    for _ in range(300):
        cluster.memories[0][0]["square"] = start
        total += cluster.step([[x]])[0].pieces[0].out
    step = (2 * start / 2000) ** 0.5
    assert total[0] / 300 == pytest.approx(3 * step, rel=1e-4)
    # The deviation of a mean of 300 is at most half a step over sqrt(300).
    assert np.abs(total[1:] / 300 - x[1:]).max() < 5 * 0.5 * step / 300**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_of_zero_leave_no_step_that_is_too_small(backend: str) -> None:
    cluster, x = Cluster(IntSGD(), 2, backend), gauss(2000)
    for square in (None, 1e-100):
        cluster.step([[x], [x]])
        if square is not None:
            # What followed from some thousand zeros before, and rounds to a step of zero.
            cluster.memories[0][0]["square"] = cluster.memories[1][0]["square"] = square
        cluster.step([[0 * x], [0 * x]])
        assert cluster.memories[0][0]["square"] == 0
        out = cluster.step([[x], [x]])[0].pieces[0].out
        assert np.abs(out - x).max() < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", [IntSGD(), IntSGD(2), IntSGD(4, fineness=8.0)], ids=str)
def test_clipping_does_not_shrink_sparse_gradients_to_nothing(codec: IntSGD, backend: str) -> None:
    cluster, rng, shares = Cluster(codec, 2, backend), np.random.default_rng(0), []
    for _ in range(60):
        inputs = [
            [np.where(rng.random(4000) < 0.005, rng.standard_normal(4000), 0).astype(np.float32)] for _ in range(2)
        ]
        mean = means(inputs)[0]
        shares.append(float(cluster.step(inputs)[0].pieces[0].out @ mean / (mean @ mean)))
    assert 0.75 < np.mean(shares[30:]) < 1.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_become_much_larger_are_soon_sent_whole(backend: str) -> None:
    cluster, x = Cluster(IntSGD(), 2, backend), gauss(2000)
    for _ in range(2):
        cluster.step([[1e-12 * x]] * 2)
    for _ in range(9):
        out = cluster.step([[x]] * 2)[0].pieces[0].out
    assert out @ x / (x @ x) > 0.8


@pytest.mark.parametrize("codec", [IntSGD(), PowerSGD()], ids=str)
def test_what_is_not_finite_is_seen_by_all_and_forgotten(codec: Any) -> None:
    cluster, expected = Cluster(codec, 2, keep_error=True), Cluster(codec, 2, keep_error=True)
    for number in range(3):
        wanted = expected.step(gradients(number, 2, [(40, 50)]))
        expected.number += 1
        spoiled = gradients(number, 2, [(40, 50)])
        spoiled[1][0][3, 4] = np.nan
        if number:
            assert np.isnan(cluster.step(spoiled)[0].pieces[0].out).any()
        else:
            cluster.number += 1
        cluster.number -= 1
        jobs = cluster.step(gradients(number, 2, [(40, 50)]))
        cluster.number += 1
        check_same_bits(jobs[0].pieces[0].out, wanted[0].pieces[0].out)


def test_grids_that_differ_are_noticed() -> None:
    cluster = Cluster(IntSGD(), 2)
    cluster.step(gradients(0, 2))
    cluster.memories[1][0]["square"] *= 1.001
    with pytest.raises(ExchangeError, match="do not agree on what they add up"):
        cluster.step(gradients(1, 2))


def test_a_rank_that_missed_steps_of_powersgd_is_noticed() -> None:
    cluster = Cluster(PowerSGD(2), 2)
    cluster.step(gradients(0, 2))
    cluster.late.add(1)
    with pytest.raises(ExchangeError, match="other steps behind them"):
        cluster.step(gradients(1, 2))


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [PowerSGD(3), IntSGD(5, 2.0, 0.5)], ids=str)
def test_they_are_records_that_cannot_stand_alone(codec: Any) -> None:
    check_config(codec)
    for call in (lambda: codec.encode(gauss(5)), lambda: codec.decode(np.zeros(3, np.uint8), 5)):
        with pytest.raises(UnsupportedError, match="cannot encode a tensor by itself"):
            call()


@pytest.mark.parametrize(
    "make",
    [
        lambda: PowerSGD(0),
        lambda: PowerSGD(1.5),
        lambda: IntSGD(1),
        lambda: IntSGD(fineness=0),
        lambda: IntSGD(beta=1),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
