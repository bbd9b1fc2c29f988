"""State of all ranks: files, gathered objects, and another number of ranks."""

from __future__ import annotations

import gc
import io
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from rank_checks import LR, backward, digest, gather, make_gradients, make_optimizer, make_parameters, train

from hvd_qsgd import TopK
from hvd_qsgd.collectives import horovod_torch
from hvd_qsgd.errors import ConfigError, ExchangeError
from hvd_qsgd.feedback import EF21, LoCo
from hvd_qsgd.policies import WarmUp
from hvd_qsgd.torch import Compressor, QSGDCompressor, ThresholdTopKCompressor, TopKCompressor
from hvd_qsgd.torch import state as states

SHAPES = {"first": (40, 50), "bias": (50,), "second": (30, 41)}
MAKERS: list[Any] = [
    TopKCompressor,
    lambda: TopKCompressor(0.1, error_feedback=EF21()),
    lambda: QSGDCompressor(3, error_feedback=LoCo(reset=3)),
    lambda: ThresholdTopKCompressor(0.1, method="sidco-gamma"),
    lambda: ThresholdTopKCompressor(0.1, every=3),
    lambda: Compressor(WarmUp([TopK(0.2), TopK(0.1)])),
]


@pytest.fixture()
def shared() -> Iterator[Path]:
    """A directory that all ranks see."""
    path = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None, name="directory")
    yield Path(path)
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(path)


def run(make: Any, start: Any, seeds: range, prepare: Any = None) -> tuple[Compressor, Any]:
    weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
    compressor = make()
    if prepare is not None:
        prepare(compressor)
    train(make_optimizer(weights, compressor), weights, seeds)
    return compressor, weights


def end(compressor: Compressor, weights: Any) -> torch.Tensor:
    return digest([*weights.values(), *compressor.state_dict()["arrays"].values()])


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: repr(make()))
@pytest.mark.parametrize("way", ["files", "gathered"])
def test_a_resumed_run_equals_an_uninterrupted_one(make: Any, way: str, shared: Path) -> None:
    beginning = make_parameters(SHAPES)
    uninterrupted = end(*run(make, beginning, range(6)))
    half, weights = run(make, beginning, range(3))
    if way == "files":
        path = states.save(half, shared)
        assert path.exists() and path.name == f"rank-{hvd.rank():05d}-of-{hvd.size():05d}.safetensors"
        hvd.barrier()
        resumed = run(make, weights, range(3, 6), lambda compressor: states.load(compressor, shared))
    else:
        stream = io.BytesIO()
        torch.save(states.gather(half), stream)
        gathered = torch.load(io.BytesIO(stream.getvalue()))
        resumed = run(make, weights, range(3, 6), lambda compressor: states.scatter(compressor, gathered))
    assert_equal(end(*resumed), uninterrupted)
    assert not torch.equal(end(*run(make, weights, range(3, 6))), uninterrupted)


