"""Records as :class:`hvd_qsgd.observe.JsonLines` wrote them, each checked whole before anything is done with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hvd_qsgd.checks import WrongFieldError, fields, named, number, shown, text
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.json_lines import VERSION
from hvd_qsgd.text import plain

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
#: Of :meth:`hvd_qsgd.observe.stats.TensorStats.as_dict`.
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
    for place, line in enumerate(lines, 1):
        try:
            # Python has an error of its own for the longest whole numbers.
            record = json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 30 else float(digits))
        except (ValueError, RecursionError):
            if records and place == len(lines):
                say = logging.getLogger("hvd_qsgd").warning
                say("%s, line %s, the last one, was cut off and is left out.", plain(str(path)), place)
                break
            record = None
        if not isinstance(record, dict) or "version" not in record:
            raise ConfigError(
                f"{path}, line {place} is no record of hvd_qsgd. Give a file that JsonLines wrote: "
                f"QSGDCompressor(monitor=Monitor(JsonLines('run.jsonl')))."
            )
        if record["version"] != VERSION:
            raise ConfigError(
                f"{path}, line {place} has version {shown(record['version'])} of the records, and this hvd-qsgd reads "
                f"{VERSION}. Use the hvd-qsgd that wrote it."
            )
        try:
            records.append(RECORD(record, ""))
        except WrongFieldError as error:
            raise ConfigError(
                f"{path}, line {place} has a wrong field: {error}. The file was damaged, or JsonLines did not write it."
            ) from None
    if not records:
        raise ConfigError(f"{path} holds no record. The first is written after Monitor(every=...) steps.")
    return records
