"""What a rank remembers of tensors is found again, and is not taken for that of another one."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from typing import Any

import numpy as np
import pytest

from hvd_qsgd import QSGD, TopK
from hvd_qsgd.feedback import ErrorFeedback
from hvd_qsgd.policies import Accordion, Fixed, LGreCo, Policy, Tensor
from hvd_qsgd.reduction.memory import NAMED, PATIENCE, TensorMemory, group_text


class Parameter:
    """Stands for one of a framework."""


def make(policy: Policy | None = None) -> TensorMemory:
    return TensorMemory(ErrorFeedback(), policy or Fixed(TopK()))


def step(memory: TensorMemory, key: str, residual: float = 1.0) -> None:
    memory.begin(key)
    memory.feedback.correct(key, np.zeros(4, np.float32))
    memory.feedback.keep(key, np.full(4, residual, np.float32))


def kept(memory: TensorMemory) -> dict[str, float]:
    arrays = memory.state_dict(np.copy)["arrays"]
    return {path.removeprefix("residual/"): float(array[0]) for path, array in arrays.items()}


def test_a_parameter_keeps_its_key_whatever_optimizer_holds_it() -> None:
    memory, first, second = make(), Parameter(), Parameter()
    assert memory.claim([("w", first)]) == ["w"]
    assert memory.claim([("w", second)]) == ["w (2)"]
    assert memory.claim([("v", second), ("w", first)]) == ["v", "w"]
    assert memory.claim([("w", second)]) == ["w (2)"]
    assert memory.claim([("x", NAMED), ("w", NAMED)]) == ["x", "w (3)"]
    assert memory.claim([("x", NAMED)]) == ["x"]


def test_two_of_one_name_in_one_call() -> None:
    memory, owners = make(), [Parameter(), Parameter()]
    assert memory.claim([("a.w", owners[0]), ("_orig_mod.a.w", owners[1])]) == ["a.w", "a.w (2)"]


def test_groups_of_ranks_have_keys_of_their_own() -> None:
    memory, owner = make(), Parameter()
    assert group_text(None) == ""
    assert group_text([5, 0, 1, 2]) == "ranks 0-2,5"
    assert memory.claim([("w", owner)], group_text([0, 2])) == ["w (ranks 0,2)"]
    assert memory.claim([("w", owner)]) == ["w"]


@pytest.mark.parametrize("name", ["_orig_mod.a.w", "a._orig_mod.w", "a._checkpoint_wrapped_module.w"])
def test_wrappers_do_not_show_in_keys(name: str) -> None:
    assert make().claim([(name, NAMED)]) == ["a.w"]
    assert make().claim([("my_orig_mod.w", NAMED)]) == ["my_orig_mod.w"]


@pytest.mark.parametrize("collected", [True, False])
@pytest.mark.parametrize("inherit", [True, False])
def test_an_heir_goes_on_or_starts_anew(inherit: bool, collected: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Garbage of a cycle is collected at another moment on each rank, and the key must not depend on it."""
    memory = make()
    owner: Any = Parameter()
    owner.itself = owner
    (key,) = memory.claim([("w", owner)])
    step(memory, key, 5.0)
    del owner
    if collected:
        gc.collect()
    heir = Parameter()
    assert memory.claim([("w", heir)], inherit=inherit) == ["w"]
    assert kept(memory) == ({"w": 5.0} if inherit else {})
    assert memory.begin("w") == (1 if inherit else 0)
    assert ("go on with their residuals" if inherit else "start without their residuals") in caplog.text


@pytest.mark.parametrize("inherit", [True, False])
def test_what_nobody_inherits_is_freed(inherit: bool) -> None:
    policies = LGreCo([TopK(), QSGD()]), Accordion(TopK(0.1), TopK(0.01))
    for policy in policies:
        memory, gone, other = make(policy), Parameter(), Parameter()
        for key in memory.claim([("a", gone), ("b", gone)], inherit=inherit):
            step(memory, key)
            policy.observe(Tensor(key, (4,)), np.ones(4, np.float32))
        del gone
        (key,) = memory.claim([("c", other)], inherit=inherit)
        for _ in range(PATIENCE + 1):
            step(memory, key)
        assert set(kept(memory)) == {"c"} == set(memory.steps)
        assert "'a'" not in repr(memory.state_dict(np.copy))


def test_heirs_may_come_one_after_the_other() -> None:
    memory, old = make(), Parameter()
    for key, value in zip(memory.claim([("a", old), ("b", old)]), (1.0, 2.0)):
        step(memory, key, value)
    del old
    heirs = Parameter(), Parameter()
    (key,) = memory.claim([("a", heirs[0])])
    step(memory, key, 3.0)
    (key,) = memory.claim([("b", heirs[1])])
    assert kept(memory) == {"a": 3.0, "b": 2.0}


def test_what_was_loaded_is_compared_with_what_comes(caplog: pytest.LogCaptureFixture) -> None:
    saved = make()
    for key in saved.claim([(name, NAMED) for name in ("a", "b", "renamed")]):
        step(saved, key)
    state = saved.state_dict(np.copy)

    def resume(names: list[str]) -> str:
        caplog.clear()
        memory = make()
        memory.load_state_dict(state, np.copy)
        for _ in range(PATIENCE + 1):
            for key in memory.claim([(name, NAMED) for name in names]):
                step(memory, key)
        return caplog.text

    assert resume(["a", "_orig_mod.b", "renamed"]) == ""
    told = resume(["a", "b", "new"])
    assert "has 1 tensors that no optimizer trains: 'renamed'" in told and "without a state: 'new'" in told
    assert "does not have 1 tensors, which start without: 'new'" in resume(["a", "b", "renamed", "new"])


def test_a_loaded_state_goes_to_new_parameters_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    memory, old, new = make(), Parameter(), Parameter()
    (key,) = memory.claim([("w", old)])
    step(memory, key, 7.0)
    state = memory.state_dict(np.copy)
    del old
    memory.load_state_dict(state, np.copy)
    assert memory.claim([("w", new)], inherit=False) == ["w"]
    assert kept(memory) == {"w": 7.0}
    assert not caplog.records


def test_clearing_keeps_the_keys_of_the_living() -> None:
    memory, first, second = make(), Parameter(), Parameter()
    memory.claim([("w", first)])
    memory.claim([("w", second)])
    step(memory, "w (2)")
    memory.clear()
    assert kept(memory) == {} == memory.steps
    assert memory.claim([("w", second)]) == ["w (2)"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_copies_have_the_memory_and_no_owners(copied: Any) -> None:
    memory, owner = make(), Parameter()
    (key,) = memory.claim([("w", owner)])
    step(memory, key, 3.0)
    other = copied(memory)
    assert other.claim([("w", Parameter())]) == ["w"]
    step(memory, key, 4.0)
    assert kept(other) == {"w": 3.0}


def test_the_step_before_can_be_restored() -> None:
    memory = make()
    (key,) = memory.claim([("w", NAMED)])
    step(memory, key, 1.0)
    step(memory, key, 2.0)
    assert memory.state_dict(np.copy, [key])["arrays"]["residual/w"][0] == 1.0
    memory.discard_last()
    memory.discard_last()
    assert kept(memory) == {"w": 1.0}
    step(memory, key, 3.0)
    assert kept(memory) == {"w": 3.0}


def test_messages_are_warnings_of_the_package() -> None:
    # Python shows them by itself.
    assert logging.getLogger("hvd_qsgd").getEffectiveLevel() <= logging.WARNING
