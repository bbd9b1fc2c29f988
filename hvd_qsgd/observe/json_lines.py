"""Records as lines of JSON, for ``hvd-qsgd report`` and for programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.monitor import Record

#: Of the lines; counts up when fields change their meaning.
VERSION = 1


class JsonLines:
    """One object a record; the fields are those of :class:`Record` and :class:`hvd_qsgd.observe.stats.Stats`.

    The file is replaced when the first record comes, and complete up to the last one whatever happens.

    Args:
        path: with ``{rank}`` in it if all ranks are watched, such as "run-{rank}.jsonl".
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._file: TextIO | None = None

    def write(self, record: Record) -> None:
        if self._file is None:
            self._file = self._open(record.rank)
        line = {"version": VERSION, **record.as_dict()}
        self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, rank: int) -> TextIO:
        if rank and "{rank}" not in self._path:
            raise ConfigError(
                f"Rank {rank} would write to {self._path}, as other ranks do. Put {{rank}} into the name of the file, "
                f"such as run-{{rank}}.jsonl, or watch rank 0 alone."
            )
        return open(self._path.replace("{rank}", str(rank)), "w", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with None in place of the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
