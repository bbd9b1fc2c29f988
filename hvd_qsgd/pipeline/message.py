"""What travels through a boundary: a header that says all about the tensor, then its bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from hvd_qsgd.errors import ExchangeError, UnsupportedError

#: "HQP1", fingerprint, sequence number, digest, number of the first row, flags, dtype, dimensions, a zero byte.
HEADER = struct.Struct("<4sIIIIBBBx")
MAGIC = b"HQP1"
#: Bytes of a header with the most dimensions, without numbers of samples.
LONGEST = HEADER.size + 4 * 255
COMPRESSED, TRAINING, DIGEST, SAMPLES = 1, 2, 4, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Header:
    """All that a receiver has to know."""

    fingerprint: int
    sequence: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: Position of the tensor's first sample in its batch.
    first_row: int = 0
    compressed: bool = False
    training: bool = False
    #: CRC-32 of the values that the sender knows the receiver to decode, now and then.
    digest: int | None = None
    #: Number of each sample in its data set, int64, for feedback that remembers samples.
    samples: np.ndarray | None = None

    @property
    def features(self) -> int:
        """Elements of a sample."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def rows(self) -> np.ndarray:
        """Position of each sample in its batch."""
        return self.first_row + np.arange(self.shape[0], dtype=np.int64)

    def pack(self) -> torch.Tensor:
        """The header's bytes, in host memory."""
        flags = COMPRESSED * self.compressed | TRAINING * self.training
        flags |= DIGEST * (self.digest is not None) | SAMPLES * (self.samples is not None)
        packed = HEADER.pack(
            MAGIC,
            self.fingerprint,
            self.sequence,
            self.digest or 0,
            self.first_row,
            flags,
            DTYPES.index(self.dtype),
            len(self.shape),
        )
        packed += struct.pack(f"<{len(self.shape)}I", *self.shape)
        if self.samples is not None:
            packed += self.samples.astype("<i8").tobytes()
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def check_tensor(x: torch.Tensor) -> None:
    """Raise UnsupportedError unless the tensor can cross a boundary."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES or x.dim() < 1:
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise UnsupportedError(
            f"A stage must return one floating-point tensor, its first dimension the batch, but it returned {what}. "
            f"Cut the model where a single tensor goes from stage to stage."
        )


def unpack(message: torch.Tensor) -> tuple[Header, torch.Tensor]:
    """The header of a message, and its body, which stays in the memory where the message is.

    Raises:
        ExchangeError: this is no message, or its end is missing.
    """
    data = bytes_of(message[:LONGEST])
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise ExchangeError(
            f"{len(message)} bytes came that are no pipeline message. All stages must run the same version of hvd_qsgd."
        )
    _, fingerprint, sequence, digest, first_row, flags, dtype, dimensions = HEADER.unpack(data[: HEADER.size])
    at = HEADER.size + 4 * dimensions
    if dtype >= len(DTYPES) or len(message) < at:
        raise ExchangeError(f"A pipeline message of {len(message)} bytes has a damaged header.")
    shape = struct.unpack(f"<{dimensions}I", data[HEADER.size : at])
    samples = None
    if flags & SAMPLES:
        end = at + 8 * shape[0]
        samples = np.frombuffer(bytes_of(message[at:end]), "<i8").astype(np.int64)
        at = end
    header = Header(
        fingerprint,
        sequence,
        shape,
        DTYPES[dtype],
        first_row,
        bool(flags & COMPRESSED),
        bool(flags & TRAINING),
        digest if flags & DIGEST else None,
        samples,
    )
    return header, message[at:]


def bytes_of(data: torch.Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
