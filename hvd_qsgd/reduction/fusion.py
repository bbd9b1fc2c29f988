"""Fusion: many tensors travel as few exchanges, large ones as several.

The composition of the bundles depends on names and lengths alone, so that all ranks make
the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: About how many elements travel in one exchange, by default.
BUNDLE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Slice:
    """Elements ``start .. stop - 1`` of a named tensor."""

    name: str
    start: int
    stop: int


def backward_order(names: Iterable[str]) -> list[str]:
    """Names in about the order in which a backward pass makes gradients: the last layers first.

    It follows from the names alone: ranks may list their parameters in different orders.

    Examples:
        >>> backward_order(["layers.2.weight", "layers.10.weight", "embed.weight"])
        ['layers.10.weight', 'layers.2.weight', 'embed.weight']
    """
    # Text and numbers take turns.
    parts = {name: [int(s) if i % 2 else s for i, s in enumerate(re.split(r"(\d+)", name))] for name in names}
    return sorted(parts, key=lambda name: (parts[name], name), reverse=True)


def plan_bundles(lengths: Iterable[tuple[str, int]], granularity: int, limit: int) -> list[list[Slice]]:
    """Fill bundles with slices of tensors, in the order given.

    Args:
        lengths: name and number of elements of each tensor.
        granularity: tensors are cut at multiples of it; 0 means never (see ``Codec.granularity``).
        limit: elements in a bundle. A bundle is larger only where a tensor cannot be cut.
    """
    bundles: list[list[Slice]] = []
    room = 0
    for name, length in lengths:
        start = 0
        while start < length:
            step = length - start
            if granularity and step > room:
                # Rather a full new bundle than a small slice of this tensor in an old one.
                step = min(step, max(limit // granularity, 1) * granularity)
            if step > room:
                bundles.append([])
                room = limit
            bundles[-1].append(Slice(name, start, start + step))
            room -= step
            start += step
    return bundles
