"""Error feedback over several steps: nothing is lost, doubled or spoiled, and it survives a restart."""

from __future__ import annotations

import io
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from rank_checks import (
    LR,
    Parameters,
    assert_same_on_all_ranks,
    backward,
    digest,
    dyadic,
    gather,
    make_gradients,
    make_optimizer,
    make_parameters,
    train,
)

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback import EF21, ErrorFeedback, LoCo
from hvd_qsgd.torch import Compressor, DGCCompressor, QSGDCompressor, TopKCompressor

SHAPES = {"first": (40, 50), "bias": (50,), "second": (30, 41)}
COMPRESSED = ["first", "second"]


def residuals(compressor: Compressor) -> dict[str, torch.Tensor]:
    held = compressor.state_dict()["arrays"]
    return {name: held[f"residual/{name}"].clone() for name in COMPRESSED}


def state_digest(compressor: Compressor) -> torch.Tensor:
    state = compressor.state_dict()
    return digest([*state["arrays"].values(), torch.tensor(list(state["steps"].values()))])


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, flat, in float64."""
    return torch.stack(gather(tensor.reshape(-1))).double().sum(0)


@pytest.mark.parametrize(
    ("compressor", "exact"),
    [
        (TopKCompressor(), True),
        (TopKCompressor(k=100, values="float16"), True),
        (QSGDCompressor(3, rounding="nearest", exchange="allgather"), False),
        (QSGDCompressor(3, rounding="nearest", exchange="scatter_gather"), False),
        (QSGDCompressor(3, rounding="nearest", exchange="allreduce"), False),
        (QSGDCompressor(3, exchange="scatter_gather", error_feedback=True), False),
    ],
    ids=repr,
)
def test_what_is_not_sent_is_kept(compressor: Compressor, exact: bool) -> None:
    """Over all ranks, inputs and old residuals are what was sent and the new residuals."""
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor)
    old = {name: torch.zeros(parameters[name].numel()) for name in COMPRESSED}
    for step in range(4):
        optimizer.zero_grad()
        raw = make_gradients(parameters, step)
        backward(parameters, raw)
        optimizer.step()
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        new = residuals(compressor)
        for name in COMPRESSED:
            before = total(raw[name]) + total(old[name])
            after = hvd.size() * parameters[name].grad.double().reshape(-1) + total(new[name])
            if exact:
                # The inputs are such that sums do not round.
                assert_equal(after, before)
            else:
                torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
            assert new[name].any()
        old = new


def test_top_k_residuals_are_what_this_rank_kept_back() -> None:
    compressor = TopKCompressor(k=20)
    x = dyadic((60, 70))
    corrected = x.clone()
    for _ in range(3):
        hvd.allreduce(x, name="x", compression=compressor)
        largest = torch.zeros(x.numel(), dtype=torch.bool)
        # Of equal magnitudes the first is sent.
        largest[corrected.view(-1).abs().sort(descending=True, stable=True).indices[:20]] = True
        expected = corrected.masked_fill(largest.view_as(x), 0)
        assert_equal(compressor.state_dict()["arrays"]["residual/x"].view_as(x), expected)
        corrected = x + expected


# -- synchronize() before step() --------------------------------------------------------------


def start(compressor: Any, **settings: Any) -> tuple[Parameters, Any]:
    """A training after its first step."""
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor, **settings)
    train(optimizer, parameters, [0])
    optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("settings", "again"),
    [({}, 1.0), ({"groups": 1}, 1.0), ({"op": hvd.Sum}, hvd.size()), ({"backward_passes_per_step": 2}, 1.0)],
    ids=str,
)
def test_step_after_synchronize(settings: dict[str, Any], again: float, skip: bool, clip: bool) -> None:
    compressor, plain = TopKCompressor(), TopKCompressor()
    parameters, optimizer = start(compressor, **settings)
    others, other_optimizer = start(plain, **settings)
    for seed in range(1, 4):
        for _ in range(settings.get("backward_passes_per_step", 1)):
            backward(parameters, make_gradients(parameters, seed))
        before = residuals(compressor)
        optimizer.synchronize()
        # A checkpoint has the weights of before the step.
        for name, residual in residuals(compressor).items():
            assert_equal(residual, before[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        reduced = {name: p.grad.clone() for name, p in parameters.items()}
        weights = {name: p.detach().clone() for name, p in parameters.items()}
        sent = compressor.stats().wire_bytes
        if skip:
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            with pytest.warns(UserWarning, match="without optimizer.skip_synchronize"):
                optimizer.step()
        factor = 1.0 if skip else again  # Horovod sums a second time, too.
        for name, parameter in parameters.items():
            assert_equal(parameter.grad, reduced[name] * factor)
            assert_equal(parameter, weights[name] - LR * parameter.grad)
        for _ in range(settings.get("backward_passes_per_step", 1)):
            backward(others, make_gradients(others, seed))
        other_optimizer.step()
        assert_equal(state_digest(compressor), state_digest(plain))
        assert compressor.stats().wire_bytes == sent
        assert_same_on_all_ranks(parameters.values())
        optimizer.zero_grad()
        other_optimizer.zero_grad()


def test_gradients_that_come_after_synchronize_are_compressed() -> None:
    compressor = TopKCompressor()
    parameters, optimizer = start(compressor)
    backward(parameters, make_gradients(parameters, 1))
    optimizer.synchronize()
    exchanges = compressor.stats().tensors["first"].exchanges
    backward(parameters, make_gradients(parameters, 2))
    with pytest.warns(UserWarning, match="without optimizer.skip_synchronize"):
        optimizer.step()
    assert compressor.stats().tensors["first"].exchanges == exchanges + 1
    assert_same_on_all_ranks(parameters.values())


@pytest.mark.parametrize("then", ["too few passes", "gradients on one rank only", "a gradient by hand"])
def test_a_step_that_was_skipped_after_synchronize(then: str) -> None:
    """As a gradient scaler does: what the next synchronize() gets is no result of the one before."""
    parameters, optimizer = start(TopKCompressor(), backward_passes_per_step=2 if then == "too few passes" else 1)
    for _ in range(optimizer.backward_passes_per_step):
        backward(parameters, make_gradients(parameters, 1))
    optimizer.synchronize()
    optimizer.zero_grad()
    gradients = make_gradients(parameters, 2)
    if then == "a gradient by hand":
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
    elif then == "too few passes" or hvd.rank() == 0:
        backward(parameters, gradients)
    if then == "a gradient by hand":
        with pytest.warns(UserWarning, match="without optimizer.skip_synchronize"):
            optimizer.step()
        assert_same_on_all_ranks(parameters.values())
        return
    optimizer.synchronize()
    assert_same_on_all_ranks([p.grad for p in parameters.values()])
    with optimizer.skip_synchronize():
        optimizer.step()


FEEDBACKS = [
    lambda: TopKCompressor(),
    lambda: TopKCompressor(error_feedback=ErrorFeedback("int8")),
    lambda: TopKCompressor(error_feedback=EF21()),
    lambda: QSGDCompressor(rounding="nearest", error_feedback=LoCo()),
    lambda: QSGDCompressor(rounding="nearest", error_feedback=LoCo(kept_as="float32")),
    lambda: DGCCompressor(0.01, warm_up=()),
]


@pytest.mark.parametrize("make", FEEDBACKS, ids=lambda make: repr(make()))
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_dropped_leave_no_trace(make: Any, set_to_none: bool) -> None:
    """As those that the loss of a generator makes in a discriminator."""
    ends = []
    for drops in (False, True):
        compressor = make()
        parameters, optimizer = start(compressor)
        for seed in range(1, 4):
            for dropped in (70, 71) if drops else ():
                before = compressor.state_dict()
                backward(parameters, make_gradients(parameters, dropped + seed))
                optimizer.synchronize()
                after = compressor.state_dict()
                for part in ("arrays", "numbers"):
                    assert before[part].keys() == after[part].keys()
                    for name in before[part]:
                        assert_equal(torch.as_tensor(after[part][name]), torch.as_tensor(before[part][name]))
                for parameter in parameters.values():
                    parameter.grad = None if set_to_none else parameter.grad.zero_()
                if dropped == 71:
                    # As an elastic job does that is interrupted here: what is loaded has nothing to be dropped.
                    compressor.load_state_dict(after)
            train(optimizer, parameters, [seed])
            optimizer.zero_grad()
        state = compressor.state_dict()
        ends.append(digest([*parameters.values(), *state["arrays"].values()]))
    assert_equal(ends[1], ends[0])


def test_synchronized_gradients_may_be_added_up() -> None:
    """A program that synchronizes after each of several backward passes applies them all."""
    compressor = TopKCompressor()
    parameters, optimizer = start(compressor)
    weights, before = {n: p.detach().clone() for n, p in parameters.items()}, residuals(compressor)
    raw = [make_gradients(parameters, seed) for seed in (1, 2)]
    for gradients in raw:
        backward(parameters, gradients)
        optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    after = residuals(compressor)
    for name in COMPRESSED:
        arrived = (weights[name] - parameters[name].detach()).double().view(-1) * hvd.size() / LR + total(after[name])
        sent = total(before[name]) + sum(total(gradients[name]) for gradients in raw)
        torch.testing.assert_close(arrived, sent, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", FEEDBACKS[:5], ids=lambda make: repr(make()))
def test_single_tensors_that_are_not_applied(make: Any) -> None:
    compressor = make()
    x = dyadic((60, 70))
    hvd.allreduce(x, name="x", compression=compressor)
    before = compressor.state_dict()["arrays"]
    hvd.allreduce(3 * x, name="x", compression=compressor)
    compressor.discard_last()
    after = compressor.state_dict()["arrays"]
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert_equal(after[name], array)


# -- what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "compressor",
    [
        TopKCompressor(),
        QSGDCompressor(rounding="nearest", exchange="allgather"),
        QSGDCompressor(rounding="nearest", exchange="scatter_gather"),
        QSGDCompressor(rounding="nearest", exchange="allreduce"),
    ],
    ids=repr,
)
def test_residuals_survive_what_is_not_finite(compressor: Compressor) -> None:
    parameters, optimizer = start(compressor)
    for step, value in enumerate([float("nan"), float("inf"), float("-inf")]):
        before = residuals(compressor)
        raw = make_gradients(parameters, step)
        if hvd.rank() == hvd.size() - 1:
            raw["first"].view(-1)[700] = value
        backward(parameters, raw)
        optimizer.step()
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        spoiled = parameters["first"].grad.isnan().view(-1)
        if isinstance(compressor, TopKCompressor):
            assert spoiled.all()
        else:
            assert spoiled[512:1024].all() and int(spoiled.sum()) == 512
        assert not parameters["second"].grad.isnan().any()
        after = residuals(compressor)
        assert_equal(after["first"], before["first"])
        assert not torch.equal(after["second"], before["second"])
        assert all(residual.isfinite().all() for residual in after.values())
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [QSGDCompressor, TopKCompressor])
def test_gradient_scaler_skips_the_step_on_all_ranks(kind: type[Compressor]) -> None:
    compressor = kind()
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for seed in range(4):
        optimizer.zero_grad()
        raw = make_gradients(parameters, seed)
        if seed == 2 and hvd.rank() == 1:
            raw["first"][0, 0] = float("inf")
        backward(parameters, {name: scaler.scale(gradient) for name, gradient in raw.items()})
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, before[name]) == (seed == 2)
            assert parameter.isfinite().all()
        assert scaler.get_scale() == (8.0 if seed < 2 else 4.0)
        assert_same_on_all_ranks(parameters.values())


# -- restart ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": TopKCompressor},
        {"kind": QSGDCompressor},
        {"kind": QSGDCompressor, "rounding": "nearest", "exchange": "scatter_gather"},
        {"kind": QSGDCompressor, "rounding": "nearest", "exchange": "allreduce"},
    ],
    ids=str,
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    kind = settings.pop("kind")

    def run(saved: bytes | None, start: Parameters, seeds: range) -> tuple[bytes, Parameters, torch.Tensor]:
        # Horovod's hooks of an earlier optimizer would stay on the parameters.
        weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
        compressor = kind(**settings)
        if saved is not None:
            compressor.load_state_dict(torch.load(io.BytesIO(saved)))
        train(make_optimizer(weights, compressor), weights, seeds)
        stream = io.BytesIO()
        torch.save(compressor.state_dict(), stream)
        return stream.getvalue(), weights, digest([*weights.values(), state_digest(compressor)])

    beginning = make_parameters(SHAPES)
    _, _, uninterrupted = run(None, beginning, range(6))
    saved, halfway, _ = run(None, beginning, range(3))
    _, _, resumed = run(saved, halfway, range(3, 6))
    assert_equal(resumed, uninterrupted)
    _, _, forgotten = run(None, halfway, range(3, 6))
    assert not torch.equal(forgotten, uninterrupted)


def test_saved_state_does_not_change_later() -> None:
    compressor = TopKCompressor()
    parameters, optimizer = start(compressor)
    state = compressor.state_dict()
    saved = [value.clone() for value in state["arrays"].values()]
    other = TopKCompressor()
    other.load_state_dict(state)
    train(optimizer, parameters, [1])
    for now, then in zip(state["arrays"].values(), saved, strict=True):
        assert_equal(now, then)
    assert_equal(state_digest(other), digest([*saved, torch.tensor(list(state["steps"].values()))]))


def test_state_of_another_compressor_is_refused() -> None:
    with pytest.raises(ConfigError, match="settings of the saved run"):
        TopKCompressor().load_state_dict(QSGDCompressor().state_dict())


def test_a_changed_model_is_refused_until_reset() -> None:
    compressor = TopKCompressor()
    hvd.allreduce(dyadic((40, 50)), name="x", compression=compressor)
    with pytest.raises(ConfigError, match="reset"):
        hvd.allreduce(dyadic((40, 51)), name="x", compression=compressor)
    compressor.reset()
    hvd.allreduce(dyadic((40, 51)), name="x", compression=compressor)
    assert len(compressor.state_dict()["arrays"]["residual/x"]) == 40 * 51
