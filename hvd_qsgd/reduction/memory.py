"""The memory of a compressor on this rank: steps, residuals, what codecs learned, under keys that find a tensor again.

A tensor's key is its name, so that a checkpoint fits a model that is made anew. Where two parameters that are alive
have one name, the second gets a number. A parameter keeps its key as long as it lives: an optimizer that is made anew
around it goes on with its residual.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from hvd_qsgd.feedback import Feedback
from hvd_qsgd.policies import Policy

#: What wrappers of models put into the names of parameters: torch.compile, and checkpoints of activations.
WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")
#: Names that a message lists.
LISTED = 5
#: Steps of a tensor after which all that take part in training have come: optimizers may take turns.
PATIENCE = 10


class TensorMemory:
    """What this rank remembers of each tensor.

    Args:
        feedback: holds the residuals.
        policy: decides by tensor.

    Attributes:
        steps: number of the last step of each tensor, from 0, by key.
        of_codecs: what the codec of each tensor remembers, by key.
    """

    def __init__(self, feedback: Feedback, policy: Policy) -> None:
        self.feedback = feedback
        self.policy = policy
        self.steps: dict[str, int] = {}
        self.of_codecs: dict[str, dict[str, Any]] = {}
        self._begin()

    def _begin(self) -> None:
        #: Whose key it is: a parameter, a variable, or a name.
        self._owners: dict[str, weakref.ref[Any]] = {}
        #: Keys of a loaded state, until it was compared with what comes.
        self._loaded: set[str] = set()
        #: Steps of each tensor since a state was loaded or an owner has died.
        self._begun: Counter[str] = Counter()
        #: Keys of owners that are gone and may have heirs yet.
        self._orphans: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without the owners, who belong to one process."""
        blank = object.__new__(TensorMemory)
        blank._begin()
        return {name: value for name, value in vars(self).items() if name not in vars(blank)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()
        vars(self).update(state)

    # -- keys ---------------------------------------------------------------------------------

    def claim(self, tensors: Sequence[tuple[str, Any]], group: str = "", inherit: bool = True) -> list[str]:
        """The keys of some tensors, given as name and owner: an object that lives as long as the tensor is trained.

        All ranks of a group get the same keys if they claim in the same order.

        Args:
            group: text that tells groups of ranks apart; empty for all ranks.
            inherit: let a new owner go on with the memory of one of the same name that is gone; else that is freed,
                and so is that of all others who are gone.
        """
        if any(self._contested(_base(name, group), owner) for name, owner in tensors):
            # Garbage is collected at moments that differ between ranks, and keys must not.
            gc.collect()
        inherited: list[str] = []
        freed: list[str] = []
        keys, changed = [], False
        for name, owner in tensors:
            key = self._key(_base(name, group), owner)
            known = self._owners.get(key)
            if known is None or known() is not owner:
                if known is not None and key in self.steps:
                    (inherited if inherit else freed).append(key)
                    if not inherit:
                        self.forget(key)
                self._owners[key] = weakref.ref(owner)
                # Of the same owners, which come in each step, nobody is an heir.
                changed = True
            keys.append(key)
        if changed:
            self._find_orphans(inherit)
        _say_who_took_over(inherited, freed)
        return keys

    def _contested(self, base: str, owner: Any) -> bool:
        known = self._owners.get(self._key(base, owner))
        first = self._owners.get(base)
        return first is not None and first() is not owner and (known is None or known() is not owner)

    def _key(self, base: str, owner: Any) -> str:
        """The owner's key, or the first one that is free."""
        free = ""
        for number in itertools.count(1):
            key = base if number == 1 else f"{base} ({number})"
            known = self._owners.get(key)
            if known is not None and known() is owner:
                return key
            if not free and (known is None or known() is None):
                free = key
            if known is None:
                return free
        raise AssertionError

    def _find_orphans(self, wait: bool) -> None:
        """Free what has no owner any more, or wait for heirs a few steps."""
        dead = {key for key, owner in self._owners.items() if owner() is None}
        if not wait:
            for key in dead:
                self.forget(key)
        elif dead - self._orphans:
            self._orphans |= dead
            self._begun.clear()

    # -- steps --------------------------------------------------------------------------------

    def begin(self, key: str) -> int:
        """Start the next step of a tensor; returns its number, from 0."""
        if self._loaded or self._orphans:
            self._begun[key] += 1
            if self._begun[key] > PATIENCE:
                self._compare()
        step = self.steps[key] = self.steps.get(key, -1) + 1
        return step

    def of_codec(self, key: str) -> dict[str, Any]:
        """What the codec remembers of a tensor; it may be changed."""
        return self.of_codecs.setdefault(key, {})

    def discard_last(self) -> None:
        """Go back to the residuals before the last step of each tensor."""
        for key in self.steps:
            self.feedback.settle(key, applied=False)

    def forget(self, key: str) -> None:
        """Free all that is remembered of a tensor."""
        self._owners.pop(key, None)
        self.steps.pop(key, None)
        self.of_codecs.pop(key, None)
        self.feedback.forget(key)
        self.policy.forget(key)

    def clear(self) -> None:
        """Forget all tensors; those that are alive keep their keys."""
        self.steps.clear()
        self.of_codecs.clear()
        self.feedback.start()
        self._loaded, self._orphans = set(), set()
        self._owners = {key: owner for key, owner in self._owners.items() if owner() is not None}

    def _compare(self) -> None:
        """Free what has no owner any more, and say which parts of a loaded state fit nothing."""
        for key in self._orphans:
            owner = self._owners.get(key)
            if owner is not None and owner() is None:
                self.forget(key)
        left, new = sorted(self._loaded - set(self._begun)), sorted(set(self._begun) - self._loaded)
        if self._loaded and left:
            started = f" These tensors started without a state: {_listed(new)}." if new else ""
            _say(
                f"The loaded state has {len(left)} tensors that no optimizer trains: {_listed(left)}.{started} "
                f"If parameters were renamed, rename them in the state; what fits nothing has no effect."
            )
        elif self._loaded and new:
            _say(f"The loaded state does not have {len(new)} tensors, which start without: {_listed(new)}.")
        self._loaded, self._orphans = set(), set()
        self._begun.clear()

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self, convert: Callable[[Any], Any], unapplied: Collection[str] = ()) -> dict[str, Any]:
        """Copies of all that is remembered, arrays converted.

        Args:
            unapplied: keys of tensors whose last mean was not applied: their residuals are those of before.
        """
        arrays = self.feedback.arrays(unapplied)
        return {
            "arrays": {path: convert(array) for path, array in arrays.items()},
            "numbers": self.feedback.numbers(unapplied),
            "steps": dict(self.steps),
            "memory": {
                key: {name: v if isinstance(v, (int, float)) else convert(v) for name, v in part.items()}
                for key, part in self.of_codecs.items()
            },
            "policy": with_arrays(self.policy.state(), convert),
        }

    def load_state_dict(self, state: dict[str, Any], convert: Callable[[Any], Any]) -> None:
        """Continue from :meth:`state_dict`; ``convert`` is the inverse of what it was given."""
        arrays = {path: convert(array) for path, array in state["arrays"].items()}
        self.feedback.load(arrays, state["numbers"])
        self.steps = dict(state["steps"])
        self.of_codecs = copy.deepcopy(state["memory"])
        self.policy.load(with_arrays(state["policy"], convert))
        self._owners = {key: owner for key, owner in self._owners.items() if owner() is not None}
        self._loaded, self._orphans = set(self.steps), set()
        self._begun.clear()


