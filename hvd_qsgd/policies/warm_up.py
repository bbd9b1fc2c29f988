"""WarmUp: mild compression in the first epochs, when gradients change quickly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.policies.base import Policy, Tensor


class WarmUp(Policy):
    """One codec for each of the first epochs; the last one stays.

        WarmUp.of_ratios(TopK(0.001))           # a quarter, 6.25 %, 1.56 %, 0.4 %, then 0.1 %
        WarmUp([QSGD(8), QSGD(8), QSGD(4)])

    Args:
        codecs: of epoch 0, 1, ...

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, codecs: Sequence[Codec]) -> None:
        if not codecs:
            raise ConfigError("WarmUp: give at least one codec.")
        self._codecs = tuple(codecs)
        self._now = 0

    @classmethod
    def of_ratios(cls, codec: Any, ratios: Sequence[float] = (0.25, 0.0625, 0.0156, 0.004)) -> WarmUp:
        """A sparsifier whose ``ratio`` takes these values before its own.

        The default is the schedule of Lin et al., Deep gradient compression (arXiv 1712.01887), section 3.3.

        Raises:
            ConfigError: the codec has no ratio.
        """
        if getattr(codec, "ratio", None) is None:
            raise ConfigError(f"WarmUp: {codec} has no ratio to begin above. Give WarmUp its codecs.")
        steps = [replace(codec, ratio=ratio) for ratio in ratios if ratio > codec.ratio]
        return cls([*steps, codec])

    def __repr__(self) -> str:
        return f"WarmUp({list(self._codecs)})"

    def choices(self, tensor: Tensor) -> Sequence[Codec]:
        return self._codecs

    def codec(self, tensor: Tensor) -> Codec:
        return self._codecs[self._now]

    def every_codec(self) -> Sequence[Codec]:
        return self._codecs

    def config(self) -> dict[str, Any]:
        return {"policy": "warm_up", "codecs": [codec.config() for codec in self._codecs]}

    def decide(self, epoch: int, learning_rate: float | None = None) -> dict[str, int]:
        return {"step": min(epoch, len(self._codecs) - 1)}

    def apply(self, decisions: dict[str, int]) -> None:
        self._now = decisions["step"]

    def state(self) -> dict[str, Any]:
        return {"step": self._now}

    def load(self, state: dict[str, Any]) -> None:
        self._now = int(state["step"])
