"""Policies through Horovod's optimizer: what is sent follows them, on all ranks alike."""

from __future__ import annotations

import io
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from rank_checks import (
    assert_same_on_all_ranks,
    check_gradients,
    digest,
    make_gradients,
    make_optimizer,
    make_parameters,
    reduce_gradients,
    train,
)

from hvd_qsgd import QSGD, Identity, RandomK, Sign, TopK
from hvd_qsgd.errors import ConfigError, ExchangeError
from hvd_qsgd.policies import Accordion, LGreCo, Policy, Rules, WarmUp
from hvd_qsgd.torch import Compressor

SHAPES = {"embedding": (64, 40), "plain": (40, 50), "bias": (50,), "head": (30, 41), "random": (40, 41)}
RULES = {"embed*": "topk(0.05)", "plain": None, "rand*": RandomK(0.1), "head*": Sign(64), "default": "qsgd(4)"}


def test_each_tensor_gets_the_codec_of_its_rule() -> None:
    compressor = Compressor(Rules(RULES), error_feedback=False)
    parameters = make_parameters({name: SHAPES[name] for name in ("embedding", "plain", "bias")})
    rules = Rules({"embed*": "topk(0.05)", "plain": None, "default": "qsgd(4)"})
    compressor = Compressor(rules, error_feedback=False)
    optimizer = make_optimizer(parameters, compressor)
    raw = make_gradients(parameters, 1)
    reduce_gradients(optimizer, parameters, raw)
    check_gradients(parameters, raw, TopK(0.05), 0, bypassed=["plain"])
    assert compressor.stats().bypassed["plain"] == "the policy gives it no codec"


def test_only_tensors_that_may_get_a_biased_codec_have_feedback() -> None:
    compressor = Compressor(Rules({**RULES, "plain": "qsgd(4)"}))
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor)
    train(optimizer, parameters, range(3))
    assert_same_on_all_ranks(parameters.values())
    assert set(compressor.state_dict()["arrays"]) == {f"residual/{n}" for n in ("embedding", "head", "random")}
    exchanges = {name: record.exchange for name, record in compressor.stats().tensors.items()}
    assert exchanges["random"] == "linear" and exchanges["embedding"] == "allgather"


def test_feedback_that_would_diverge_is_refused_only_where_there_is_feedback() -> None:
    diverging = QSGD(norm="l2")
    parameters = make_parameters({"weight": (40, 50), "head": (30, 41)})
    rules = Rules({"head": TopK(0.1), "default": diverging})
    train(make_optimizer(parameters, Compressor(rules)), parameters, range(2))
    assert_same_on_all_ranks(parameters.values())
    with pytest.raises(ConfigError, match="diverges"):
        hvd.allreduce(parameters["head"].detach(), name="x", compression=Compressor(WarmUp([diverging, TopK(0.1)])))
    with pytest.raises(ConfigError, match="diverges"):
        Compressor(rules, error_feedback=True)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    parameters = make_parameters({"weight": (40, 50)})
    optimizer = make_optimizer(parameters, Compressor(Rules({"wieght": "none", "default": "qsgd"})))
    with pytest.raises(ConfigError, match="'wieght' fits no parameter"):
        reduce_gradients(optimizer, parameters, make_gradients(parameters))


POLICIES: list[Any] = [
    lambda: WarmUp.of_ratios(TopK(0.01), [0.5, 0.1]),
    lambda: Accordion(Identity(), TopK(0.05), every=1),
    # The first has both more bytes and a larger error than the second.
    lambda: LGreCo([QSGD(2, 8, rounding="nearest"), QSGD(4, rounding="nearest")]),
    lambda: Rules({"embed*": WarmUp([QSGD(8), TopK(0.1)]), "default": Accordion(QSGD(8), QSGD(4), every=1)}),
]


@pytest.mark.parametrize("make", POLICIES, ids=lambda make: str(make()))
def test_ranks_agree_over_epochs_and_a_resumed_run_equals_an_uninterrupted_one(make: Any) -> None:
    def run(saved: bytes | None, start: Any, epochs: range) -> tuple[bytes, Any, torch.Tensor, list[float]]:
        weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
        compressor = Compressor(make())
        if saved is not None:
            compressor.load_state_dict(torch.load(io.BytesIO(saved)))
        optimizer = make_optimizer(weights, compressor)
        sent = []
        for epoch in epochs:
            compressor.set_epoch(epoch, learning_rate=1.0 if epoch < 3 else 0.1)
            before = compressor.stats().wire_bytes
            train(optimizer, weights, [10 * epoch, 10 * epoch + 1])
            sent.append(compressor.stats().wire_bytes - before)
            assert_same_on_all_ranks(weights.values())
        stream = io.BytesIO()
        torch.save(compressor.state_dict(), stream)
        end = digest([*weights.values(), *compressor.state_dict()["arrays"].values()])
        return stream.getvalue(), weights, end, sent

    beginning = make_parameters(SHAPES)
    _, _, uninterrupted, sent = run(None, beginning, range(4))
    assert len(set(sent)) > 1, "nothing ever changed"
    saved, halfway, _, _ = run(None, beginning, range(2))
    _, _, resumed, _ = run(saved, halfway, range(2, 4))
    assert_equal(resumed, uninterrupted)


@pytest.mark.parametrize("make", [lambda: Accordion(Identity(), TopK(0.05), every=1), POLICIES[2]])
def test_networks_with_equal_names_are_decided_each_by_itself(make: Any) -> None:
    compressor = Compressor(make())
    networks = [make_parameters({"weight": shape}) for shape in ((40, 50), (30, 70))]
    optimizers = [make_optimizer(network, compressor) for network in networks]
    alone = Compressor(make())
    weights = make_parameters({"weight": (40, 50)})
    optimizer = make_optimizer(weights, alone)
    for epoch in range(3):
        for every in (compressor, alone):
            every.set_epoch(epoch)
        for network, each in zip(networks, optimizers):
            train(each, network, [epoch])
        train(optimizer, weights, [epoch])
    assert_equal(digest(networks[0].values()), digest(weights.values()))


def test_policies_that_differ_between_ranks_are_refused() -> None:
    class Own(WarmUp):
        def apply(self, decisions: dict[str, int]) -> None:
            super().apply({"step": hvd.rank() % 2})

    policy: Policy = Own([QSGD(8), QSGD(4)])
    parameters = make_parameters({"differs": (40, 50)})
    compressor = Compressor(policy)
    optimizer = make_optimizer(parameters, compressor)
    reduce_gradients(optimizer, parameters, make_gradients(parameters))
    compressor.set_epoch(0)
    with pytest.raises(ExchangeError, match="same compressor settings"):
        reduce_gradients(optimizer, parameters, make_gradients(parameters))
