"""Kernels on a device whose values the host must see: how much is to be written, and whether it may be."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.codecs.readback import Looks, at_once

Write = Callable[[torch.Tensor], int]
Apply = Callable[[torch.Tensor, str], None]


class LookingKernels(Kernels):
    """Base of kernels that are made of their ``prepare_*`` methods; ``*_into`` wait at each look."""

    @abstractmethod
    def prepare_encode(self, x: torch.Tensor, key: int = 0, first: int = 0, keep_error: bool = False) -> Looks[Write]:
        """See :meth:`Kernels.prepare_encode`."""

    @abstractmethod
    def prepare_decode(self, payload: torch.Tensor, length: int) -> Looks[Apply]:
        """See :meth:`Kernels.prepare_decode`."""

    def encode_into(self, x: torch.Tensor, out: torch.Tensor, key: int = 0, first: int = 0) -> int:
        return at_once(self.prepare_encode(x, key, first))(out)

    def decode_into(self, payload: torch.Tensor, out: torch.Tensor, mode: str = "set") -> None:
        at_once(self.prepare_decode(payload, len(out)))(out, mode)
