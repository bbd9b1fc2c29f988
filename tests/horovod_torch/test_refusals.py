"""What cannot work raises an error that says so, on every rank, and leaves Horovod usable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import SHAPE, assert_equal
from horovod.common.exceptions import HorovodInternalError
from rank_checks import backward, dyadic, make_gradients, make_optimizer, make_parameters

from hvd_qsgd import QSGD
from hvd_qsgd.errors import ConfigError, ExchangeError, UnsupportedError
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.torch import CastCompressor, Compressor, QSGDCompressor, TopKCompressor
from hvd_qsgd.torch.flights import ENGINE


@pytest.fixture(autouse=True)
def _horovod_still_works() -> Iterator[None]:
    yield
    x = dyadic(SHAPE)
    assert_equal(hvd.allreduce(x, name="after"), hvd.allreduce(x, name="after", compression=hvd.Compression.none))
    hvd.allreduce(x, name="after", compression=QSGDCompressor())


@pytest.mark.parametrize("op", [hvd.Adasum, hvd.Min, hvd.Max, hvd.Product])
@pytest.mark.parametrize("grouped", [False, True])
def test_operations_that_are_not_linear(op: Any, grouped: bool) -> None:
    x = dyadic(SHAPE)
    # Horovod gets the tensor first, and over Gloo it has no Adasum.
    with pytest.raises((UnsupportedError, HorovodInternalError), match=r"Use op=hvd\.Average or op=hvd\.Sum|No Adasum"):
        if grouped:
            hvd.grouped_allreduce([x], name="x", op=op, compression=QSGDCompressor)
        else:
            hvd.allreduce(x, name="x", op=op, compression=QSGDCompressor)


@pytest.mark.parametrize("op", [hvd.Min, hvd.Max, hvd.Product])
@pytest.mark.parametrize("groups", [None, 1])
def test_operations_of_an_optimizer_that_are_not_linear(op: Any, groups: int | None) -> None:
    parameters = make_parameters({"weight": (40, 50)})
    optimizer = make_optimizer(parameters, QSGDCompressor, op=op, groups=groups)
    backward(parameters, make_gradients(parameters))
    with pytest.raises(UnsupportedError, match=r"Use op=hvd\.Average or op=hvd\.Sum"):
        optimizer.step()


def test_parameters_that_horovod_does_not_know() -> None:
    parameters = make_parameters({"weight": (40, 50)})
    optimizer = make_optimizer(parameters, QSGDCompressor())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, 5))]})
    with pytest.raises(UnsupportedError, match=r"of shape \(3, 5\) was added .* Call add_param_group\(\) before"):
        backward(parameters, make_gradients(parameters))


def test_one_tensor_twice_in_a_group() -> None:
    x = dyadic(SHAPE)
    with pytest.raises(UnsupportedError, match=r"one tensor twice, at 1 and 2 .* tensor\.clone\(\)"):
        hvd.grouped_allreduce([x + 1, x, x], name="x", compression=QSGDCompressor())


def test_adasum_optimizer() -> None:
    parameters = make_parameters({"weight": (40, 50)})
    optimizer = make_optimizer(parameters, QSGDCompressor, op=hvd.Adasum)
    with pytest.raises(UnsupportedError, match="Adasum is not linear"):
        backward(parameters, make_gradients(parameters))
    del optimizer


@pytest.mark.parametrize(
    "call",
    [
        lambda x: hvd.reducescatter(x, name="x", compression=QSGDCompressor),
        lambda x: hvd.grouped_reducescatter([x], name="x", compression=QSGDCompressor),
    ],
)
def test_reducescatter(call: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(UnsupportedError, match="another part of the result"):
        call(dyadic(SHAPE))


def test_a_tensor_that_requires_a_gradient() -> None:
    x = dyadic(SHAPE).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"tensor\.detach\(\)"):
        hvd.allreduce(x, name="x", compression=QSGDCompressor)
    with pytest.raises(UnsupportedError, match=r"tensor\.detach\(\)"):
        hvd.grouped_allreduce([x * 2], name="x", compression=QSGDCompressor)
    with torch.no_grad():
        result = hvd.allreduce(x, name="x", compression=QSGDCompressor())
    assert_equal(result, hvd.allreduce(x.detach(), name="x", compression=QSGDCompressor()))


@pytest.mark.parametrize("compression", [QSGDCompressor, TopKCompressor(), CastCompressor()])
def test_compress_by_hand(compression: Any) -> None:
    with pytest.raises(UnsupportedError, match="was not called by a function of Horovod"):
        compression.compress(dyadic(SHAPE))


def by_rank(rank_0: Compressor, others: Compressor) -> Compressor:
    return rank_0 if hvd.rank() == 0 else others


@pytest.mark.parametrize(
    "compressor",
    [
        *(by_rank(QSGDCompressor(4, exchange=e), QSGDCompressor(5, exchange=e)) for e in exchanges_for(QSGD())),
        *(by_rank(QSGDCompressor(exchange=e), QSGDCompressor(exchange=e, norm="l2")) for e in exchanges_for(QSGD())),
        by_rank(TopKCompressor(0.01), TopKCompressor(0.02)),
        by_rank(TopKCompressor(0.01), QSGDCompressor(exchange="allgather")),
        by_rank(CastCompressor(exchange="scatter_gather"), CastCompressor("bfloat16", exchange="scatter_gather")),
    ],
    ids=range(9),
)
def test_settings_that_differ_between_ranks(compressor: Compressor) -> None:
    for _ in range(2):
        with pytest.raises(ExchangeError, match="All ranks must run the same model with the same compressor settings"):
            hvd.allreduce(dyadic(SHAPE), name="differs", compression=compressor)


@pytest.mark.parametrize("other", ["allgather", "allreduce"])
def test_exchanges_that_differ_between_ranks(other: str) -> None:
    compressor = by_rank(QSGDCompressor(exchange="scatter_gather"), QSGDCompressor(exchange=other))
    with pytest.raises(ExchangeError, match="same compressor settings"):
        hvd.allreduce(dyadic(SHAPE), name="differs", compression=compressor)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"exchange": "scatter_gather"},
        {"exchange": "allreduce"},
        {"min_elements": 1500},
        {"fusion_elements": 600},
        {"error_feedback": True},
    ],
    ids=str,
)
def test_settings_that_differ_between_ranks_of_an_optimizer(settings: dict[str, Any]) -> None:
    # What was started stays with Horovod for ever, so each case has names of its own.
    parameters = make_parameters({f"first.{settings}": (40, 50), f"second.{settings}": (30, 41)})
    usual = QSGDCompressor(exchange="allgather")
    optimizer = make_optimizer(parameters, by_rank(QSGDCompressor(**{"exchange": "allgather", **settings}), usual))
    backward(parameters, make_gradients(parameters))
    with pytest.raises(ExchangeError, match="same compressor settings"):
        optimizer.step()


@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize(
    "other",
    [
        {"weight": (50, 40)},
        {"weight": (40, 51)},
        {"weight": (5, 6)},
        {"weight": (2000,)},
        {"small": (41, 50)},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"op": hvd.Sum},
        {"op": hvd.Max},
        {"gradient_predivide_factor": 2.0},
    ],
    ids=str,
)
def test_models_that_differ_between_ranks(other: dict[str, Any], groups: int | None) -> None:
    """As without compression, all ranks raise, whatever gradient each of them waits for first."""
    if groups is not None and "gradient_predivide_factor" in other:
        return  # Horovod ignores it.
    shapes = {"bias": (50,), "small": (3, 4), "weight": (40, 50), "last": (50, 60)}
    settings: dict[str, Any] = {"groups": groups}
    dtype = torch.float32
    if hvd.rank() == 0:
        dtype = other.get("dtype", dtype)
        shapes |= {name: shape for name, shape in other.items() if name in shapes}
        settings |= {name: value for name, value in other.items() if name not in (*shapes, "dtype")}
        # Gradients come in another order, too.
        shapes = dict(reversed(shapes.items()))
    # What was started stays with Horovod for ever, so each case has names of its own.
    parameters = make_parameters({f"{name}.{other}.{groups}": shape for name, shape in shapes.items()}, dtype)
    optimizer = make_optimizer(parameters, QSGDCompressor(), **settings)
    backward(parameters, make_gradients(parameters))
    with pytest.raises((ExchangeError, HorovodInternalError, UnsupportedError)):
        optimizer.step()
    # Where Horovod raises, nobody waits for exchanges that have begun.
    ENGINE.abandon()


@pytest.mark.parametrize(
    "settings",
    [
        {"exchange": "broadcast"},
        {"min_elements": -1},
        {"min_dims": 1.5},
        {"seed": 2**64},
        {"fusion_elements": 0},
        {"bits": 9},
        {"norm": "l2", "error_feedback": True},
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QSGDCompressor(**settings)


def test_an_exchange_that_cannot_carry_the_codec() -> None:
    with pytest.raises(ConfigError, match="it travels by allgather"):
        TopKCompressor(exchange="scatter_gather")
