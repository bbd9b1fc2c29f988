"""LGreCo: for each layer the codec with which all layers together send least at a bounded error.

Source: Alimohammadi, Markov, Frantar, Alistarh, L-GreCo: layerwise-adaptive gradient compression,
MLSys 2024 (arXiv 2210.17357): dynamic programming over layers and a discretized error budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.policies.base import Policy, Tensor

#: Steps of the error budget.
BINS = 1000


class LGreCo(Policy):
    """Keeps the squared error that ``choices[default]`` would make, and spends it where it saves most bytes.

    Args:
        choices: codecs to choose from.
        default: number of the codec that all tensors get first, and whose error is the budget.
        every: epochs between two decisions.

    Errors are measured on the last mean gradient of each tensor, in NumPy.

    Raises:
        ConfigError: fewer than two codecs, or no such default.
    """

    observes = True

    def __init__(self, choices: Sequence[Codec], default: int = 0, every: int = 1) -> None:
        if len(choices) < 2:
            raise ConfigError(f"LGreCo: there is nothing to choose between {list(choices)}; give two codecs or more.")
        self._codecs = tuple(choices)
        self.default = check_integer("LGreCo", "default", default, 0, len(choices) - 1)
        self.every = check_integer("LGreCo", "every", every, 1, 2**31)
        self._last: dict[str, Any] = {}
        self._chosen: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"LGreCo({list(self._codecs)}, {self.default}, {self.every})"

    def choices(self, tensor: Tensor) -> Sequence[Codec]:
        return self._codecs

    def codec(self, tensor: Tensor) -> Codec:
        return self._codecs[self._chosen.get(tensor.key, self.default)]

    def every_codec(self) -> Sequence[Codec]:
        return self._codecs

    def config(self) -> dict[str, Any]:
        codecs = [codec.config() for codec in self._codecs]
        return {"policy": "lgreco", "choices": codecs, "default": self.default, "every": self.every}

    def observe(self, tensor: Tensor, gradient: Any) -> None:
        if tensor.key in self._last and len(self._last[tensor.key]) == len(gradient):
            self._last[tensor.key][...] = gradient
        else:
            self._last[tensor.key] = gradient + 0

    def forget(self, key: str) -> None:
        self._last.pop(key, None)
        self._chosen.pop(key, None)

    def decide(self, epoch: int, learning_rate: float | None = None) -> dict[str, int]:
        if epoch % self.every or not self._last:
            return dict(self._chosen)
        names = sorted(self._last)
        measured = [measure(self._codecs, _numpy(self._last[name])) for name in names]
        errors = np.array([error for error, _ in measured])
        sizes = np.array([size for _, size in measured])
        return dict(zip(names, cheapest(errors, sizes, float(errors[:, self.default].sum()), self.default)))

    def apply(self, decisions: dict[str, int]) -> None:
        self._chosen = dict(decisions)

    def state(self) -> dict[str, Any]:
        return {"chosen": self._chosen, "last": dict(self._last)}

    def load(self, state: dict[str, Any]) -> None:
        self._last = dict(state["last"])
        self._chosen = {name: int(choice) for name, choice in state["chosen"].items()}


def _numpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.asarray(array.cpu().numpy())


def measure(codecs: Sequence[Codec], x: np.ndarray) -> tuple[list[float], list[int]]:
    """The squared error and the bytes of a vector with each codec."""
    errors, sizes = [], []
    for codec in codecs:
        payload = codec.encode(x)
        errors.append(float(np.square(codec.decode(payload, x.shape).astype(np.float64) - x).sum()))
        sizes.append(len(payload))
    return errors, sizes


def cheapest(errors: np.ndarray, sizes: np.ndarray, budget: float, default: int) -> list[int]:
    """For each row the column, so that the sizes add up to the least and the errors to at most ``budget``.

    Errors are rounded up to whole bins, so the budget holds exactly; where that leaves nothing
    that fits, every row gets ``default``.

    Args:
        errors, sizes: shape (tensors, codecs).
    """
    if not budget > 0:
        return [default] * len(errors)
    bins = np.minimum(np.ceil(errors / budget * BINS), BINS + 1).astype(np.int64)
    best = np.full(BINS + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(errors), BINS + 1), np.int64)
    for row in range(len(errors)):
        reached = np.full((errors.shape[1], BINS + 1), np.inf)
        for column in range(errors.shape[1]):
            cost = bins[row, column]
            if cost <= BINS:
                reached[column, cost:] = best[: BINS + 1 - cost] + sizes[row, column]
        chosen[row] = reached.argmin(axis=0)
        best = reached.min(axis=0)
    if not np.isfinite(best).any() or best.min() >= sizes[:, default].sum():
        return [default] * len(errors)
    at, picks = int(best.argmin()), []
    for row in range(len(errors) - 1, -1, -1):
        picks.append(int(chosen[row, at]))
        at -= int(bins[row, picks[-1]])
    return picks[::-1]
