"""Torch tensors through codecs, and the ways of making up for their errors.

Sources: EF: Seide et al., Interspeech 2014; EF21: Richtarik et al. (arXiv 2106.05203); EF-mixed: Rudakov
et al. (arXiv 2401.07788); AQ-SGD: Wang et al. (arXiv 2206.01299), algorithm 1.

All values here are float32 of shape (samples, elements of a sample).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hvd_qsgd.codecs import Codec
from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.kernels import kernels_for, kernels_of
from hvd_qsgd.kernels.torch.plain import reinterpret
from hvd_qsgd.pipeline.direction import Direction
from hvd_qsgd.pipeline.row_store import RowStore

#: uint8 tensors, in the memory of the tensor that they tell of.
Parts = list[torch.Tensor]


@dataclass
class Decoded:
    """What the receiver goes on with, and which values were in the message (None: all)."""

    values: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Coder:
    """The codec of one message: of all values, or of those under a mask."""

    codec: Codec
    key: int
    mask: torch.Tensor | None = None

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        flat = (values.reshape(-1) if self.mask is None else values[self.mask]).contiguous()
        payload = torch.empty(self.codec.payload_size(flat.numel()), dtype=torch.uint8, device=flat.device)
        kernels, wrap = kernels_and_arrays(self.codec, flat)
        return payload[: kernels.encode_into(wrap(flat), wrap(payload), self.key)]

    def decode(self, payload: torch.Tensor, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        length = shape[0] * shape[1] if self.mask is None else int(self.mask.sum())
        flat = torch.empty(length, dtype=torch.float32, device=device)
        kernels, wrap = kernels_and_arrays(self.codec, flat)
        kernels.decode_into(wrap(payload.to(device)), wrap(flat))
        if self.mask is None:
            return flat.view(shape)
        values = torch.zeros(shape, dtype=torch.float32, device=device)
        values[self.mask] = flat
        return values

    def of_rows(self, rows: torch.Tensor) -> Coder:
        """The coder of some of the samples; ``rows`` is a bool for each."""
        return self if self.mask is None else replace(self, mask=self.mask[rows])


def kernels_and_arrays(codec: Codec, like: torch.Tensor) -> tuple[Kernels, Callable[[torch.Tensor], Any]]:
    """The kernels for the device of a tensor, and what makes their arrays of tensors there."""
    if like.device.type == "cpu":
        return kernels_for(codec, "numba"), torch.Tensor.numpy
    return kernels_of(codec, like), lambda tensor: tensor


class Plain:
    """No feedback. The base of the others: ``encode`` on one end, ``decode`` on the other."""

    def __init__(self, store: RowStore) -> None:
        self.store = store

    def encode(
        self, coder: Coder, values: torch.Tensor, keys: np.ndarray, wanted: bool = True
    ) -> tuple[Parts, Decoded | None]:
        """The parts of the message's body, and, if wanted or known anyway, what the receiver will make of them."""
        payload = coder.encode(values)
        return [payload], masked(coder.decode(payload, shape_of(values), values.device)) if wanted else None

    def decode(self, coder: Coder, body: torch.Tensor, keys: np.ndarray, features: int, device: Any) -> Decoded:
        return masked(coder.decode(body, (len(keys), features), device))

    def observe(self, values: torch.Tensor, keys: np.ndarray) -> None:
        """Values that were sent uncompressed, on both ends."""


class ErrorFeedback(Plain):
    """Invariant: values + old residual = decoded + new residual. The receiver keeps nothing."""

    def encode(
        self, coder: Coder, values: torch.Tensor, keys: np.ndarray, wanted: bool = True
    ) -> tuple[Parts, Decoded | None]:
        corrected = values + read(self.store, keys, values)
        parts, decoded = super().encode(coder, corrected, keys)
        assert decoded is not None
        if all_finite(decoded.values):
            write(self.store, keys, corrected - decoded.values)
        return parts, decoded


class MixedFeedback(Plain):
    """Two payloads: of the values, and of the residual; their sum is received. ``coder`` keeps half of K."""

    def encode(
        self, coder: Coder, values: torch.Tensor, keys: np.ndarray, wanted: bool = True
    ) -> tuple[Parts, Decoded | None]:
        residual = read(self.store, keys, values)
        payloads = [coder.encode(values), coder.encode(residual)]
        body = [as_bytes(torch.tensor([len(payloads[0])], dtype=torch.int32, device=values.device)), *payloads]
        decoded = self.decode(coder, torch.cat(body), keys, values.shape[1], values.device)
        if all_finite(decoded.values):
            write(self.store, keys, values + residual - decoded.values)
        return body, decoded

    def decode(self, coder: Coder, body: torch.Tensor, keys: np.ndarray, features: int, device: Any) -> Decoded:
        cut = 4 + int(reinterpret(body[:4], torch.int32))
        first, second = (coder.decode(part, (len(keys), features), device) for part in (body[4:cut], body[cut:]))
        return masked(first + second)


