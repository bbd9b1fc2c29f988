"""Checks of what was read from a file, made of small ones: an error says which field is wrong, and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hvd_qsgd.text import shortened

#: Gives a value back, or raises WrongFieldError. The second argument says where in the file's content it stands.
Check = Callable[[Any, str], Any]


class WrongFieldError(ValueError):
    """What is wrong with a field, as a sentence that begins with its place."""


def number(low: int, high: float, whole: bool = False, or_null: bool = False) -> Check:
    what = f"a {'whole ' * whole}number from {low} to {high:g}{' or null' * or_null}"

    def check(value: Any, place: str) -> Any:
        if value is None and or_null:
            return value
        # True is an int, and NaN is in no range.
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            raise wrong(value, place, what)
        return value

    return check


def text(value: Any, place: str) -> Any:
    if not isinstance(value, str):
        raise wrong(value, place, "text")
    return value


def named(check: Check) -> Check:
    """An object whose fields are names that somebody gave, with values that pass the check."""

    def check_all(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise wrong(value, place, "an object")
        return {
            text(name, f"a name in {place}"): check(part, f"{place}[{shortened(repr(name))}]")
            for name, part in value.items()
        }

    return check_all


def fields(checks: Mapping[str, Check]) -> Check:
    """An object with these fields; others are left out."""

    def check_all(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise wrong(value, place, "an object")
        found = {}
        for name, check in checks.items():
            inner = f"{place}.{name}" if place else name
            if name not in value:
                raise WrongFieldError(f"{inner} is missing")
            found[name] = check(value[name], inner)
        return found

    return check_all


def wrong(value: Any, place: str, what: str) -> WrongFieldError:
    return WrongFieldError(f"{place} is {shown(value)}, and must be {what}")


def shown(value: Any) -> str:
    """A value of JSON in few words: others may be as long or as deep as they like."""
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value)) or shortened(repr(value))
