"""Records as lines of a log."""

from __future__ import annotations

import logging

from hvd_qsgd.observe.monitor import Record


class LogLines:
    """One line a record, at level INFO, which Python shows after ``logging.basicConfig(level=logging.INFO)``.

    Args:
        logger: by default the one named "hvd_qsgd".
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("hvd_qsgd")

    def write(self, record: Record) -> None:
        self._logger.info("%s", line_of(record))

    def close(self) -> None:
        """Nothing to close."""


def line_of(record: Record) -> str:
    """What people want to read of a record; times and bytes are those of a mean step."""
    stats, steps = record.stats, record.steps

    def milliseconds(attribute: str) -> str:
        return f"{stats.total(attribute) / steps * 1e3:.1f}"

    parts = [
        f"step {record.step}: {stats.wire_bytes / steps / 1e6:.3g} MB a step, {stats.ratio:.1f} times less",
        f"step {record.seconds / steps * 1e3:.1f} ms, encode {milliseconds('encode_seconds')}, "
        f"wait {milliseconds('wait_seconds')}, decode {milliseconds('decode_seconds')}",
    ]
    if stats.relative_error is not None:
        parts.append(f"relative error {stats.relative_error:.3g}")
    if stats.residual_norm is not None:
        parts.append(f"residual norm {stats.residual_norm:.3g}")
    return "; ".join(parts)
