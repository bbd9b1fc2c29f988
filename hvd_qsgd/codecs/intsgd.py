"""IntSGD: integers on a grid that follows from past means; see :mod:`hvd_qsgd.exchanges.intsgd`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.codecs.exchanged import ExchangedCodec
from hvd_qsgd.codecs.qsgd import QSGD
from hvd_qsgd.errors import ConfigError


@dataclass(frozen=True)
class IntSGD(ExchangedCodec):
    """Stochastic rounding to multiples of a step that all ranks know without asking.

    Args:
        bits: 2..8, of an integer of one rank with its sign; larger values are clipped.
        fineness: levels in ``sqrt(2 n)`` times the root mean square of past means, n ranks; 1 in the
            paper, whose rate is that of SGD. More is finer, until values are clipped.
        beta: of the moving average of squared means, 0 <= beta < 1.

    The first step of a tensor, and one after means of zero, agrees on scales instead. Where clipping takes more than
    an eighth of a rank's gradient (by the sum of magnitudes), the step grows, as with sparse gradients. A tensor
    that holds NaN or an infinity decodes to NaN as a whole.

    Raises:
        ConfigError: a value is out of range.
    """

    bits: int = 4
    fineness: float = 1.0
    beta: float = 0.9

    name: ClassVar[str] = "intsgd"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_integer("IntSGD", "bits", self.bits, 2, 8))
        if isinstance(self.fineness, bool) or not 0 < self.fineness < 2**20:
            raise ConfigError(f"IntSGD: fineness={self.fineness!r} must be a number above 0.")
        if isinstance(self.beta, bool) or not 0 <= self.beta < 1:
            raise ConfigError(f"IntSGD: beta={self.beta!r} must be a number from 0 to below 1.")

    @cached_property
    def grid(self) -> QSGD:
        """Rounds to the integers and packs them, given a scale."""
        return QSGD(self.bits, 65536)

    @cached_property
    def first_grid(self) -> QSGD:
        """Of the steps that agree on scales."""
        return QSGD(8, 512)
