"""Programs that do with gradients what few do: with an exact compressor they end in the bits of those without one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from rank_checks import (
    assert_same_on_all_ranks,
    backward,
    digest,
    make_gradients,
    make_optimizer,
    make_parameters,
    train,
)

from hvd_qsgd.torch import IdentityCompressor, TopKCompressor, state

SHAPES = {"first": (40, 50), "bias": (50,), "second": (40, 50), "scalar": ()}
Parameters = dict[str, torch.nn.Parameter]


def tied(parameters: Parameters, optimizer: Any, raw: dict[str, torch.Tensor]) -> None:
    """A weight is used twice, and reaches the hook once."""
    (parameters["first"] * raw["first"] + parameters["first"] * raw["second"]).sum().backward()
    optimizer.step()


def replaced(parameters: Parameters, optimizer: Any, raw: dict[str, torch.Tensor]) -> None:
    """Gradients are replaced after the backward pass: Horovod has taken those before, and puts them back."""
    backward(parameters, raw)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def clipped(parameters: Parameters, optimizer: Any, raw: dict[str, torch.Tensor]) -> None:
    backward(parameters, raw)
    optimizer.synchronize()
    torch.nn.utils.clip_grad_value_(parameters.values(), 0.25)
    with optimizer.skip_synchronize():
        optimizer.step()


def frozen(parameters: Parameters, optimizer: Any, raw: dict[str, torch.Tensor]) -> None:
    parameters["first"].requires_grad_(not parameters["first"].requires_grad)
    backward({n: p for n, p in parameters.items()}, {n: raw[n] for n, p in parameters.items() if p.requires_grad})
    optimizer.step()


def interrupted(parameters: Parameters, optimizer: Any, raw: dict[str, torch.Tensor]) -> None:
    """The backward pass ends in an error when some gradients are on their way, and the program goes on."""

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError

    hook = parameters["second"].register_hook(fail)
    with contextlib.suppress(ArithmeticError):
        backward(parameters, raw)
    hook.remove()
    optimizer.step()
    optimizer.zero_grad()
    backward(parameters, raw)
    optimizer.step()


@pytest.mark.parametrize(
    "program", [tied, replaced, clipped, frozen, interrupted], ids=lambda program: program.__name__
)
def test_a_program_ends_in_the_bits_it_has_without_compression(program: Callable[..., None]) -> None:
    ends = []
    for compression in (hvd.Compression.none, IdentityCompressor(min_elements=0, min_dims=0), IdentityCompressor()):
        parameters = make_parameters(SHAPES)
        optimizer = make_optimizer(parameters, compression)
        for step in range(3):
            optimizer.zero_grad()
            program(parameters, optimizer, make_gradients(parameters, step))
        assert_same_on_all_ranks(parameters.values())
        ends.append(digest(parameters.values()))
    assert_equal(ends[1], ends[0])
    assert_equal(ends[2], ends[0])


NAMES = ["module.layer[0].weight", "a b", "вес/重み", "line\nbreak", "%s {} \\ \"'", "\x1b[31mred", "x" * 300]


def test_names_may_hold_any_characters() -> None:
    """In collectives, statistics and state files."""
    shapes = {name: (40, 50) for name in NAMES}
    compressor, resumed = TopKCompressor(0.1), TopKCompressor(0.1)
    parameters = make_parameters(shapes)
    optimizer = make_optimizer(parameters, compressor)
    train(optimizer, parameters, range(2))
    assert all(any(key.endswith(name) for key in compressor.stats().tensors) for name in NAMES)
    directory = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None, name="directory")
    state.save(compressor, directory)
    hvd.barrier()
    state.load(resumed, directory)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    hvd.barrier()
    if hvd.rank() == 0:
        shutil.rmtree(directory)
    train(optimizer, parameters, range(2, 4))
    train(make_optimizer(copies, resumed), copies, range(2, 4))
    assert_same_on_all_ranks(parameters.values())
    assert_equal(digest(copies.values()), digest(parameters.values()))
