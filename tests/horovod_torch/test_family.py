"""The further compressors through Horovod's optimizer: trained, saved, resumed; and DGC's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from rank_checks import (
    LR,
    assert_same_on_all_ranks,
    backward,
    check_resumes,
    gather,
    make_gradients,
    make_optimizer,
    make_parameters,
    reduce_gradients,
    train,
)

from hvd_qsgd import Sign, codecs, exchanges, feedback
from hvd_qsgd.errors import ConfigError, UnsupportedError
from hvd_qsgd.exchanges import EXCHANGES, Exchange, Job, Steps
from hvd_qsgd.feedback import ErrorFeedback, MomentumCorrection
from hvd_qsgd.torch import (
    Compressor,
    DGCCompressor,
    EliasQSGDCompressor,
    GlobalTopKCompressor,
    IntSGDCompressor,
    PowerSGDCompressor,
    RandomKCompressor,
    RowTopKCompressor,
    SignCompressor,
    ThresholdTopKCompressor,
)


@codecs.register
@dataclass(frozen=True)
class OwnCodec(Sign):
    name: ClassVar[str] = "own_sign"


@feedback.register
class OwnFeedback(ErrorFeedback):
    name: ClassVar[str] = "own_feedback"


def own_gather(job: Job) -> Steps:
    yield from EXCHANGES["allgather"](job)


def carries(codec: Any) -> bool:
    return isinstance(codec, OwnCodec)


exchanges.register(Exchange(own_gather, EXCHANGES["allgather"].work, carries, preference=9))
SHAPES = {"first": (40, 50), "bias": (50,), "second": (30, 41)}
MAKERS: list[Any] = [
    SignCompressor,
    lambda: SignCompressor(64, exchange="scatter_gather"),
    RandomKCompressor,
    lambda: RandomKCompressor(0.2, unbiased=True),
    EliasQSGDCompressor,
    lambda: EliasQSGDCompressor(scaled=True),
    lambda: EliasQSGDCompressor(exchange="scatter_gather"),
    lambda: Compressor(OwnCodec(64), error_feedback=OwnFeedback()),
    lambda: RowTopKCompressor(0.1, 64, exchange="scatter_gather"),
    lambda: GlobalTopKCompressor(0.1),
    lambda: ThresholdTopKCompressor(0.1, method="sample"),
    lambda: PowerSGDCompressor(2),
    IntSGDCompressor,
    lambda: DGCCompressor(0.1, warm_up=()),
]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: repr(make()))
def test_ranks_agree_bytes_are_saved_and_a_resumed_run_equals_an_uninterrupted_one(make: Any) -> None:
    def check(compressor: Any) -> None:
        compressed = [r for r in compressor.stats().tensors.values() if not r.bypassed]
        assert len(compressed) == 2
        assert {r.exchange == "own_gather" for r in compressed} == {"OwnCodec" in compressed[0].codec}
        assert sum(r.wire_bytes for r in compressed) < 0.7 * sum(r.uncompressed_wire_bytes for r in compressed)

    check_resumes(make, SHAPES, check)


def test_sign_sends_the_mean_magnitude() -> None:
    compressor = SignCompressor(64, error_feedback=False, exchange="allgather")
    x = make_gradients(make_parameters({"w": (40, 50)}))["w"]
    mean = sum(torch.from_numpy(Sign(64).decode(Sign(64).encode(part.numpy()), part.shape)) for part in gather(x))
    assert_equal(hvd.allreduce(x, name="w", compression=compressor), mean / hvd.size())


# -- DGC --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_dgc_that_sends_everything_is_sgd_with_momentum(nesterov: bool) -> None:
    settings = {"momentum": 0.5, "nesterov": nesterov, "weight_decay": 0.01}
    ours, theirs = make_parameters(SHAPES), make_parameters(SHAPES)
    compressor = DGCCompressor(1.0, masking=False, warm_up=(), **settings)
    optimizer = make_optimizer(ours, compressor)
    reference = torch.optim.SGD(theirs.values(), lr=LR, **settings)
    for seed in range(4):
        raw = make_gradients(ours, seed)
        optimizer.zero_grad()
        backward(ours, raw)
        optimizer.step()
        for name, parameter in theirs.items():
            parameter.grad = torch.stack(gather(raw[name])).mean(0)
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-5)


def test_dgc_warms_up() -> None:
    compressor = DGCCompressor(0.01, warm_up=(0.5, 0.1))
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor)
    sent = []
    for epoch in range(4):
        compressor.set_epoch(epoch)
        before = compressor.stats().wire_bytes
        train(optimizer, parameters, [epoch])
        sent.append(compressor.stats().wire_bytes - before)
        assert_same_on_all_ranks(parameters.values())
    assert sent[0] > 2 * sent[1] > 4 * sent[2] and sent[3] == pytest.approx(sent[2], rel=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"momentum=0\.9.* would count twice"),
        (lambda p: torch.optim.Adam(p), r"betas=\(0\.9, 0\.999\).* would count twice"),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), r"DGCCompressor\(weight_decay=0\.1\)"),
    ],
)
def test_dgc_refuses_a_second_momentum(make: Any, message: str) -> None:
    parameters = make_parameters({"weight": (40, 50)})
    optimizer = hvd.DistributedOptimizer(make(parameters.values()), parameters.items(), compression=DGCCompressor())
    with pytest.raises(UnsupportedError, match=message):
        reduce_gradients(optimizer, parameters, make_gradients(parameters))


def test_only_dgc_moves_the_momentum() -> None:
    with pytest.raises(ConfigError, match="Use DGCCompressor"):
        ThresholdTopKCompressor(0.1, error_feedback=MomentumCorrection())


def test_dgc_needs_an_optimizer() -> None:
    with pytest.raises(UnsupportedError, match=r"Use it with hvd\.DistributedOptimizer"):
        hvd.allreduce(torch.ones(40, 50), name="x", compression=DGCCompressor())