class DeltaFeedback(Plain):
    """Both ends remember the values of every key; what is sent is their change, the first time all of it.

    With positions in the batch as keys this is EF21, with the numbers of samples AQ-SGD.
    """

    def encode(
        self, coder: Coder, values: torch.Tensor, keys: np.ndarray, wanted: bool = True
    ) -> tuple[Parts, Decoded | None]:
        known = self.store.known(keys)
        chosen = torch.from_numpy(known).to(values.device)
        parts = [
            torch.from_numpy(np.packbits(known, bitorder="little")).to(values.device),
            as_bytes(values[~chosen]),
        ]
        changed = None
        if known.any():
            memory, coder = read(self.store, keys[known], values), coder.of_rows(chosen)
            parts.append(coder.encode(values[chosen] - memory))
            changed = memory, coder.decode(parts[-1], shape_of(memory), values.device)
        return parts, self._update(values[~chosen], changed, keys, chosen)

    def decode(self, coder: Coder, body: torch.Tensor, keys: np.ndarray, features: int, device: Any) -> Decoded:
        known = self.store.known(keys)
        head = -(-len(keys) // 8)
        theirs = np.unpackbits(body[:head].cpu().numpy(), bitorder="little")[: len(keys)].astype(bool)
        if not np.array_equal(theirs, known):
            raise ExchangeError(
                "The two ends of a boundary remember different samples, so that a change cannot be added to what it is "
                "the change of. Call reset() on all stages, or load the state that belongs to the same checkpoint."
            )
        unknown = int((~known).sum())
        end = head + 4 * unknown * features
        fresh = reinterpret(body[head:end], torch.float32).to(device).view(unknown, features)
        chosen = torch.from_numpy(known).to(device)
        changed = None
        if known.any():
            memory = read(self.store, keys[known], fresh)
            changed = memory, coder.of_rows(chosen).decode(body[end:], shape_of(memory), device)
        return self._update(fresh, changed, keys, chosen)

    def observe(self, values: torch.Tensor, keys: np.ndarray) -> None:
        if all_finite(values):
            write(self.store, keys, values)

    def _update(
        self,
        fresh: torch.Tensor,
        changed: tuple[torch.Tensor, torch.Tensor] | None,
        keys: np.ndarray,
        chosen: torch.Tensor,
    ) -> Decoded:
        """The new values of all keys, on both ends from the same numbers: memories of ``chosen`` and their change."""
        values = torch.empty((len(keys), fresh.shape[1]), dtype=torch.float32, device=fresh.device)
        mask = torch.ones_like(values, dtype=torch.bool)
        values[~chosen] = fresh
        if changed is not None:
            memory, change = changed
            values[chosen] = memory + change
            mask[chosen] = change != 0
        if all_finite(values):
            write(self.store, keys, values)
        return Decoded(values, mask)


METHODS: dict[str, type[Plain]] = {
    "none": Plain,
    "ef": ErrorFeedback,
    "ef-mixed": MixedFeedback,
    "ef21": DeltaFeedback,
    "aq-sgd": DeltaFeedback,
}


def codec_of(direction: Direction, features: int, training: bool) -> Codec:
    """Half of K for each of the two payloads of EF-mixed, which is not used outside of training."""
    halves = training and direction.feedback == "ef-mixed"
    return (direction.halved() if halves else direction).codec_for(features)


def shape_of(values: torch.Tensor) -> tuple[int, int]:
    return values.shape[0], values.shape[1]


def masked(values: torch.Tensor) -> Decoded:
    return Decoded(values, values != 0)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def all_finite(values: torch.Tensor) -> bool:
    if values.device.type == "cpu":
        # Numba is loaded when the first message is made.
        from hvd_qsgd.kernels.numba import reduce

        return reduce.all_finite(values.reshape(-1).numpy())
    return bool(values.isfinite().all())


def read(store: RowStore, keys: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(store.read(keys, like.shape[1])).to(like.device)


def write(store: RowStore, keys: np.ndarray, values: torch.Tensor) -> None:
    store.write(keys, values.cpu().numpy())
