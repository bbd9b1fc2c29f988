"""The engine: keeps exchanges going, whichever of them is waited for.

Phases of different exchanges overlap: each exchange starts its next collective as soon as
anybody looks in and its last one has ended. Waiting for one exchange moves all of them,
because another rank may be waiting for any of those.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from hvd_qsgd.collectives.base import Collectives, Handle
from hvd_qsgd.exchanges.base import Steps

#: Seconds between two looks at collectives under way. Short against a network round trip,
#: long enough to leave the core to Horovod's own thread.
PAUSE = 50e-6


class Task:
    """One exchange under way on this rank."""

    def __init__(self, steps: Steps, collectives: Collectives) -> None:
        self._steps = steps
        self._collectives = collectives
        self._handle: Handle | None = None
        self.error: BaseException | None = None
        self.finished = False
        #: Seconds spent in encode and decode, on this rank's cores.
        self.busy_seconds = 0.0
        self._resume(None)

    def advance(self) -> bool:
        """Go on if the last collective has ended; True if something was done."""
        if self.finished or (self._handle is not None and not self._handle.done()):
            return False
        try:
            outcome = self._handle.result() if self._handle is not None else None
        except BaseException as error:
            self._fail(error)
            return True
        self._resume(outcome)
        return True

    def _resume(self, outcome: Any) -> None:
        started = time.perf_counter()
        try:
            self._handle = self._collectives.start(self._steps.send(outcome))
        except StopIteration:
            self.finished = True
        except BaseException as error:
            self._fail(error)
        self.busy_seconds += time.perf_counter() - started

    def _fail(self, error: BaseException) -> None:
        # Kept for whoever waits: the thread that looked in may not care about this exchange.
        self.error = error
        self.finished = True


class Engine:
    """The exchanges that this process has under way."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tasks: list[Task] = []

    def submit(self, steps: Steps, collectives: Collectives) -> Task:
        """Start an exchange: encodes and starts its first collective before it returns."""
        with self._lock:
            task = Task(steps, collectives)
            self._tasks.append(task)
            self.advance()
            return task

    def advance(self) -> bool:
        """Move every exchange whose collective has ended; True if any moved."""
        with self._lock:
            moved = [task.advance() for task in self._tasks]
            self._tasks = [task for task in self._tasks if not task.finished]
            return any(moved)

    def wait(self, task: Task) -> None:
        """Return when ``task`` has ended; raises what ended it, if it failed."""
        while not task.finished:
            if not self.advance():
                time.sleep(PAUSE)
        if task.error is not None:
            raise task.error

    def abandon(self) -> None:
        """Forget all exchanges, after an error that ended the step."""
        with self._lock:
            self._tasks.clear()