@pytest.mark.parametrize("make", MAKERS[:2], ids=lambda make: repr(make()))
def test_another_number_of_ranks_preserves_the_mean_or_resets(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As if one more rank had saved, whose state, at the end, is the mean of the others."""
    compressor, weights = run(make, make_parameters(SHAPES), range(3))
    gathered = states.gather(compressor)
    extra = states.mean_state(compressor, gathered["states"])
    gathered = {"ranks": hvd.size() + 1, "states": [*gathered["states"], extra]}
    with pytest.raises(ConfigError, match=r"saved by .* Load with resize='mean'"):
        states.scatter(make(), gathered)
    with pytest.raises(ConfigError, match="resize='keep' is not one of"):
        states.scatter(make(), gathered, resize="keep")
    resized = make()
    with caplog.at_level(logging.WARNING, "hvd_qsgd"):
        states.scatter(resized, gathered, resize="mean")
    for path, array in resized.state_dict()["arrays"].items():
        # EF21's estimates all start from their mean, which was the same on all ranks.
        source = path.replace("own/", "mean/")
        mean = torch.stack([state["arrays"][source] for state in gathered["states"]]).double().mean(0)
        now = torch.stack(gather(array)).double().mean(0)
        torch.testing.assert_close(now, mean, rtol=0, atol=1e-6)
    resized.check_state()
    assert resized.state_dict()["steps"] == compressor.state_dict()["steps"]
    reset = make()
    with caplog.at_level(logging.WARNING, "hvd_qsgd"):
        states.scatter(reset, gathered, resize="reset")
    assert not reset.state_dict()["arrays"]
    said = ["each starts from the mean of the residuals", "the residuals are dropped"] if hvd.rank() == 0 else []
    assert len(caplog.messages) == len(said) and all(text in line for text, line in zip(said, caplog.messages))
    run(lambda: resized, weights, range(3, 5))


def test_what_is_left_in_horovods_queue_does_no_harm_after_the_ranks_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if Horovod had died on rank 0 while it was starting the collectives of a step."""
    beginning = make_parameters(SHAPES)
    undisturbed = end(*run(TopKCompressor, beginning, range(4)))
    compressor = TopKCompressor()
    weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in beginning.items()}
    optimizer = make_optimizer(weights, compressor)
    names, start = [], horovod_torch.hvd.allgather_async
    with monkeypatch.context() as patched:
        patched.setattr(
            horovod_torch.hvd, "allgather_async", lambda x, **named: names.append(named["name"]) or start(x, **named)
        )
        train(optimizer, weights, range(2))
    left = [start(torch.zeros(8, dtype=torch.uint8), name=name) for name in set(names) if hvd.rank() == 0]
    states.CompressorStateHandler(compressor).sync()
    train(optimizer, weights, range(2, 4))
    assert_equal(end(compressor, weights), undisturbed)
    left += [start(torch.zeros(8, dtype=torch.uint8), name=name) for name in set(names) if hvd.rank() != 0]
    assert left and all(len(hvd.synchronize(handle)) == 8 * hvd.size() for handle in left)


def test_missing_files_are_named(shared: Path) -> None:
    with pytest.raises(ConfigError, match="There are no files"):
        states.load(TopKCompressor(), shared)
    compressor, _ = run(TopKCompressor, make_parameters(SHAPES), range(1))
    if hvd.rank() == 0:
        states.save(compressor, shared)
    hvd.barrier()
    with pytest.raises(ConfigError, match=r"lacks rank-00001-of-.* save on every rank"):
        states.load(TopKCompressor(), shared)


def test_files_of_several_jobs_are_not_mixed_up(shared: Path) -> None:
    compressor, _ = run(TopKCompressor, make_parameters(SHAPES), range(1))
    path = states.save(compressor, shared)
    shutil.copy(path, shared / f"rank-{hvd.rank():05d}-of-00077.safetensors")
    hvd.barrier()
    with pytest.raises(ConfigError, match=rf"states of jobs of {hvd.size()} and 77 ranks.* directory of its own"):
        states.load(TopKCompressor(), shared)


def test_the_state_of_rank_0_on_all_ranks_is_noticed_where_it_can_be() -> None:
    def make() -> Compressor:
        return TopKCompressor(0.1, error_feedback=EF21())

    compressor, _ = run(make, make_parameters(SHAPES), range(2))
    gathered = states.gather(compressor)
    states.scatter(make(), gathered)
    with pytest.raises(ExchangeError, match=r"EF21: the estimate of .*reset\(\)"):
        states.scatter(make(), {**gathered, "states": [gathered["states"][0]] * hvd.size()})


def test_estimates_are_checked_in_one_order_on_all_ranks() -> None:
    """Where tensors get their first gradients in another order on each rank."""
    compressor = TopKCompressor(0.1, error_feedback=EF21())
    parameters = make_parameters({"first": (40, 50), "second": (30, 41)})
    optimizer = make_optimizer(parameters, compressor)
    used = {"first": "second", "second": "first"} if hvd.rank() else {"first": "first", "second": "second"}
    for name in used.values():
        backward({name: parameters[name]}, make_gradients({name: parameters[name]}))
    optimizer.step()
    compressor.check_state()
    # What rounding left when gradients were larger is no fault.
    small = {name: gradient * 2.0**-16 for name, gradient in make_gradients(parameters, 1).items()}
    small["second"] *= 0
    for _ in range(20):
        optimizer.zero_grad()
        backward(parameters, small)
        optimizer.step()
    compressor.check_state()
    if hvd.rank() == 0:
        compressor.reset()
    with pytest.raises(ExchangeError, match="do not fit together: only one of them has mean/first"):
        compressor.check_state()


