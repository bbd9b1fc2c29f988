"""Policies: rules by name and size, warm-up, Accordion and LGreCo by their definitions."""

from __future__ import annotations

import itertools
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkers import gauss
from hypothesis import given
from hypothesis import strategies as st

from hvd_qsgd import QSGD, Codec, ConfigError, GlobalTopK, Identity, RandomK, RowTopK, ThresholdTopK, TopK
from hvd_qsgd.policies import Accordion, Fixed, LGreCo, Policy, Rules, Tensor, WarmUp, parse_codec
from hvd_qsgd.policies.lgreco import cheapest, measure

BIAS, EMBEDDING, SMALL, OTHER = (
    Tensor("block.bias", (50,)),
    Tensor("embedding.weight", (500, 400)),
    Tensor("embedding.scale", (5, 4)),
    Tensor("block.weight", (50, 50)),
)
TEXT = {"*.bias": "none", "embed* >= 100000": "topk(0.02)", "default": "qsgd(4, bucket_size=64)"}
OBJECTS = {"*.bias": None, "embed* >= 100000": TopK(0.02), "default": QSGD(4, 64)}
CONFIGS = {"*.bias": None, "embed* >= 100000": TopK(0.02).config(), "default": QSGD(4, 64).config()}


@pytest.mark.parametrize("rules", [TEXT, OBJECTS, CONFIGS])
def test_the_first_rule_that_fits_gives_the_codec(rules: dict[str, Any]) -> None:
    policy = Rules(rules)
    assert [policy.codec(t) for t in (BIAS, EMBEDDING, SMALL, OTHER)] == [None, TopK(0.02), QSGD(4, 64), QSGD(4, 64)]
    assert policy.choices(BIAS) == () and policy.choices(EMBEDDING) == (TopK(0.02),)
    assert set(policy.every_codec()) == {TopK(0.02), QSGD(4, 64)}
    assert json.loads(json.dumps(policy.config())) == Rules(TEXT).config()
    assert repr(policy) == repr(Rules(TEXT))


class Large(Policy):
    """A policy as a user may write one: what is small is left to Horovod."""

    def __init__(self, inner: Codec, elements: int) -> None:
        self.inner, self.elements = inner, elements

    def choices(self, tensor: Tensor) -> list[Codec]:
        return [self.inner] if tensor.elements >= self.elements else []

    def codec(self, tensor: Tensor) -> Codec | None:
        return self.inner if tensor.elements >= self.elements else None

    def every_codec(self) -> list[Codec]:
        return [self.inner]

    def config(self) -> dict[str, Any]:
        return {"policy": "large", "codec": self.inner.config(), "elements": self.elements}


def test_a_policy_of_a_users_own_reads_the_same_on_all_ranks() -> None:
    one, other = Large(TopK(), 5000), Large(TopK(), 5000)
    assert repr(one) == repr(other) == f"Large(codec={TopK().config()}, elements=5000)"
    assert repr(Large(TopK(), 5001)) != repr(one) != repr(Large(TopK(0.1), 5000))


def test_rules_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text('"*.bias": none\n"embed* >= 100000": topk(0.02)\ndefault: qsgd(4, bucket_size=64)\n')
    assert Rules.from_file(path).config() == Rules(TEXT).config()
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must map name patterns to codecs"):
        Rules.from_file(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no YAML"):
        Rules.from_file(path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*.bias": None}, 'no "default"'),
        ({"default": "zip(4)"}, "Unknown codec 'zip'.*known are none, cast"),
        ({"default": "qsgd(4"}, "Cannot read the codec"),
        ({"default": "qsgd(__import__('os'))"}, "Cannot read the codec"),
        ({"default": "qsgd(size=4)"}, "do not fit"),
        ({"default": "qsgd(9)"}, "bits=9"),
        ({"default": 4}, "no codec, policy, configuration or text"),
        ({"a b": None, "default": None}, "cannot read 'a b'"),
        ({"a > 3": None, "default": None}, "cannot read 'a > 3'"),
    ],
)
def test_rules_that_cannot_be_read_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rules(rules)


