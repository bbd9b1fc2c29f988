"""PowerSGD: gradients as products of two thin matrices; see :mod:`hvd_qsgd.exchanges.powersgd`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.codecs.exchanged import ExchangedCodec


@dataclass(frozen=True)
class PowerSGD(ExchangedCodec):
    """Sends ``rank * (rows + columns)`` values of a gradient of ``rows * columns``.

    Args:
        rank: columns of the two factors, 1..1024.

    The first dimension of a tensor gives the rows. Tensors that it would not make at least two
    times smaller are sent as they are.

    Raises:
        ConfigError: a value is out of range.
    """

    rank: int = 4

    name: ClassVar[str] = "powersgd"
    shared_randomness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_integer("PowerSGD", "rank", self.rank, 1, 1024))

    @property
    def biased(self) -> bool:
        return True

    def pays(self, rows: int, columns: int) -> bool:
        """Whether the factors are at least two times smaller than the matrix."""
        return 2 * self.rank * (rows + columns) <= rows * columns