def test_ranks_that_were_interrupted_in_different_steps_meet_in_the_mean() -> None:
    """As if rank 0 alone had committed the last step before Horovod died."""
    compressor, _ = run(TopKCompressor, make_parameters(SHAPES), range(2))
    if hvd.rank() == 0:
        compressor.memory.steps = {key: step + 1 for key, step in compressor.memory.steps.items()}
    before = states.gather(compressor)["states"]
    states.CompressorStateHandler(compressor).sync()
    now = compressor.state_dict()
    assert now["steps"] == before[0]["steps"]
    for path, array in now["arrays"].items():
        mean = torch.stack([state["arrays"][path] for state in before]).double().mean(0)
        torch.testing.assert_close(array.double(), mean, rtol=0, atol=1e-6)


# -- optimizers that are made anew -------------------------------------------------------------


@pytest.mark.parametrize("clone", [False, True])
def test_an_optimizer_that_is_made_anew_goes_on_with_the_residuals(clone: bool) -> None:
    """As where a layer is unfrozen: of an instance, the residuals go to the parameter or to its namesake."""
    weights = make_parameters(SHAPES)
    compressor = TopKCompressor(0.1)
    seeds = range(8)
    start = weights["first"].detach().clone()
    train(make_optimizer({"first": weights["first"]}, compressor), {"first": weights["first"]}, seeds[:4])
    # Horovod's hooks of the old optimizer hold it in a cycle.
    gc.collect()
    if clone:
        weights["first"] = torch.nn.Parameter(weights["first"].detach().clone())
    train(make_optimizer(weights, compressor), weights, seeds[4:])
    arrays = compressor.state_dict()["arrays"]
    assert set(arrays) == {"residual/first", "residual/second"}
    assert compressor.state_dict()["steps"] == {"first": 7, "second": 3}
    # The first in either optimizer, so that its gradients are those of both.
    sent = sum(make_gradients({"first": weights["first"]}, seed)["first"].double() for seed in seeds)
    arrived = (start - weights["first"].detach()).double() / LR
    total = torch.stack(gather(arrays["residual/first"].view_as(start).double() - sent)).mean(0)
    torch.testing.assert_close(total, -arrived, rtol=0, atol=1e-4)


def test_the_class_frees_what_belongs_to_a_training_that_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """As in a loop over folds: each begins as if it were the first."""
    TopKCompressor._default = None
    ends = []
    for _ in range(3):
        weights = make_parameters(SHAPES)
        train(make_optimizer(weights, TopKCompressor), weights, range(3))
        arrays = TopKCompressor.state_dict()["arrays"]
        assert set(arrays) == {"residual/first", "residual/second"}
        ends.append(digest([*weights.values(), *arrays.values()]))
        del weights
    assert_equal(ends[1], ends[0])
    assert_equal(ends[2], ends[0])
    assert "new ones of the same names start without their residuals: 'second', 'first'" in caplog.text or (
        "new ones of the same names start without their residuals: 'first', 'second'" in caplog.text
    )
    TopKCompressor._default = None


@pytest.mark.parametrize("names", [("", "_orig_mod."), ("_orig_mod.", "")], ids=["compiled", "plain"])
def test_a_state_fits_a_model_with_and_without_a_wrapper(names: tuple[str, str]) -> None:
    """torch.compile() changes the names of parameters."""
    beginning = make_parameters(SHAPES)
    uninterrupted = end(*run(TopKCompressor, beginning, range(6)))

    def run_named(prefix: str, start: Any, seeds: range, state: Any = None) -> tuple[Compressor, Any]:
        weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
        compressor = TopKCompressor()
        if state is not None:
            compressor.load_state_dict(state)
        optimizer = make_optimizer({prefix + name: p for name, p in weights.items()}, compressor)
        train(optimizer, weights, seeds)
        return compressor, weights

    half, weights = run_named(names[0], beginning, range(3))
    assert_equal(end(*run_named(names[1], weights, range(3, 6), half.state_dict())), uninterrupted)
