"""What Horovod's own parallel tests try, with a compressor that loses nothing: the bits of ``Compression.none``.

Inputs are multiples of 1/64, whose sums are exact in any order. Everything is done twice, so that Horovod's cache and
ours are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from rank_checks import assert_equal, assert_same_on_all_ranks, backward, dyadic, make_gradients, make_parameters

from hvd_qsgd.torch import IdentityCompressor

SHAPES = [(), (1,), (17,), (17, 17), (3, 5, 7), (0, 4), (2, 3, 4, 5, 6)]
OPERATIONS: list[dict[str, Any]] = [
    {},
    {"op": hvd.Average},
    {"op": hvd.Sum},
    {"average": True},
    {"average": False},
    {"op": hvd.Sum, "prescale_factor": 0.25},
    {"op": hvd.Sum, "postscale_factor": 4.0},
    {"op": hvd.Average, "prescale_factor": 2.0, "postscale_factor": 0.5},
]
#: Those of which NumPy's float32, in which exchanges compute, holds all values.
DTYPES = [torch.float32, torch.float16, torch.float64]
#: Horovod reduces these as they are.
WHOLE = [torch.int32, torch.int64]
EXCHANGES = ["allgather", "scatter_gather"]


def lossless(exchange: str = "allgather") -> IdentityCompressor:
    return IdentityCompressor(min_elements=1, min_dims=0, exchange=exchange)


def same(function: Callable[..., Any], *inputs: Any, exchange: str = "allgather", **arguments: Any) -> None:
    """The function gives the same bits with a compressor as without."""
    compressor = lossless(exchange)
    for _ in range(2):
        expected = function(*inputs, compression=hvd.Compression.none, **arguments)
        found = function(*inputs, compression=compressor, **arguments)
        found, expected = (x if isinstance(x, list) else [x] for x in (found, expected))
        for one, other in zip(found, expected, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert_equal(one, other)


def value(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = dyadic((*shape, 1), seed).view(shape)
    return x.to(dtype) if dtype.is_floating_point else (64 * x).to(dtype)


@pytest.mark.parametrize("arguments", OPERATIONS, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_allreduce(exchange: str, arguments: dict[str, Any]) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            for name in ("x", None):
                same(hvd.allreduce, value(shape, dtype), exchange=exchange, name=name, **arguments)


@pytest.mark.parametrize("dtype", WHOLE)
def test_allreduce_of_whole_numbers(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        same(hvd.allreduce, value(shape, dtype), name="x", op=hvd.Sum)


@pytest.mark.parametrize("arguments", OPERATIONS, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_grouped_allreduce(exchange: str, arguments: dict[str, Any]) -> None:
    for dtype in DTYPES:
        for name in ("x", None):
            tensors = [value(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
            same(hvd.grouped_allreduce, tensors, exchange=exchange, name=name, **arguments)


def test_allreduces_of_others_while_one_is_under_way() -> None:
    """In place, without waiting, many at a time, between and besides those that are compressed."""
    compressor = lossless()
    many = [dyadic((17, 17), seed) for seed in range(10)]
    expected = [hvd.allreduce(x, name=f"many.{i}") for i, x in enumerate(many)]
    for name in ("{}", None):
        named = [name and name.format(i) for i in range(10)]
        handles = [hvd.allreduce_async(x, name=each) for x, each in zip(many, named)]
        ours = [name and f"ours.{each}" for each in named]
        compressed = [hvd.allreduce(x, name=each, compression=compressor) for x, each in zip(many, ours)]
        in_place = [x.clone() for x in many]
        for x, each in zip(in_place, named):
            hvd.allreduce_(x, name=each and f"in.place.{each}")
        for found in ([hvd.synchronize(handle) for handle in handles], compressed, in_place):
            for one, other in zip(found, expected):
                assert_equal(one, other)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"op": hvd.Sum},
        {"gradient_predivide_factor": 2.0},
        {"groups": 1},
        {"groups": 2},
        {"groups": 2, "op": hvd.Sum},
        {"backward_passes_per_step": 2},
        {"sparse_as_dense": True},
        {"by": torch.optim.Adam},
        {"without names": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_optimizers(settings: dict[str, Any], exchange: str, dtype: torch.dtype) -> None:
    ends = []
    for compression in (hvd.Compression.none, lossless(exchange)):
        options = dict(settings)
        make = options.pop("by", torch.optim.SGD)
        parameters = make_parameters({"a": (17, 17), "b": (17,), "c": (3, 5, 7), "d": (1,)}, dtype)
        names = None if options.pop("without names", False) else list(parameters.items())
        optimizer = hvd.DistributedOptimizer(
            make(list(parameters.values()), lr=0.125), named_parameters=names, compression=compression, **options
        )
        for step in range(3):
            optimizer.zero_grad()
            for part in range(options.get("backward_passes_per_step", 1)):
                backward(parameters, make_gradients(parameters, step + 10 * part))
            if step == 1:
                optimizer.synchronize()
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
        assert_same_on_all_ranks(parameters.values())
        ends.append([p.detach().clone() for p in parameters.values()])
    for one, other in zip(*ends):
        assert_equal(one, other)


def test_gradients_that_some_ranks_do_not_have() -> None:
    """A branch that other ranks take, and one that nobody takes."""
    ends = []
    for compression in (hvd.Compression.none, lossless()):
        parameters = make_parameters({"left": (17, 17), "right": (17, 5), "unused": (4, 4)})
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(list(parameters.values()), lr=0.125), list(parameters.items()), compression
        )
        for step in range(3):
            optimizer.zero_grad()
            branch = ["left", "right"][(hvd.rank() + step) % 2]
            raw = make_gradients(parameters, step)
            backward(parameters, {branch: raw[branch]})
            optimizer.step()
        ends.append([p.detach().clone() for p in parameters.values()])
    for one, other in zip(*ends):
        assert_equal(one, other)
