"""What a saved state holds (:meth:`hvd_qsgd.compressors.base.CompressorBase.state_dict`), checked before it is used."""

from __future__ import annotations

from typing import Any

from hvd_qsgd.checks import WrongFieldError, fields, named, number, text, wrong
from hvd_qsgd.compressors.base import STATE_VERSION

#: Settings and states of policies are nested a few levels deep.
LEVELS = 20


def array(value: Any, place: str) -> Any:
    if not str(getattr(value, "dtype", "")).removeprefix("torch.").startswith(("float", "bfloat")):
        raise WrongFieldError(f"{place} is no array of floating-point values")
    return value


def plain_values(value: Any, place: str, levels: int = LEVELS) -> Any:
    """Dictionaries, lists, and what JSON knows besides; arrays as well."""
    if not levels:
        raise WrongFieldError(f"{place} is nested more than {LEVELS} levels deep")
    if isinstance(value, dict):
        for name, part in value.items():
            plain_values(part, f"{place}.{text(name, f'a name in {place}')}", levels - 1)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            plain_values(part, f"{place}[{index}]", levels - 1)
    elif value is not None and not isinstance(value, (bool, int, float, str)) and not hasattr(value, "dtype"):
        raise wrong(value, place, "a plain value")
    return value


def settings(value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise wrong(value, place, "an object")
    return plain_values(value, place)


def number_or_array(value: Any, place: str) -> Any:
    return value if isinstance(value, (int, float)) else array(value, place)


STEP = number(-1, 2**62, whole=True)
#: Of the states of every version.
ALWAYS = {"version": number(0, 2**62, whole=True), "config": settings, "arrays": named(array), "steps": named(STEP)}
#: Of those that this version writes.
NOW = {"numbers": named(STEP), "memory": named(named(number_or_array)), "policy": settings}


def check_saved(state: Any) -> None:
    """Raise WrongFieldError unless it is a state of a compressor. More fields than are known here may be there."""
    fields(ALWAYS)(state, "")
    if state["version"] == STATE_VERSION:
        fields(NOW)(state, "")