class Named:
    """The owner of a tensor that is known by its name alone, as in ``hvd.allreduce(x, name="x")``."""


NAMED = Named()


def group_text(ranks: Sequence[int] | None) -> str:
    """A group of ranks as :meth:`TensorMemory.claim` takes it: "ranks 0-2,5", or empty for None, all ranks."""
    if ranks is None:
        return ""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return "ranks " + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def with_arrays(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A copy of nested plain values, with every array in them converted."""
    if isinstance(value, dict):
        return {key: with_arrays(part, convert) for key, part in value.items()}
    return convert(value) if hasattr(value, "dtype") else copy.deepcopy(value)


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of its model have put into it."""
    return WRAPPERS.sub("", name)


def _base(name: str, group: str) -> str:
    return f"{plain_name(name)} ({group})" if group else plain_name(name)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + more


def _say_who_took_over(inherited: Sequence[str], freed: Sequence[str]) -> None:
    if inherited:
        _say(
            f"{len(inherited)} parameters are gone, and new ones of the same names go on with their residuals and "
            f"random steps: {_listed(inherited)}. If another training begins, call reset() of the compressor before it."
        )
    if freed:
        _say(
            f"{len(freed)} parameters are gone, and new ones of the same names start without their residuals: "
            f"{_listed(freed)}. If the same training goes on, pass an instance as compression=, not the class."
        )


def _say(text: str) -> None:
    logging.getLogger("hvd_qsgd").warning(text)
