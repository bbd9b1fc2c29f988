"""Looks: what the host must see of arrays on a device before it can go on.

Whoever reads a value of a GPU waits until the GPU has come to it. So work that needs such values is written as a
generator, which yields the arrays that it must see and is resumed with them as NumPy arrays. Many of them run side by
side (:func:`together`), and all that they ask for at a time is fetched by one copy, which an exchange requests like a
collective: the number of looks does not grow with the number of tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

#: Yields lists of flat arrays, is resumed with the same as NumPy arrays, and returns a T.
Looks = Generator[list[Any], list[np.ndarray], T]


def together(several: Iterable[Looks[T]]) -> Looks[list[T]]:
    """Run several side by side: what they look at next, they look at together. Returns what each returned."""
    returned: dict[int, T] = {}

    def noting(number: int, looks: Looks[T]) -> Looks[None]:
        returned[number] = yield from looks

    under_way = [noting(*numbered) for numbered in enumerate(several)]
    # Most never look, and a generator that ends is told by next() without the price of an exception.
    asked = {number: first for number, one in enumerate(under_way) if (first := next(one, None)) is not None}
    while asked:
        arrays = iter((yield [array for of_one in asked.values() for array in of_one]))
        seen = {number: [next(arrays) for _ in of_one] for number, of_one in asked.items()}
        asked = {}
        for number, of_one in seen.items():
            with contextlib.suppress(StopIteration):
                asked[number] = under_way[number].send(of_one)
    return [returned[number] for number in range(len(under_way))]


def at_once(looks: Looks[T]) -> T:
    """Run to the end, and wait for the device at each look."""
    seen: Any = None
    while True:
        try:
            asked = looks.send(seen)
        except StopIteration as stop:
            value: T = stop.value
            return value
        seen = [array if isinstance(array, np.ndarray) else array.cpu().numpy() for array in asked]
