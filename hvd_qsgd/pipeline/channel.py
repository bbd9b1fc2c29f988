"""The two ends of one direction of a boundary: a sender that makes messages, a receiver that reads them.

Neither knows how messages travel. Both count them, and keep the same memories where the feedback
needs it; now and then a message carries a digest of what the sender knows it to decode to.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.codecs.random_words import MASK64, key_of, stream_of
from hvd_qsgd.errors import ConfigError, ExchangeError
from hvd_qsgd.kernels.torch.plain import reinterpret
from hvd_qsgd.observe.stats import TensorStats
from hvd_qsgd.pipeline.coding import METHODS, Coder, Decoded, Plain, as_bytes, codec_of
from hvd_qsgd.pipeline.direction import Direction
from hvd_qsgd.pipeline.message import Header, bytes_of, check_tensor, unpack
from hvd_qsgd.pipeline.row_store import RowStore


@dataclass(frozen=True)
class Settings:
    """What all boundaries of a pipeline have in common.

    Args:
        seed: of stochastic rounding.
        replica: number of the pipeline, where there are several; each rounds with random words of its own.
        memory_limit: bytes of feedback memories of one end of one direction that stay in main memory.
        directory: where memories beyond that are kept; see :class:`RowStore`.
        verify_every: every how many messages both ends compare what was decoded; the first always is.

    Raises:
        ConfigError: a value is out of range.
    """

    seed: int = 0
    replica: int = 0
    memory_limit: int = 1 << 30
    directory: str | None = None
    verify_every: int = 100

    def __post_init__(self) -> None:
        check_integer("Settings", "seed", self.seed, 0, MASK64)
        check_integer("Settings", "memory_limit", self.memory_limit, 0, MASK64)
        check_integer("Settings", "verify_every", self.verify_every, 1, MASK64)


@dataclass
class Received:
    """A tensor, and what there is to know about it."""

    tensor: torch.Tensor
    mask: torch.Tensor | None
    header: Header


class End:
    """One end of a channel. ``name`` is the same on both."""

    def __init__(self, name: str, direction: Direction, settings: Settings) -> None:
        self.name = name
        self.direction = direction
        self.settings = settings
        self.sequence = 0
        self.store = RowStore(settings.memory_limit, settings.directory)
        text = json.dumps([name, settings.replica, settings.seed, direction.config()], sort_keys=True)
        self._fingerprint = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        self._stream = stream_of(settings.seed, settings.replica, name)
        self._feedback = METHODS[direction.feedback](self.store)
        self._plain = Plain(self.store)

    @property
    def remembers_on_both_ends(self) -> bool:
        return self.direction.feedback in ("ef21", "aq-sgd")

    def reset(self) -> None:
        """Forget everything; call it on both ends."""
        self.sequence = 0
        self.store.clear()

    def state_digest(self) -> torch.Tensor:
        """What must be equal on both ends, uint8: the number of messages, and memories that both keep."""
        digest = self.store.digest() if self.remembers_on_both_ends else b""
        return torch.frombuffer(bytearray(self.sequence.to_bytes(8, "little") + digest), dtype=torch.uint8)

    def state_dict(self) -> dict[str, Any]:
        return {"sequence": self.sequence, "store": self.store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sequence = int(state["sequence"])
        self.store.load_state_dict(state["store"])

    def _method(self, header: Header) -> Plain:
        return self._feedback if header.training else self._plain

    def _keys(self, header: Header) -> np.ndarray:
        if self.direction.feedback != "aq-sgd" or not header.training:
            return header.rows
        if header.samples is None:
            raise ConfigError(
                f'{self.name}: feedback="aq-sgd" has a memory for every sample, so it must know which these are: '
                f"pass samples=, the number of each sample in the data set, to train_step."
            )
        return header.samples

    def _coder(self, header: Header, mask: torch.Tensor | None) -> Coder:
        codec = codec_of(self.direction, header.features, header.training)
        key = key_of(self._stream, header.sequence)
        return Coder(codec, key, mask if self.direction.shared_mask else None)

    def _observes(self, header: Header) -> bool:
        return header.training and self.remembers_on_both_ends


class Sender(End):
    """The end that compresses."""

    def __init__(self, name: str, direction: Direction, settings: Settings) -> None:
        super().__init__(name, direction, settings)
        self.stats = TensorStats(exchange="point_to_point")
        #: Epochs that have begun; see ``Direction.warmup_epochs``.
        self.epoch = 0

    def encode(
        self,
        x: torch.Tensor,
        *,
        first_row: int = 0,
        samples: np.ndarray | None = None,
        training: bool = True,
        mask: torch.Tensor | None = None,
        want_mask: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next message, uint8 in the memory where ``x`` is.

        Args:
            x: floating-point tensor of shape (samples, ...).
            first_row: position of its first sample in the batch.
            samples: number of each sample in the data set, int64; for "aq-sgd".
            training: whether feedback applies.
            mask: with ``shared_mask``, which values were sent in the other direction; None is all.
            want_mask: whether to work out the second result.

        Returns:
            The message, and which values are in it and not zero, bool of shape (samples, elements); None is all.

        Raises:
            UnsupportedError: ``x`` cannot be sent.
            ConfigError: samples are missing, or stand in the batch twice.
        """
        check_tensor(x)
        if samples is not None:
            samples = check_samples(samples, x.shape[0])
        header = Header(self._fingerprint, self.sequence, tuple(x.shape), x.dtype, first_row, training=training)
        header.samples = samples if self.direction.feedback == "aq-sgd" and training else None
        header.compressed = self._compresses(training) and x.numel() > 0
        verify = self.sequence % self.settings.verify_every == 0
        keys = self._keys(header)
        decoded: Decoded | None = None
        values = x.detach().reshape(x.shape[0], -1)
        if header.compressed:
            coder = self._coder(header, mask)
            wanted = verify or want_mask
            parts, decoded = self._method(header).encode(coder, values.float(), keys, wanted)
            if verify and decoded is not None:
                header.digest = digest_of(decoded.values)
        else:
            parts = [as_bytes(values)]
            if self._observes(header):
                self._feedback.observe(values.float(), keys)
        message = torch.cat([header.pack().to(x.device), *parts])
        self.sequence += 1
        self._count(x, message)
        return message, decoded.mask if decoded is not None else None

    def _compresses(self, training: bool) -> bool:
        wanted = self.epoch >= self.direction.warmup_epochs if training else self.direction.at_inference
        return wanted and self.direction.compresses

    def _count(self, x: torch.Tensor, message: torch.Tensor) -> None:
        raw = x.numel() * x.element_size()
        self.stats.elements = x.numel()
        self.stats.exchanges += 1
        self.stats.raw_bytes += raw
        self.stats.payload_bytes += len(message)
        self.stats.wire_bytes += len(message)
        self.stats.uncompressed_wire_bytes += raw


