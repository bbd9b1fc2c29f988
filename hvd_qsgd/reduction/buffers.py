"""Arrays that are used again in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Buffers:
    """The arrays that an exchange asks for, kept for the next exchange of the same bundle."""

    def __init__(self, make: Callable[[int, str], Any]) -> None:
        self._make = make
        self._arrays: list[Any] = []
        self._next = 0

    def rewind(self) -> None:
        """The next request gets the first array again."""
        self._next = 0

    def __call__(self, length: int, dtype: str) -> Any:
        if self._next == len(self._arrays):
            self._arrays.append(self._make(length, dtype))
        elif len(self._arrays[self._next]) != length:
            self._arrays[self._next] = self._make(length, dtype)
        self._next += 1
        return self._arrays[self._next - 1]
