"""Ranks whose allreduces do not match: all of them raise, at once, and nothing of it stays in Horovod's queue.

A tensor may be compressed on one rank and left to Horovod on another one, which finds out by what Horovod compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from horovod.common.exceptions import HorovodInternalError

from hvd_qsgd import QSGD
from hvd_qsgd.errors import ExchangeError, UnsupportedError
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.torch import (
    Compressor,
    IdentityCompressor,
    IntSGDCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    RandomKCompressor,
    TopKCompressor,
)

REFUSALS = (HorovodInternalError, ExchangeError)
USUAL = torch.ones(96, 64)
#: What rank 0 has where the others have the usual.
OTHERS = {
    "transposed": torch.ones(64, 96),
    "longer": torch.ones(96, 65),
    "half": torch.ones(96, 64, dtype=torch.float16),
    "bfloat16": torch.ones(96, 64, dtype=torch.bfloat16),
    "double": torch.ones(96, 64, dtype=torch.float64),
    "left to Horovod, whole": torch.ones(96, 64, dtype=torch.int32),
    "left to Horovod, small": torch.ones(8, 8),
    "left to Horovod, flat": torch.ones(96 * 64),
    "left to Horovod, like a carrier": torch.ones(1, dtype=torch.float64),
}
COMPRESSORS: list[Compressor] = [
    *(QSGDCompressor(exchange=exchange) for exchange in exchanges_for(QSGD())),
    TopKCompressor(error_feedback=False),
    PowerSGDCompressor(2, error_feedback=False),
    RandomKCompressor(error_feedback=False),
    IntSGDCompressor(),
    QSGDCompressor(exchange="auto"),
]
by_repr = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


@pytest.fixture(autouse=True)
def _horovod_still_works() -> Iterator[None]:
    yield
    for name in ("x", None):
        assert_equal(hvd.allreduce(USUAL, name=name, compression=IdentityCompressor()), USUAL)
        assert_equal(hvd.allreduce(USUAL, name=name), USUAL)
        (result,) = hvd.grouped_allreduce([USUAL], name=name, compression=IdentityCompressor())
        assert_equal(result, USUAL)


def mine(of_rank_0: Any, of_others: Any) -> Any:
    return of_rank_0 if hvd.rank() == 0 else of_others


def clones(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """A compressor refuses a group that holds a tensor twice."""
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("case", OTHERS)
def test_horovod_refuses_it(case: str) -> None:
    """Or cannot do it at all."""
    if case != "bfloat16":
        with pytest.raises(HorovodInternalError, match="Mismatched"):
            hvd.allreduce(mine(OTHERS[case], USUAL), name="x")


@by_repr
@pytest.mark.parametrize("name", ["x", None])
def test_tensors_that_do_not_match(compressor: Compressor, name: str | None) -> None:
    for other in OTHERS.values():
        with pytest.raises(REFUSALS):
            hvd.allreduce(mine(other, USUAL), name=name, compression=compressor)
        # Horovod has seen, and may have cached, what all ranks agree on.
        hvd.allreduce(USUAL, name=name, compression=compressor)


# With exchange="auto" Horovod may get groups as they are, and it hides an error that is not the last tensor's.
@pytest.mark.parametrize("compressor", COMPRESSORS[:-1], ids=repr)
@pytest.mark.parametrize("name", ["x", None])
def test_groups_that_do_not_match(compressor: Compressor, name: str | None) -> None:
    for other in OTHERS.values():
        # Horovod wants one type in a group.
        usual, small = USUAL.to(other.dtype), torch.ones(3, dtype=other.dtype)
        pairs = [([other, other], [USUAL, USUAL])]
        if other.shape != USUAL.shape and other.dtype == USUAL.dtype:
            pairs += [
                ([other, usual], [usual, usual]),
                ([usual, other], [usual, usual]),
                ([other, small], [usual, small]),
                ([small, other], [small, usual]),
                ([other, usual], [usual, other]),
            ]
        for of_rank_0, of_others in pairs:
            with pytest.raises(REFUSALS):
                hvd.grouped_allreduce(clones(mine(of_rank_0, of_others)), name=name, compression=compressor)
            hvd.grouped_allreduce(clones([USUAL, USUAL]), name=name, compression=compressor)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ({"op": hvd.Sum}, {"op": hvd.Average}),
        ({"op": hvd.Max}, {"op": hvd.Average}),
        ({"op": hvd.Average}, {"op": hvd.Min}),
        ({"prescale_factor": 0.5}, {}),
        ({}, {"postscale_factor": 2.0}),
        ({"compression": hvd.Compression.none}, {}),
        ({"compression": hvd.Compression.fp16}, {}),
        ({}, {"compression": QSGDCompressor(5)}),
    ],
    ids=str,
)
def test_operations_that_do_not_match(arguments: tuple[dict[str, Any], dict[str, Any]], grouped: bool) -> None:
    settings = {"name": "x", "compression": QSGDCompressor(4), **mine(*arguments)}
    with pytest.raises((*REFUSALS, UnsupportedError)):
        if grouped:
            hvd.grouped_allreduce([USUAL, USUAL + 1], **settings)
        else:
            hvd.allreduce(USUAL, **settings)


def test_refusals_of_one_rank() -> None:
    """A tensor that this package refuses goes to Horovod first, which tells the ranks that compress theirs."""
    for name in ("x", None):
        x = mine(USUAL.clone().requires_grad_(), USUAL)
        with pytest.raises((*REFUSALS, UnsupportedError)):
            hvd.allreduce(x, name=name, compression=QSGDCompressor())
        with pytest.raises((*REFUSALS, UnsupportedError)):
            hvd.grouped_allreduce(mine([x, x], [USUAL, USUAL + 1]), name=name, compression=QSGDCompressor())
    with pytest.raises((*REFUSALS, UnsupportedError)):
        hvd.allreduce(USUAL, compression=mine(TopKCompressor(), QSGDCompressor()))


def test_errors_name_what_differs() -> None:
    x = mine(torch.ones(96, 64), torch.ones(64, 96).half())
    theirs, ours = mine(("(64, 96) float16", "(96, 64) float32"), ("(96, 64) float32", "(64, 96) float16"))
    with pytest.raises(ExchangeError) as error:
        hvd.allreduce(x, name="some.name", compression=QSGDCompressor())
    other, _, own = str(error.value).partition("where this one has")
    assert f"some.name {theirs}" in other and f"some.name {ours}" in own
    assert f"rank {mine(1, 0)} has" in other
    x = mine(torch.ones(96, 64), torch.ones(3))
    words = mine(r"Another rank leaves to Horovod .*some\.name", "Mismatched")
    with pytest.raises(mine(ExchangeError, HorovodInternalError), match=words):
        hvd.allreduce(x, name="some.name", compression=QSGDCompressor())
