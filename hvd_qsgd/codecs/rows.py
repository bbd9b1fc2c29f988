"""Rows: another codec on each row of a tensor by itself.

A row is a sample of a batch. TopK by row keeps the largest values of every sample, where TopK of
the whole batch might take them all from a few; MinMax by row gives every sample limits of its own,
and QSGD by row lets no bucket reach from one sample into the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, Kernels, check_integer
from hvd_qsgd.codecs.random_words import GOLDEN, MASK64
from hvd_qsgd.codecs.readback import Looks, at_once, together
from hvd_qsgd.errors import ConfigError, PayloadError


@dataclass(frozen=True)
class Rows(Codec):
    """Encode each ``length`` consecutive elements with a codec; the last row may be shorter.

    Args:
        inner: the codec of a row.
        length: elements of a row, 1..2^32-1.

    Raises:
        ConfigError: ``inner`` is not a codec or is Rows itself, or ``length`` is out of range.
    """

    inner: Codec
    length: int

    name: ClassVar[str] = "rows"
    encodes_means: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec) or isinstance(self.inner, Rows):
            raise ConfigError(f"Rows: inner={self.inner!r} must be a codec that encodes a row, such as TopK(0.1).")
        object.__setattr__(self, "length", check_integer("Rows", "length", self.length, 1, 2**32 - 1))

    def config(self) -> dict[str, Any]:
        return {"codec": self.name, "inner": self.inner.config(), "length": self.length}

    @property
    def variable_size(self) -> bool:  # type: ignore[override]
        return self.inner.variable_size

    @property
    def granularity(self) -> int:
        return self.length

    @property
    def biased(self) -> bool:
        return self.inner.biased

    def payload_size(self, length: int) -> int:
        full, tail = divmod(length, self.length)
        payloads = full * self.inner.payload_size(self.length) + (self.inner.payload_size(tail) if tail else 0)
        return self.sizes_bytes(length) + payloads

    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        return RowsKernels(self, self.inner).encode_into(x, out, key, first)

    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        RowsKernels(self, self.inner).decode_into(payload, out, mode)

    def prepare_decode(self, payload: np.ndarray, length: int) -> Looks[Callable[[np.ndarray, str], None]]:
        return RowsKernels(self, self.inner).prepare_decode(payload, length)

    def sizes_bytes(self, length: int) -> int:
        """Bytes of the table of payload sizes, which only rows of variable size need."""
        return 4 * -(-length // self.length) if self.variable_size else 0

    def spans(self, head: np.ndarray, length: int, size: int) -> list[tuple[int, int]]:
        """Where the payload of each row stands in one of ``size`` bytes that begins with ``head``.

        Raises:
            PayloadError: the sizes of the rows do not add up to ``size``.
        """
        starts = range(0, length, self.length)
        table = self.sizes_bytes(length)
        if len(head) < table:
            raise PayloadError(f"A rows payload of {len(starts)} rows has at least {table} bytes, but {size} came.")
        if self.variable_size:
            sizes = np.frombuffer(head[:table].tobytes(), "<u4").astype(np.int64)
        else:
            sizes = np.array([self.inner.payload_size(min(self.length, length - start)) for start in starts], np.int64)
        ends = table + np.cumsum(sizes)
        total = int(ends[-1]) if len(ends) else table
        if total != size:
            raise PayloadError(
                f"A rows payload whose rows take {total} bytes in all came with {size} bytes, but must have as many. "
                f"Decode with the configuration and the shape it was encoded with: {self.config()}"
            )
        return list(zip((ends - sizes).tolist(), ends.tolist()))


class RowsKernels(Kernels):
    """Rows on any backend, by the kernels of the inner codec there."""

    def __init__(self, codec: Rows, inner: Kernels) -> None:
        self.codec: Rows = codec
        self.inner = inner

    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        codec = self.codec
        table = codec.sizes_bytes(len(x))
        codec.check_room(out, table)
        at, sizes = table, []
        for number, row in enumerate(self._rows(x), first // codec.length):
            sizes.append(self.inner.encode_into(row, out[at:], row_key(key, number)))
            at += sizes[-1]
        if table:
            out[:table] = like(np.array(sizes, "<u4").view(np.uint8), out)
        return at

    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, len(out)))(out, mode)

    def prepare_decode(self, payload: Any, length: int) -> Looks[Callable[[Any, str], None]]:
        codec = self.codec
        head = payload[: codec.sizes_bytes(length)]
        if not isinstance(head, np.ndarray):
            (head,) = yield [head]
        spans = codec.spans(head, length, len(payload))
        lengths = (min(codec.length, length - start) for start in range(0, length, codec.length))
        decodes = yield from together(
            self.inner.prepare_decode(payload[start:stop], of_row) for (start, stop), of_row in zip(spans, lengths)
        )
        return functools.partial(self._apply, decodes)

    def _apply(self, decodes: list[Callable[[Any, str], None]], out: Any, mode: str) -> None:
        for row, decode in zip(self._rows(out), decodes):
            decode(row, mode)

    def all_finite(self, x: Any) -> bool:
        return self.inner.all_finite(x)

    def _rows(self, x: Any) -> Iterator[Any]:
        return (x[start : start + self.codec.length] for start in range(0, len(x), self.codec.length))


def row_key(key: int, number: int) -> int:
    """The key of one row's random words."""
    return (key + number * GOLDEN) & MASK64


def like(array: np.ndarray, other: Any) -> Any:
    """The array as one of the backend and device of ``other``."""
    if isinstance(other, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(other.device)