def test_patterns_that_fit_nothing_are_an_error() -> None:
    names = ["block.bias", "embedding.weight"]
    Rules(TEXT).check_names(names)
    with pytest.raises(ConfigError, match=r"pattern 'head\*' fits no parameter of the model; these are block.bias"):
        Rules({"head*": None, **TEXT}).check_names(names)


def test_codecs_from_text() -> None:
    assert parse_codec("qsgd") == QSGD() and parse_codec(" none ") is None
    assert parse_codec("topk(k=3, values='float16')") == TopK(k=3, values="float16")


# -- over time ---------------------------------------------------------------------------------


def advance(policy: Policy, epoch: int, rate: float | None = None) -> None:
    """An epoch on another rank, which gets rank 0's decisions as they come from JSON."""
    policy.apply(json.loads(json.dumps(policy.decide(epoch, rate))))


@pytest.mark.parametrize(
    "sparsifier", [TopK, GlobalTopK, RowTopK, RandomK, partial(ThresholdTopK, method="sidco-pareto")], ids=str
)
def test_warm_up_steps_through_its_codecs(sparsifier: Any) -> None:
    policy = WarmUp.of_ratios(sparsifier(0.001))
    ratios = []
    for epoch in range(6):
        advance(policy, epoch)
        codec: Any = policy.codec(OTHER)
        assert codec == sparsifier(codec.ratio)
        ratios.append(codec.ratio)
    assert ratios == [0.25, 0.0625, 0.0156, 0.004, 0.001, 0.001]
    assert len(WarmUp.of_ratios(TopK(0.05)).every_codec()) == 3
    with pytest.raises(ConfigError):
        WarmUp([])
    for codec in (QSGD(), TopK(k=3)):
        with pytest.raises(ConfigError, match="has no ratio"):
            WarmUp.of_ratios(codec)


def test_policies_inside_rules_go_their_own_way() -> None:
    policy = Rules({"embed*": WarmUp([QSGD(8), QSGD(2)]), "default": WarmUp([QSGD(8), QSGD(8), QSGD(4)])})
    seen = []
    for epoch in range(4):
        advance(policy, epoch)
        seen.append([policy.codec(t).bits for t in (EMBEDDING, OTHER)])  # type: ignore[union-attr]
    assert seen == [[8, 8], [2, 8], [2, 4], [2, 4]]
    again = Rules({"embed*": WarmUp([QSGD(8), QSGD(2)]), "default": WarmUp([QSGD(8), QSGD(8), QSGD(4)])})
    again.load(json.loads(json.dumps(policy.state())))
    assert [again.codec(t) for t in (EMBEDDING, OTHER)] == [QSGD(2), QSGD(4)]


def accordion_run(norms: list[float], rates: list[float], **settings: Any) -> list[Codec]:
    """The codec in each epoch, whose gradients add up to a vector of the given norm."""
    policy, codecs = Accordion(Identity(), TopK(), **settings), []
    direction = gauss(100) / np.linalg.norm(gauss(100))
    for epoch, (norm, rate) in enumerate(zip(norms, rates)):
        advance(policy, epoch, rate)
        codecs.append(policy.codec(OTHER))
        for part in (0.25, 0.75):
            policy.observe(OTHER, (part * norm * direction).astype(np.float32))
    return codecs


def test_accordion_follows_the_change_of_the_norm() -> None:
    low, high = Identity(), TopK()
    # 10 -> 4 is a change of 60 %, 4 -> 3 and 3 -> 2.9 are not; then the learning rate falls.
    codecs = accordion_run([10, 4, 3, 2.9, 2.9, 2.9], [1, 1, 1, 1, 0.1, 0.1], every=1)
    assert codecs == [low, low, low, high, low, high]
    assert accordion_run([10, 4, 3, 2.9], [1] * 4, every=1, threshold=0.7) == [low, low, high, high]
    assert accordion_run([10] * 7, [1] * 7, every=3) == [low] * 3 + [low] * 0 + [high] * 4


