"""Looks: what the host must see of arrays on a device before it can go on.

Whoever reads a value of a GPU waits until the GPU has come to it. So work that needs such values is written as a
generator, which yields the arrays that it must see and is resumed with them as NumPy arrays. Many of them run side by
side (:func:`together`), and all that they ask for at a time is fetched by one copy, which an exchange requests like a
collective: the number of looks does not grow with the number of tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

#: Yields lists of flat arrays, is resumed with the same as NumPy arrays, and returns a T.
Looks = Generator[list[Any], list[np.ndarray], T]


def together(several: Iterable[Looks[T]]) -> Looks[list[T]]:
    """Run several side by side: what they look at next, they look at together. Returns what each returned."""
    under_way: dict[int, Looks[T]] = dict(enumerate(several))
    returned: dict[int, T] = {}
    seen: dict[int, list[np.ndarray]] = {}
    while True:
        asked: dict[int, list[Any]] = {}
        for number, looks in under_way.items():
            try:
                # None starts a generator.
                asked[number] = looks.send(seen.get(number))  # type: ignore[arg-type]
            except StopIteration as stop:
                returned[number] = stop.value
        if not asked:
            return [returned[number] for number in sorted(returned)]
        under_way = {number: under_way[number] for number in asked}
        arrays = iter((yield [array for of_one in asked.values() for array in of_one]))
        seen = {number: [next(arrays) for _ in of_one] for number, of_one in asked.items()}


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