class Receiver(End):
    """The end that decodes."""

    def decode(self, message: torch.Tensor, device: Any = None, mask: torch.Tensor | None = None) -> Received:
        """The tensor of the next message, wherever that is, on ``device`` (default: the CPU).

        Raises:
            ExchangeError: the message is not the one that is due, or the two ends differ.
        """
        device = torch.device(device or "cpu")
        header, body = unpack(message)
        self._check(header)
        keys = self._keys(header)
        shape = (header.shape[0], header.features)
        if header.compressed:
            decoded = self._method(header).decode(self._coder(header, mask), body, keys, header.features, device)
            if header.digest is not None and digest_of(decoded.values) != header.digest:
                raise ExchangeError(
                    f"{self.name}: message {header.sequence} decodes to other values than its sender decoded. "
                    f"The memories of the two ends differ, or a machine computes wrongly: call reset() on all stages, "
                    f"or load the last checkpoint."
                )
            tensor, sent = decoded.values, decoded.mask
        else:
            if len(body) != shape[0] * shape[1] * header.dtype.itemsize:
                raise ExchangeError(f"{self.name}: {len(body)} bytes came for a tensor of shape {header.shape}.")
            tensor, sent = reinterpret(body.to(device), header.dtype).view(shape), None
            if self._observes(header):
                self._feedback.observe(tensor.float(), keys)
        self.sequence += 1
        return Received(tensor.to(header.dtype).view(header.shape), sent, header)

    def _check(self, header: Header) -> None:
        if header.fingerprint != self._fingerprint:
            raise ExchangeError(
                f"{self.name}: the other end has other settings than this one, which has {self.direction} and "
                f"{self.settings}. All ranks must make the pipeline with the same settings."
            )
        if header.sequence != self.sequence:
            raise ExchangeError(
                f"{self.name}: message {header.sequence} came, but number {self.sequence} is due. "
                f"All ranks must call the same methods of the pipeline in the same order."
            )


def check_samples(samples: Any, batch: int) -> np.ndarray:
    """The numbers of samples as int64 of shape (batch,)."""
    numbers = np.asarray(samples, np.int64).reshape(-1)
    if len(numbers) != batch:
        raise ConfigError(f"samples= has {len(numbers)} numbers for a batch of {batch} samples.")
    if len(np.unique(numbers)) != batch:
        raise ConfigError(
            "samples= names a sample twice in one batch, and its memory can only be changed once. "
            "Draw batches without replacement."
        )
    return numbers


def digest_of(values: torch.Tensor) -> int:
    # NaN has many bit patterns.
    return zlib.crc32(bytes_of(as_bytes(values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf))))