def copied(policy: Policy) -> Any:
    """The state as a checkpoint brings it back."""
    return pickle.loads(pickle.dumps(policy.state()))


def test_accordion_continues_in_the_middle_of_an_epoch() -> None:
    policy = Accordion(Identity(), TopK(), every=1)
    for epoch in range(3):
        advance(policy, epoch, 1.0)
        policy.observe(OTHER, gauss(100))
    again = Accordion(Identity(), TopK(), every=1)
    again.load(copied(policy))
    assert again.decide(3, 1.0) == policy.decide(3, 1.0) == {"block.weight": 1}
    assert again.decide(4, 0.1) == {}


@pytest.mark.parametrize("settings", [{"threshold": 0}, {"threshold": "1"}, {"every": 0}])
def test_accordion_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Accordion(Identity(), TopK(), **settings)


@given(
    errors=st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=1, max_size=4),
    sizes=st.lists(st.tuples(*[st.integers(1, 100)] * 3), min_size=4, max_size=4),
)
def test_the_cheapest_choice_is_what_trying_all_finds(
    errors: list[tuple[float, ...]], sizes: list[tuple[int, ...]]
) -> None:
    all_errors, all_sizes = np.array(errors), np.array(sizes[: len(errors)])
    budget = float(all_errors[:, 0].sum())
    picks = cheapest(all_errors, all_sizes, budget, 0)
    rows = range(len(errors))
    error, size = all_errors[rows, picks].sum(), all_sizes[rows, picks].sum()
    assert error <= budget * (1 + 1e-9)
    assert size <= all_sizes[:, 0].sum()
    # Errors are rounded up to bins: what fits a budget smaller by that much is found.
    for other in itertools.product(range(3), repeat=len(errors)):
        if all_errors[rows, other].sum() <= budget * (1 - len(errors) / 1000):
            assert size <= all_sizes[rows, other].sum()


def test_lgreco_spends_the_error_where_it_saves_most() -> None:
    codecs = (QSGD(4), QSGD(2, 128), QSGD(8))
    policy = LGreCo(codecs)
    tensors = {Tensor("large", (100, 1000)): 0.01, Tensor("small", (10, 200)): 10.0}
    for number, (tensor, magnitude) in enumerate(tensors.items()):
        policy.observe(tensor, (magnitude * gauss(tensor.elements, number)).astype(np.float32))
    before = {t: np.array(measure(codecs, policy._last[t.name])) for t in tensors}
    advance(policy, 0)
    chosen = {t.name: policy.codec(t) for t in tensors}
    # The large tensor hardly counts for the error, the small one hardly for the bytes.
    assert chosen == {"large": QSGD(2, 128), "small": QSGD(8)}
    picks = {t: codecs.index(chosen[t.name]) for t in tensors}
    assert sum(before[t][0][picks[t]] for t in tensors) <= sum(before[t][0][0] for t in tensors)
    assert sum(before[t][1][picks[t]] for t in tensors) < sum(before[t][1][0] for t in tensors)
    again = LGreCo(codecs)
    again.load(copied(policy))
    assert {t.name: again.codec(t) for t in tensors} == chosen
    policy.observe(OTHER, gauss(OTHER.elements))
    forgetful, again = again, LGreCo(codecs)
    again.load(copied(policy))
    assert again.decide(1) == policy.decide(1) != forgetful.decide(1)


def test_lgreco_without_a_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to choose"):
        LGreCo([QSGD()])
    with pytest.raises(ConfigError):
        LGreCo([QSGD(), QSGD(8)], default=2)


def test_fixed_is_one_codec() -> None:
    assert Fixed(QSGD()).codec(BIAS) == QSGD() and Fixed(None).codec(BIAS) is None
    assert Fixed(QSGD()).config() == QSGD().config()
