"""What a program may set in torch as a whole: it changes no bit of what ranks exchange."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from rank_checks import assert_same_on_all_ranks, digest, make_gradients, make_optimizer, make_parameters, normal

from hvd_qsgd.errors import UnsupportedError
from hvd_qsgd.feedback import EF21, LoCo
from hvd_qsgd.torch import (
    CastCompressor,
    DGCCompressor,
    EliasQSGDCompressor,
    GlobalTopKCompressor,
    IdentityCompressor,
    IntSGDCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    RandomKCompressor,
    RowTopKCompressor,
    SignCompressor,
    ThresholdTopKCompressor,
    TopKCompressor,
    state,
)

MAKERS: list[Callable[[], Any]] = [
    lambda: IdentityCompressor(exchange="scatter_gather"),
    CastCompressor,
    lambda: QSGDCompressor(exchange="allgather"),
    lambda: QSGDCompressor(exchange="scatter_gather"),
    lambda: QSGDCompressor(exchange="allreduce"),
    lambda: QSGDCompressor(3, error_feedback=LoCo(reset=3)),
    lambda: TopKCompressor(0.1),
    lambda: TopKCompressor(0.1, error_feedback=EF21()),
    lambda: SignCompressor(64),
    lambda: RandomKCompressor(0.2),
    EliasQSGDCompressor,
    lambda: RowTopKCompressor(0.1, 64),
    lambda: GlobalTopKCompressor(0.1),
    lambda: ThresholdTopKCompressor(0.1, method="sample"),
    lambda: ThresholdTopKCompressor(0.1, method="sidco-gamma"),
    lambda: PowerSGDCompressor(2),
    IntSGDCompressor,
    lambda: DGCCompressor(0.1, warm_up=(), weight_decay=0.1),
]
SHAPES = {"hooked": (40, 50), "set": (30, 41), "half": (40, 50), "bias": (50,), "unused": (40, 50)}


@contextlib.contextmanager
def switched(switch: Callable[[Any], None], on: Any, off: Any) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    # It stands for any device that is not the CPU, where the gradients are.
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: switched(torch.set_num_threads, 3, 1),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def run(make: Callable[[], Any], setting: Callable[[], AbstractContextManager[Any]]) -> torch.Tensor:
    """Three steps with gradients of hooks, set ones and missing ones; state, there and back; two tensors alone."""
    parameters = make_parameters(SHAPES)
    parameters["half"] = torch.nn.Parameter(parameters["half"].detach().to(torch.bfloat16))
    raws = [make_gradients(parameters, seed) for seed in range(3)]
    alone = normal((40, 50), seed=9)
    means = []
    compressor = make()
    optimizer = make_optimizer(parameters, compressor)
    with setting():
        for raw in raws:
            optimizer.zero_grad()
            names = ("hooked", "half", "bias")
            torch.autograd.backward([parameters[name] for name in names], [raw[name].clone() for name in names])
            parameters["set"].grad = raw["set"].clone()
            optimizer.step()
        compressor.load_state_dict(compressor.state_dict())
        if not torch.is_inference_mode_enabled():  # Horovod's own allgather fails in it.
            state.scatter(compressor, state.gather(compressor))
        with contextlib.suppress(UnsupportedError):
            means.append(hvd.allreduce(alone, name="alone", compression=compressor))
        means.append(hvd.allreduce(alone, name="cast", compression=CastCompressor()))
    assert_same_on_all_ranks([*parameters.values(), *means])
    # Which gradients are missing Horovod takes from a set.
    arrays = sorted(compressor.state_dict()["arrays"].items())
    return digest([*parameters.values(), *means, *(array for _, array in arrays)])


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: repr(make()))
def test_settings_of_torch_change_no_bit(make: Callable[[], Any]) -> None:
    plain = run(make, contextlib.nullcontext)
    for name, setting in SETTINGS.items():
        assert torch.equal(run(make, setting), plain), name
