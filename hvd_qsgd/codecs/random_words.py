"""Counter-based random words: the same on every backend, with no state array.

A 64-bit *stream* names who draws (seed, rank, tensor); a 64-bit *key* names one use of the
stream (step and phase); word ``i`` of a key is a pure function of the key and ``i``. Every
backend computes :func:`words` with 32-bit integer arithmetic, so payloads are equal byte
for byte wherever they are made. ``docs/wire-format.md`` states the functions in full.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

MASK64 = 0xFFFFFFFFFFFFFFFF
#: The odd 64-bit constant of SplitMix64 (Steele, Lea, Flood: Fast splittable PRNGs, OOPSLA 2014).
GOLDEN = 0x9E3779B97F4A7C15
#: Multipliers of a 32-bit mixer with low bias; each word passes through both.
MULTIPLIER_1 = 0x21F0AAAD
MULTIPLIER_2 = 0xD35A2D97


def stream_of(seed: int, rank: int, name: str) -> int:
    """The 64-bit stream of one tensor on one rank: BLAKE2b-64 of seed, rank and name."""
    head = struct.pack("<QQ", seed & MASK64, rank)
    return int.from_bytes(hashlib.blake2b(head + name.encode(), digest_size=8).digest(), "little")


def key_of(stream: int, step: int, phase: int = 0) -> int:
    """The 64-bit key of one use of a stream: SplitMix64's output number ``2 * step + phase``.

    ``phase`` is 0 where a rank encodes its own gradient and 1 where the owner of a shard
    encodes the mean again.
    """
    z = (stream + (2 * step + phase + 1) * GOLDEN) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def words(key: int, first: int, count: int) -> np.ndarray:
    """Words ``first .. first + count - 1`` of a key, modulo 2^32.

    Returns:
        uint32 array of shape (count,). The sequence repeats after 2^32 words.
    """
    with np.errstate(over="ignore"):
        h = np.arange(count, dtype=np.uint32) + np.uint32((first + key) & 0xFFFFFFFF)
        h ^= h >> np.uint32(16)
        h *= np.uint32(MULTIPLIER_1)
        h ^= h >> np.uint32(15)
        h += np.uint32((key >> 32) & 0xFFFFFFFF)
        h *= np.uint32(MULTIPLIER_2)
        h ^= h >> np.uint32(15)
    return h
