"""Torch tensors through codecs, and the ways of making up for their errors.

Sources: EF: Seide et al., Interspeech 2014; EF21: Richtarik et al. (arXiv 2106.05203); EF-mixed: Rudakov
et al. (arXiv 2401.07788); AQ-SGD: Wang et al. (arXiv 2206.01299), algorithm 1.

All values here are float32 of shape (samples, elements of a sample).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hvd_qsgd.codecs import Codec
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.kernels import kernels_for, kernels_of
from hvd_qsgd.pipeline.direction import Direction
from hvd_qsgd.pipeline.row_store import RowStore

Parts = list[np.ndarray]


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

    def encode(self, values: torch.Tensor) -> np.ndarray:
        flat = values.reshape(-1) if self.mask is None else values[self.mask]
        size = self.codec.payload_size(flat.numel())
        if flat.device.type == "cpu":
            payload = np.empty(size, np.uint8)
            return payload[: kernels_for(self.codec, "numba").encode_into(flat.contiguous().numpy(), payload, self.key)]
        on_device = torch.empty(size, dtype=torch.uint8, device=flat.device)
        used = kernels_of(self.codec, flat).encode_into(flat.contiguous(), on_device, self.key)
        return on_device[:used].cpu().numpy()

    def decode(self, payload: np.ndarray, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        length = shape[0] * shape[1] if self.mask is None else int(self.mask.sum())
        flat = torch.empty(length, dtype=torch.float32, device=device)
        if device.type == "cpu":
            kernels_for(self.codec, "numba").decode_into(payload, flat.numpy())
        else:
            kernels_of(self.codec, flat).decode_into(torch.from_numpy(payload).to(device), flat)
        if self.mask is None:
            return flat.view(shape)
        values = torch.zeros(shape, dtype=torch.float32, device=device)
        values[self.mask] = flat
        return values

    def of_rows(self, rows: np.ndarray) -> Coder:
        """The coder of some of the samples; ``rows`` is a bool for each."""
        return self if self.mask is None else replace(self, mask=self.mask[torch.from_numpy(rows)])


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

    def decode(self, coder: Coder, body: np.ndarray, keys: np.ndarray, features: int, device: Any) -> Decoded:
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
        body = [np.array([len(payloads[0])], "<u4").view(np.uint8), *payloads]
        decoded = self.decode(coder, np.concatenate(body), keys, values.shape[1], values.device)
        if all_finite(decoded.values):
            write(self.store, keys, values + residual - decoded.values)
        return body, decoded

    def decode(self, coder: Coder, body: np.ndarray, keys: np.ndarray, features: int, device: Any) -> Decoded:
        cut = 4 + int(np.frombuffer(body[:4].tobytes(), "<u4")[0])
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
        chosen = torch.from_numpy(known)
        parts = [np.packbits(known, bitorder="little"), as_bytes(values[~chosen])]
        change = None
        if known.any():
            memory = read(self.store, keys[known], values)
            payload = coder.of_rows(known).encode(values[chosen] - memory)
            parts.append(payload)
            change = coder.of_rows(known).decode(payload, shape_of(memory), values.device)
        return parts, self._update(values[~chosen], change, keys, known)

    def decode(self, coder: Coder, body: np.ndarray, keys: np.ndarray, features: int, device: Any) -> Decoded:
        known = self.store.known(keys)
        head = -(-len(keys) // 8)
        if not np.array_equal(np.unpackbits(body[:head], bitorder="little")[: len(keys)].astype(bool), known):
            raise ExchangeError(
                "The two ends of a boundary remember different samples, so that a change cannot be added to what it is "
                "the change of. Call reset() on all stages, or load the state that belongs to the same checkpoint."
            )
        unknown = int((~known).sum())
        end = head + 4 * unknown * features
        fresh = torch.from_numpy(np.frombuffer(body[head:end].tobytes(), np.float32).copy())
        change = None
        if known.any():
            change = coder.of_rows(known).decode(body[end:], (int(known.sum()), features), device)
        return self._update(fresh.view(unknown, features).to(device), change, keys, known)

    def observe(self, values: torch.Tensor, keys: np.ndarray) -> None:
        if all_finite(values):
            write(self.store, keys, values)

    def _update(self, fresh: torch.Tensor, change: Any, keys: np.ndarray, known: np.ndarray) -> Decoded:
        """The new values of all keys, on both ends from the same numbers."""
        values = torch.empty((len(keys), fresh.shape[1]), dtype=torch.float32, device=fresh.device)
        mask = torch.ones_like(values, dtype=torch.bool)
        chosen = torch.from_numpy(known)
        values[~chosen] = fresh
        if change is not None:
            values[chosen] = read(self.store, keys[known], fresh) + change
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


def as_bytes(values: torch.Tensor) -> np.ndarray:
    return values.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def all_finite(values: torch.Tensor) -> bool:
    return bool(values.isfinite().all())


def read(store: RowStore, keys: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(store.read(keys, like.shape[1])).to(like.device)


def write(store: RowStore, keys: np.ndarray, values: torch.Tensor) -> None:
    store.write(keys, values.cpu().numpy())
