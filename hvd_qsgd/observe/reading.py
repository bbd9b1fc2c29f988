"""Records as :class:`hvd_qsgd.observe.JsonLines` wrote them, each checked whole before anything is done with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.json_lines import VERSION
from hvd_qsgd.text import plain, shortened

#: Gives a value back, or raises WrongFieldError. The second argument says where in the record it stands.
Check = Callable[[Any, str], Any]


class WrongFieldError(ValueError):
    """What is wrong with a record, as the end of a sentence that begins with its place."""


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
        return {name: check(part, f"{place}[{shortened(repr(name))}]") for name, part in value.items()}

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


#: Far more than any run has, and few enough for dates, sums and the axes of plots.
COUNT = number(0, 2**62, whole=True)
POSITIVE = number(1, 2**53, whole=True)
SECONDS = number(0, 1e12)
BYTES = number(0, 1e20)
NORM = number(0, 1e100, or_null=True)
COUNTS = {
    "raw_bytes": COUNT,
    "payload_bytes": COUNT,
    "wire_bytes": BYTES,
    "uncompressed_wire_bytes": BYTES,
    "encode_seconds": SECONDS,
    "wait_seconds": SECONDS,
    "decode_seconds": SECONDS,
}
#: Of :meth:`hvd_qsgd.stats.TensorStats.as_dict`.
TENSOR = fields(
    {
        "elements": COUNT,
        "exchanges": COUNT,
        **COUNTS,
        "exchange": text,
        "codec": text,
        "bypassed": text,
        **dict.fromkeys(("input_norm", "lost_norm", "residual_norm"), NORM),
        "measured": COUNT,
        "relative_error": NORM,
    }
)
#: Of :meth:`hvd_qsgd.observe.Record.as_dict`, with the version before it.
RECORD = fields(
    {
        "version": COUNT,
        # Until the year 9999.
        "time": number(0, 253402300799),
        "step": POSITIVE,
        "steps": POSITIVE,
        "seconds": SECONDS,
        "rank": COUNT,
        "ranks": POSITIVE,
        "compressor": text,
        **COUNTS,
        "ratio": number(0, 1e30),
        "relative_error": NORM,
        "residual_norm": NORM,
        "decisions": named(text),
        "tensors": named(TENSOR),
    }
)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """What :class:`JsonLines` wrote, a dictionary a record.

    A last line that was cut off, as by the end of a run, is left out, and a warning says so.

    Raises:
        ConfigError: the file holds something else, or nothing; it names the line, and the field.
    """
    content = Path(path).read_text(encoding="utf-8", errors="replace")
    lines = content.removesuffix("\n").split("\n") if content else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            # Python has an error of its own for the longest whole numbers.
            record = json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 30 else float(digits))
        except (ValueError, RecursionError):
            if records and number == len(lines):
                say = logging.getLogger("hvd_qsgd").warning
                say("%s, line %s, the last one, was cut off and is left out.", plain(str(path)), number)
                break
            record = None
        if not isinstance(record, dict) or "version" not in record:
            raise ConfigError(
                f"{path}, line {number} is no record of hvd_qsgd. Give a file that JsonLines wrote: "
                f"QSGDCompressor(monitor=Monitor(JsonLines('run.jsonl')))."
            )
        if record["version"] != VERSION:
            raise ConfigError(
                f"{path}, line {number} has version {shown(record['version'])} of the records, and this hvd-qsgd reads "
                f"{VERSION}. Use the hvd-qsgd that wrote it."
            )
        try:
            records.append(RECORD(record, ""))
        except WrongFieldError as error:
            raise ConfigError(
                f"{path}, line {number}: {error}. The file was damaged, or JsonLines did not write it."
            ) from None
    if not records:
        raise ConfigError(f"{path} holds no record. The first is written after Monitor(every=...) steps.")
    return records
