"""The engine: keeps exchanges going while everybody computes.

Each exchange starts its next collective as soon as its last one has ended, on a thread of
its own that sleeps while nothing is under way. So phases of different exchanges overlap
each other and the backward pass, and a rank that is busy elsewhere holds up nobody.
"""

from __future__ import annotations

import atexit
import threading
import time
from typing import Any

from hvd_qsgd.collectives.base import Collectives, Handle
from hvd_qsgd.exchanges.base import Steps

#: Seconds between two looks at collectives under way: short against a network round trip,
#: long enough to leave the core to whoever computes.
PAUSE = 100e-6


class Task:
    """One exchange under way on this rank."""

    def __init__(self, steps: Steps, collectives: Collectives) -> None:
        self._steps = steps
        self._collectives = collectives
        self._handle: Handle | None = None
        self._turn = threading.Lock()
        self.error: BaseException | None = None
        self.finished = False
        self._resume(None)

    def advance(self) -> bool:
        """Go on if the last collective has ended; True if something was done."""
        # Another thread that is at it will see to everything there is to do.
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if self.finished or self._handle is None or not self._handle.done():
                return False
            self._resume(self._handle)
            return True
        finally:
            self._turn.release()

    def _resume(self, handle: Handle | None) -> None:
        try:
            outcome: Any = handle.result() if handle is not None else None
            self._handle = self._collectives.start(self._steps.send(outcome))
        except StopIteration:
            self.finished = True
        except BaseException as error:
            # Kept for whoever waits: the thread that looked in may not care about this exchange.
            self.error = error
            self.finished = True


def run_exchange(steps: Steps, collectives: Collectives) -> None:
    """Run one exchange from start to end in the calling thread.

    For collectives that match calls by their order, like those of MPI: an engine would start
    the phases of several exchanges in an order that differs between ranks.
    """
    task = Task(steps, collectives)
    while not task.finished:
        if not task.advance():
            time.sleep(PAUSE)
    if task.error is not None:
        raise task.error


class Engine:
    """The exchanges that this process has under way, and the thread that moves them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: list[Task] = []
        self._thread: threading.Thread | None = None
        self._stopped = False

    def submit(self, steps: Steps, collectives: Collectives) -> Task:
        """Start an exchange: encodes and starts its first collective before it returns."""
        task = Task(steps, collectives)
        with self._changed:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hvd_qsgd", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            self._changed.notify_all()
        return task

    def advance(self) -> bool:
        """Move every exchange whose collective has ended; True if any moved."""
        with self._changed:
            tasks = list(self._tasks)
        moved = [task.advance() for task in tasks]
        with self._changed:
            self._tasks = [task for task in self._tasks if not task.finished]
        return any(moved)

    def wait(self, task: Task) -> None:
        """Return when ``task`` has ended; raises what ended it, if it failed."""
        while not task.finished:
            if not self.advance():
                time.sleep(PAUSE)
        if task.error is not None:
            raise task.error

    def stop(self) -> None:
        """End the thread and forget what is under way; called when the process exits."""
        with self._changed:
            self._stopped = True
            self._tasks.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stopped)
                if self._stopped:
                    return
            if not self.advance():
                time.sleep(PAUSE)
