"""Momentum correction: velocities are accumulated in place of gradients.

Source: Lin et al., Deep gradient compression, ICLR 2018 (arXiv 1712.01887), sections 3.1 to 3.3
and the authors' code: local clipping, u = m * u + x, v = v + u (with Nesterov: u = m * (u + x),
v = v + u + x), send the largest of v; where they were sent, v = 0 and u = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback.base import Feedback
from hvd_qsgd.feedback.store import Store


@dataclass(eq=False)
class MomentumCorrection(Feedback):
    """The momentum of the optimizer, applied before compression; the optimizer itself must have none.

    For codecs that send values exactly or not at all: where the rest is zero, something was sent.

    Args:
        momentum: 0 <= momentum < 1.
        nesterov: look ahead, as ``torch.optim.SGD(nesterov=True)`` does.
        masking: stop the momentum of what was sent (momentum factor masking).
        clip: largest norm of a tensor's mean gradient, or None. Each of n ranks clips its own
            gradient to ``clip / sqrt(n)`` before it is accumulated.

    Raises:
        ConfigError: a value is out of range.
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True
    clip: float | None = None

    name: ClassVar[str] = "dgc"

    def __post_init__(self) -> None:
        if isinstance(self.momentum, bool) or not 0 <= self.momentum < 1:
            raise ConfigError(f"MomentumCorrection: momentum={self.momentum!r} must be a number from 0 to below 1.")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"MomentumCorrection: clip={self.clip!r} must be above 0, or None to clip nothing.")
        super().__post_init__()

    def start(self) -> None:
        self.velocity = Store()
        self.accumulated = Store()
        self._pending: dict[str, Any] = {}

    def correct(self, name: str, x: Any, ranks: int = 1) -> Any:
        accumulated = self.accumulated.get_for(name, x)
        x = self._clipped(x, ranks)
        velocity, total = self.velocity.room(name, x), self.accumulated.room(name, x)
        velocity[...] = x
        if accumulated is not None:
            velocity += self.velocity.get(name) * (1 if self.nesterov else self.momentum)
        if self.nesterov:
            velocity *= self.momentum
        total[...] = velocity
        if accumulated is not None:
            total += accumulated
        if self.nesterov:
            total += x
        self._pending[name] = velocity
        return total

    def keep(self, name: str, error: Any, mean: Any = None) -> None:
        velocity = self._pending.pop(name)
        if self.masking:
            # Also where nothing was accumulated, which is where velocity is zero as well, or cancelled out.
            velocity *= error != 0
        self.velocity.put(name, velocity)
        self.accumulated.put(name, error)

    def discard(self, name: str, error: Any, mean: Any = None) -> None:
        del self._pending[name]

    def _clipped(self, x: Any, ranks: int) -> Any:
        if self.clip is None:
            return x
        limit = self.clip / ranks**0.5
        # An array of one element, so that nobody waits for a device.
        norm = (x * x).sum()[None] ** 0.5
        return x * (limit / norm.clip(limit, None))
