"""Rows of numbers by key: in memory up to a bound, in files beyond it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from typing import Any

import numpy as np

from hvd_qsgd.errors import ConfigError

#: Rows are allocated in blocks of about this many bytes.
BLOCK_BYTES = 16 << 20


class RowStore:
    """float32 rows of one length by an integer key.

    Args:
        memory_limit: bytes that are kept in memory; further blocks are memory-mapped files.
        directory: where those files are; default is the directory for temporary files. They have
            no name, so that nothing is left when the process ends, however it ends.
    """

    def __init__(self, memory_limit: int = 1 << 30, directory: str | os.PathLike[str] | None = None) -> None:
        self.memory_limit = memory_limit
        self.directory = directory
        self._slots: dict[int, int] = {}
        self._blocks: list[np.ndarray] = []
        self._features = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def memory_bytes(self) -> int:
        """Of the rows that are in memory."""
        return sum(block.nbytes for block in self._blocks if not isinstance(block, np.memmap))

    @property
    def disk_bytes(self) -> int:
        """Of the rows that are in files."""
        return sum(block.nbytes for block in self._blocks if isinstance(block, np.memmap))

    def known(self, keys: np.ndarray) -> np.ndarray:
        """Whether there is a row of each key: bool of shape (len(keys),)."""
        return np.fromiter((key in self._slots for key in keys.tolist()), bool, len(keys))

    def read(self, keys: np.ndarray, features: int) -> np.ndarray:
        """A copy of the rows, float32 of shape (len(keys), features); zeros where there is none."""
        rows = np.zeros((len(keys), features), np.float32)
        if self._slots:
            self._check(features)
            for row, key in zip(rows, keys.tolist()):
                slot = self._slots.get(key)
                if slot is not None:
                    row[...] = self._row(slot)
        return rows

    def write(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Set the rows of these keys, new ones among them."""
        if not self._slots:
            self._features = rows.shape[1]
        self._check(rows.shape[1])
        for key, row in zip(keys.tolist(), rows):
            slot = self._slots.setdefault(key, len(self._slots))
            self._row(slot)[...] = row

    def clear(self) -> None:
        """Forget all rows."""
        self._slots.clear()
        self._blocks.clear()

    def digest(self) -> bytes:
        """16 bytes that two stores share if, and practically only if, they hold the same rows."""
        total = hashlib.blake2b(digest_size=16)
        for key in sorted(self._slots):
            total.update(key.to_bytes(8, "little", signed=True))
            total.update(self._row(self._slots[key]).tobytes())
        return total.digest()

    def state_dict(self) -> dict[str, Any]:
        """The "keys", int64 of shape (rows,), and "rows", float32 of shape (rows, features)."""
        keys = np.array(sorted(self._slots), np.int64)
        return {"keys": keys, "rows": self.read(keys, self._features)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` gave, and nothing else."""
        self.clear()
        if len(state["keys"]):
            self.write(np.asarray(state["keys"]), np.asarray(state["rows"], np.float32))

    def _check(self, features: int) -> None:
        if features != self._features:
            raise ConfigError(
                f"A feedback buffer holds samples of {self._features} elements, but samples of {features} came. "
                f"Feedback needs samples of one size; after a change call reset() on all stages."
            )

    def _row(self, slot: int) -> np.ndarray:
        per_block = max(BLOCK_BYTES // (4 * max(self._features, 1)), 1)
        while len(self._blocks) * per_block <= slot:
            self._blocks.append(self._new_block((per_block, self._features)))
        return self._blocks[slot // per_block][slot % per_block]

    def _new_block(self, shape: tuple[int, int]) -> np.ndarray:
        if self.memory_bytes + 4 * shape[0] * shape[1] <= self.memory_limit:
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            return np.memmap(file, np.float32, "w+", shape=shape)
