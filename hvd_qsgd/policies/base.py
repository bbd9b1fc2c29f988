"""What every policy offers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvd_qsgd.codecs.base import Codec


@dataclass(frozen=True)
class Tensor:
    """What a policy knows of a tensor.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        key: under which its memory stands (see :mod:`hvd_qsgd.reduction.memory`); by default its name.
    """

    name: str
    shape: tuple[int, ...]
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.name)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Policy(ABC):
    """Picks a codec for each tensor; what it decides must follow from what all ranks have in common.

    A compressor asks :meth:`codec`; at the start of an epoch rank 0's :meth:`decide` is sent to
    all ranks and becomes the rule by :meth:`apply`.
    """

    #: Whether :meth:`observe` must be called.
    observes = False

    @abstractmethod
    def choices(self, tensor: Tensor) -> Sequence[Codec]:
        """Every codec that the tensor may ever get; none if it is never compressed."""

    @abstractmethod
    def codec(self, tensor: Tensor) -> Codec | None:
        """The codec of the tensor now; None leaves it to Horovod."""

    @abstractmethod
    def every_codec(self) -> Sequence[Codec]:
        """All codecs that any tensor may get."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The settings as a dictionary that survives JSON, with the kind under "policy"."""

    def __repr__(self) -> str:
        # Ranks compare it. Python's default has the object's address in it, which is another one on each rank.
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config().items() if name != "policy")
        return f"{type(self).__name__}({settings})"

    def check_names(self, names: Collection[str]) -> None:
        """Raise ConfigError if the policy names tensors that the model, which has all of ``names``, does not have."""
        return None

    def observe(self, tensor: Tensor, gradient: Any) -> None:
        """A mean gradient, finite, flat float32 of any backend; the memory is the caller's."""
        return None

    def forget(self, key: str) -> None:
        """Free what was observed of a tensor that is gone."""
        return None

    def decide(self, epoch: int, learning_rate: float | None = None) -> dict[str, int]:
        """What holds from the start of ``epoch`` (0, 1, ...) on, in whole numbers by name."""
        return {}

    def apply(self, decisions: dict[str, int]) -> None:
        """Make decisions, of this rank or another, the rule."""
        return None

    def state(self) -> dict[str, Any]:
        """What :meth:`decide` goes by, equal on all ranks: plain values, and arrays as :meth:`observe` gets them, in
        dictionaries."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        return None


@dataclass
class Fixed(Policy):
    """One codec for all tensors and all time; None compresses nothing."""

    only: Codec | None = field()

    def choices(self, tensor: Tensor) -> Sequence[Codec]:
        return self.every_codec()

    def codec(self, tensor: Tensor) -> Codec | None:
        return self.only

    def every_codec(self) -> Sequence[Codec]:
        return () if self.only is None else (self.only,)

    def config(self) -> dict[str, Any]:
        return {"codec": None} if self.only is None else self.only.config()
