"""The monitor: what a compressor tells once in a while, and to whom."""

from __future__ import annotations

import atexit
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.stats import Stats


@dataclass(frozen=True)
class Record:
    """What one rank did in some consecutive steps.

    Attributes:
        time: when they ended, in seconds since 1970.
        step: number of steps that the monitor has seen, these included.
        steps: how many steps the record covers.
        seconds: that they took.
        rank, ranks: of the job.
        compressor: its settings.
        stats: bytes and seconds added up over the steps, errors and norms as measured in the last of them.
    """

    time: float
    step: int
    steps: int
    seconds: float
    rank: int
    ranks: int
    compressor: str
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """As plain numbers and strings, with those of :meth:`hvd_qsgd.observe.stats.Stats.as_dict`, for JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stats"}
        return {**own, **self.stats.as_dict()}


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Take the next record. An OSError ends the sink and not the training."""
        ...

    def close(self) -> None:
        """No record will come any more."""
        ...


class Monitor:
    """Watches one compressor: ``QSGDCompressor(monitor=Monitor(LogLines()))``.

    A step ends when the first of its tensors comes again. Results are the same bit for bit with and without.

    Args:
        sinks: get the records.
        every: steps to a record. In the last of them errors are measured, which costs a copy (of tensors
            without feedback), a decode and two norms of each tensor; the others cost next to nothing.
        all_ranks: watch all ranks, each with records of its own; else rank 0 alone.

    Raises:
        ConfigError: there is no sink, or ``every`` is no positive whole number.
    """

    def __init__(self, *sinks: Sink, every: int = 100, all_ranks: bool = False) -> None:
        if not sinks:
            raise ConfigError("A Monitor without sinks shows nothing; give it one, such as Monitor(LogLines()).")
        self.every = check_integer("Monitor", "every", every, 1, 2**40)
        self.all_ranks = all_ranks
        self._sinks = list(sinks)
        self._compressor: Any = None
        self._place: Callable[[], tuple[int, int]]
        self._seen: set[str] = set()
        self._step = self._steps = 0
        self._measures = False
        # What was there when the record began; None on a rank that is not watched.
        self._before: tuple[Stats, Stats] | None = None
        self._begun = 0.0

    def watch(self, compressor: Any, place: Callable[[], tuple[int, int]]) -> None:
        """Called by the compressor; ``place`` tells rank and number of ranks.

        Raises:
            ConfigError: the monitor has another compressor.
        """
        if self._compressor is not None:
            raise ConfigError(f"The monitor watches {self._compressor} already; make one Monitor for each compressor.")
        self._compressor, self._place = compressor, place
        atexit.register(self.close)

    def starts(self, key: str) -> bool:
        """Called by the compressor for each tensor of each step; True if it shall measure what is lost of it."""
        if not self._begun:
            self._begin()
        elif key in self._seen:
            self._end_step()
        self._seen.add(key)
        return self._measures

    def close(self) -> None:
        """Make a record of the steps since the last one, and close the sinks; also done when the program ends."""
        if self._seen:
            self._steps += 1
            self._step += 1
            self._seen.clear()
        if self._steps and self._before is not None:
            self._emit()
        self._steps = 0
        self._measures = False
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()
        atexit.unregister(self.close)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        rank, _ = self._place()
        stats = self._compressor.stats()
        self._before = (stats, stats.copy()) if self._sinks and (self.all_ranks or rank == 0) else None
        self._begun = time.perf_counter()
        self._steps = 0
        self._measures = self._before is not None and self.every == 1

    def _end_step(self) -> None:
        self._seen.clear()
        self._step += 1
        self._steps += 1
        if self._steps == self.every:
            if self._before is not None:
                self._emit()
            self._begin()
        else:
            self._measures = self._before is not None and self._steps == self.every - 1

    def _emit(self) -> None:
        assert self._before is not None
        stats, (stats_before, before) = self._compressor.stats(), self._before
        rank, ranks = self._place()
        record = Record(
            time=time.time(),
            step=self._step,
            steps=self._steps,
            seconds=time.perf_counter() - self._begun,
            rank=rank,
            ranks=ranks,
            compressor=repr(self._compressor),
            # After compressor.reset() everything is new.
            stats=stats.since(before if stats is stats_before else Stats()),
        )
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except OSError as error:
                self._sinks.remove(sink)
                warnings.warn(f"{type(sink).__name__} gets no more records: {error}", RuntimeWarning, stacklevel=2)
