"""Scaled on any backend: the kernels of the codec inside, and a multiplication."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_qsgd.codecs.base import MODES, Kernels, unknown_mode
from hvd_qsgd.codecs.readback import Looks, at_once
from hvd_qsgd.codecs.scaled import Scaled
from hvd_qsgd.kernels import kernels_for


@dataclass(frozen=True)
class ScaledKernels(Kernels):
    """See :class:`hvd_qsgd.codecs.base.Kernels`."""

    codec: Scaled

    backend: ClassVar[str]

    @property
    def inner(self) -> Any:
        return kernels_for(self.codec.inner, self.backend)

    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        return int(self.inner.encode_into(x, out, key, first))

    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, len(out)))(out, mode)

    def prepare_decode(self, payload: Any, length: int) -> Looks[Callable[[Any, str], None]]:
        return functools.partial(self._combine, (yield from self.inner.prepare_decode(payload, length)))

    def _combine(self, decode: Callable[[Any, str], None], out: Any, mode: str) -> None:
        if mode not in MODES:
            raise unknown_mode(mode)
        values = out if mode == "set" else out + 0
        decode(values, "set")
        values *= float(self.codec.factor)
        if mode == "add":
            out += values
        elif mode == "subtract":
            out -= values

    def all_finite(self, x: Any) -> bool:
        return bool(self.inner.all_finite(x))

    def agree_into(self, x: Any, out: Any) -> None:
        self.inner.agree_into(x, out)

    def to_lanes(self, x: Any, agreed: Any, ranks: int, out: Any, key: int = 0, first: int = 0) -> None:
        self.inner.to_lanes(x, agreed, ranks, out, key, first)

    def from_lanes(self, sums: Any, agreed: Any, ranks: int, out: Any, count: int) -> None:
        self.inner.from_lanes(sums, agreed, ranks, out, count)
        out *= float(self.codec.factor)

    def to_sum(self, x: Any, out: Any, key: int, first: int = 0) -> None:
        self.inner.to_sum(x, out, key, first)

    def from_sum(self, sums: Any, out: Any, count: int, key: int, first: int = 0) -> None:
        self.inner.from_sum(sums, out, count, key, first)
        out *= float(self.codec.factor)


class NumbaKernels(ScaledKernels):
    backend = "numba"


class TorchKernels(ScaledKernels):
    backend = "torch"


class TritonKernels(ScaledKernels):
    backend = "triton"
