"""Measures what an exchange loses of one tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvd_qsgd.observe.stats import TensorStats


class Probe:
    """Lies in an exchange in place of a tensor, with ``keep_error``: what is left in ``x`` was not sent.

    Args:
        x: flat float32 of any backend, what the rank has to encode.
        own: whether the exchange may write to ``x``, because it is the memory of error feedback; else a copy is made.
    """

    def __init__(self, x: Any, own: bool) -> None:
        self.x = x if own else x + 0
        self._own = own
        self._input_norm = norm(x)

    def read(self, record: TensorStats) -> None:
        """After the exchange, and before feedback turns what is left into something else."""
        record.input_norm, record.lost_norm = self._input_norm, norm(self.x)
        record.residual_norm = record.lost_norm if self._own else None
        record.measured = record.exchanges


def norm(x: Any) -> float:
    """The Euclidean norm; waits for the device that ``x`` is on."""
    return float(np.linalg.norm(x) if isinstance(x, np.ndarray) else x.norm())
