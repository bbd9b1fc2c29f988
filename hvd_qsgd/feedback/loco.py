"""LoCo: a moving average of past errors, kept in 8 bits and forgotten now and then.

Source: Xie, Lin, Toh, Zhou, LoCo: low-bit communication adaptor for large-scale model
training, IEEE TPAMI 2025 (arXiv 2407.04480):
h = g + e, send q = C(h), e = beta * e + (1 - beta) * (h - q), and e = 0 after every ``reset`` steps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback.base import Feedback
from hvd_qsgd.feedback.store import Store, check_kept_as


@dataclass(eq=False)
class LoCo(Feedback):
    """Compensates quantization by the average of its errors; for mild codecs like QSGD with 4 bits.

    What is not sent is not all sent later: the average forgets. For sparsifiers use ErrorFeedback.

    Args:
        beta: share of the old average, 0 <= beta < 1; 0.8 is what the authors' code documents.
        reset: steps of a tensor after which its average starts again from zero.
        kept_as: see :class:`hvd_qsgd.feedback.ErrorFeedback`.

    Raises:
        ConfigError: a value is out of range.
    """

    beta: float = 0.8
    reset: int = 1024
    kept_as: str = "int8"

    name: ClassVar[str] = "loco"
    damped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 <= self.beta < 1:
            raise ConfigError(f"LoCo: beta={self.beta!r} must be a number from 0 to below 1.")
        self.reset = check_integer("LoCo", "reset", self.reset, 1, 2**62)
        check_kept_as("LoCo", "kept_as", self.kept_as)
        super().__post_init__()

    def start(self) -> None:
        self.average = Store(self.kept_as)
        self._steps: dict[str, int] = {}

    def correct(self, name: str, x: Any, ranks: int = 1) -> Any:
        average = self.average.get_for(name, x)
        corrected = self.average.room(name, x)
        corrected[...] = x
        if average is not None:
            corrected += average
        return corrected

    def keep(self, name: str, error: Any, mean: Any = None) -> None:
        self._steps[name] = (self._steps.get(name, 0) + 1) % self.reset
        if self._steps[name] == 0:
            error[...] = 0
        else:
            error *= 1 - self.beta
            if name in self.average:
                error += self.beta * self.average.get(name)
        self.average.put(name, error)

    def discard(self, name: str, error: Any, mean: Any = None) -> None:
        """Nothing was changed yet."""

    def settle(self, name: str, applied: bool) -> None:
        if self.average.settle(name, applied) and not applied:
            self._steps[name] = self._before(name)

    def forget(self, name: str) -> None:
        super().forget(name)
        self._steps.pop(name, None)

    def _before(self, name: str) -> int:
        return (self._steps[name] - 1) % self.reset

    def numbers(self, unapplied: Collection[str] = ()) -> dict[str, int]:
        return {f"steps/{n}": self._before(n) if n in unapplied else count for n, count in self._steps.items()}

    def load(self, arrays: dict[str, Any], numbers: dict[str, int]) -> None:
        super().load(arrays, numbers)
        self._steps = {path.removeprefix("steps/"): count for path, count in numbers.items()}
