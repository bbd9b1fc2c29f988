"""RowTopK: the k largest of every row of consecutive values.

Source: as for :mod:`hvd_qsgd.codecs.topk`, per group of consecutive values. The payload has a
fixed size and can be cut between rows, so that it travels by scatter_gather as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, check_integer, combine
from hvd_qsgd.codecs.bits import pack_stream, unpack_stream
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.errors import ConfigError, PayloadError

ABS_MASK = np.uint32(0x7FFFFFFF)
INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class RowTopK(Codec):
    """Keep the ``k = max(1, round(ratio * row))`` values of largest magnitude of each row.

    Args:
        ratio: share of the values to keep, 0 < ratio <= 1.
        row: consecutive elements of a row, 2..65536; the last row is as short as it is and keeps
            its own share.

    Of equal magnitudes the one that stands first is kept. A row that holds NaN or an infinity
    decodes to NaN.

    Raises:
        ConfigError: a value is out of range.
    """

    ratio: float = 0.01
    row: int = 1024

    name: ClassVar[str] = "topk_rows"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise ConfigError(f"RowTopK: ratio={self.ratio!r} must be a number above 0 and at most 1.")
        object.__setattr__(self, "row", check_integer("RowTopK", "row", self.row, 2, 65536))

    @property
    def granularity(self) -> int:
        return self.row

    @property
    def biased(self) -> bool:
        return True

    @property
    def width(self) -> int:
        """Bits of a position in its row."""
        return (self.row - 1).bit_length()

    def kept(self, length: int) -> int:
        """How many of a row of ``length`` values are kept."""
        return min(max(1, round(self.ratio * length)), length)

    def count(self, length: int) -> int:
        """How many of ``length`` values are kept in all."""
        full, tail = divmod(length, self.row)
        return full * self.kept(self.row) + self.kept(tail)

    def payload_size(self, length: int) -> int:
        return 4 * self.count(length) + -(-self.count(length) * self.width // 8)

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        """Payload: the values of all rows, float32, then their positions in the rows as one bit stream."""
        positions = np.concatenate([largest_of_rows(rows, self.kept(rows.shape[1])) for rows in self._rows(x)])
        values = x[positions + self._starts(x.size)]
        values[self._rows_not_finite(x)] = np.nan
        size, at = self.payload_size(x.size), values.nbytes
        self.check_room(out, size)
        out[:at] = values.astype("<f4").view(np.uint8)
        out[at:size] = pack_stream(positions, self.width)
        return size

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, out.size))(out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        yield from ()
        self.check_payload(payload, length)
        at = 4 * self.count(length)
        values = np.frombuffer(payload[:at].tobytes(), "<f4")
        positions = unpack_stream(payload[at:], len(values), self.width).astype(np.int64)
        starts = self._starts(length)
        self.check_positions(positions, starts, length)
        return functools.partial(self._combine, positions + starts, values)

    def _combine(self, places: np.ndarray, values: np.ndarray, out: np.ndarray, mode: str) -> None:
        """Set, add or subtract values at their places; rows of which one is NaN become NaN."""
        dense = np.zeros_like(out)
        dense[places] = values
        for row in np.unique(places[np.isnan(values)] // self.row):
            dense[row * self.row : (row + 1) * self.row] = np.nan
        combine(out, dense, mode)

    def check_positions(self, positions: np.ndarray, starts: np.ndarray, length: int) -> None:
        """Raise PayloadError unless positions are ascending and inside their rows."""
        if len(positions) and (
            (np.diff(positions + starts) <= 0).any()
            or (positions >= self.row).any()
            or positions[-1] + starts[-1] >= length
        ):
            raise PayloadError(
                f"A topk_rows payload of {length} elements holds positions that are not ascending or too large. "
                f"Decode with the configuration and the shape it was encoded with: {self.config()}"
            )

    def _rows(self, x: np.ndarray) -> list[np.ndarray]:
        full = x.size // self.row * self.row
        return [x[:full].reshape(-1, self.row), x[full:].reshape(1, -1)]

    def _starts(self, length: int) -> np.ndarray:
        """For each kept value where its row starts."""
        full, tail = divmod(length, self.row)
        starts = np.repeat(np.arange(full, dtype=np.int64) * self.row, self.kept(self.row))
        return np.concatenate([starts, np.full(self.kept(tail), full * self.row, np.int64)])

    def _rows_not_finite(self, x: np.ndarray) -> np.ndarray:
        """For each kept value whether its row holds NaN or an infinity."""
        return np.concatenate([np.repeat(~np.isfinite(r).all(axis=1), self.kept(r.shape[1])) for r in self._rows(x)])


def largest_of_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Ascending positions of the ``count`` largest magnitudes of each row, flat int64; of equal ones the first."""
    magnitudes = (np.ascontiguousarray(rows).view(np.uint32) & ABS_MASK).astype(np.int64)
    order = np.argsort(-magnitudes, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1).reshape(-1).astype(np.int64)
