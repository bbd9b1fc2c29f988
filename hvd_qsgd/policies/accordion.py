"""Accordion: mild compression while a tensor's gradient changes much, strong compression in between.

Source: Agarwal et al., Accordion, MLSys 2021 (arXiv 2010.16248), Algorithm 1 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvd_qsgd.codecs.base import Codec, check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.policies.base import Policy, Tensor


class Accordion(Policy):
    """Compares the norms of a tensor's gradient, added up over an epoch, every ``every`` epochs.

    A tensor is critical, and gets ``low``, in the first period, where the norm changed by at least
    ``threshold`` of the one before, and after the learning rate fell; else it gets ``high``.
    Both must be codecs, so that residuals are never left behind: for no compression give Identity.

    Args:
        low: codec of low compression, high: of high compression.
        threshold: relative change of the norm, 0.5 in the paper.
        every: epochs between two decisions: 10 in the paper, 5 where training takes few epochs.

    Raises:
        ConfigError: a value is out of range.
    """

    observes = True

    def __init__(self, low: Codec, high: Codec, threshold: float = 0.5, every: int = 10) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ConfigError(f"Accordion: threshold={threshold!r} must be a number above 0.")
        self.low, self.high, self.threshold = low, high, threshold
        self.every = check_integer("Accordion", "every", every, 1, 2**31)
        #: Gradients of this epoch, added up.
        self._sums: dict[str, Any] = {}
        self._norms: dict[str, float] = {}
        self._rate: float | None = None
        #: Tensors that get high compression.
        self._calm: set[str] = set()

    def __repr__(self) -> str:
        return f"Accordion({self.low}, {self.high}, {self.threshold}, {self.every})"

    def choices(self, tensor: Tensor) -> Sequence[Codec]:
        return self.every_codec()

    def codec(self, tensor: Tensor) -> Codec:
        return self.high if tensor.key in self._calm else self.low

    def every_codec(self) -> Sequence[Codec]:
        return (self.low, self.high)

    def config(self) -> dict[str, Any]:
        codecs = {"low": self.low.config(), "high": self.high.config()}
        return {"policy": "accordion", **codecs, "threshold": self.threshold, "every": self.every}

    def observe(self, tensor: Tensor, gradient: Any) -> None:
        if tensor.key in self._sums:
            self._sums[tensor.key] += gradient
        else:
            self._sums[tensor.key] = gradient + 0

    def forget(self, key: str) -> None:
        self._sums.pop(key, None)
        self._norms.pop(key, None)
        self._calm.discard(key)

    def decide(self, epoch: int, learning_rate: float | None = None) -> dict[str, int]:
        norms = {name: float((total * total).sum()) ** 0.5 for name, total in self._sums.items()}
        self._sums.clear()
        fell = learning_rate is not None and self._rate is not None and learning_rate < self._rate
        self._rate = learning_rate
        calm = self._calm
        if epoch % self.every == 0 and epoch:
            calm = {name for name, norm in norms.items() if name in self._norms and not self._changed(name, norm)}
            self._norms = norms
        elif norms and not self._norms:
            self._norms = norms
        if fell:
            calm = set()
        return dict.fromkeys(sorted(calm), 1)

    def _changed(self, name: str, norm: float) -> bool:
        before = self._norms[name]
        return before == 0 or abs(before - norm) / before >= self.threshold

    def apply(self, decisions: dict[str, int]) -> None:
        self._calm = set(decisions)

    def state(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "norms": self._norms, "rate": self._rate, "calm": sorted(self._calm)}

    def load(self, state: dict[str, Any]) -> None:
        self._sums = dict(state["sums"])
        self._norms, self._rate, self._calm = dict(state["norms"]), state["rate"], set(state["calm"])
