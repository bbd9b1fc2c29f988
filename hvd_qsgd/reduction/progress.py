"""The engine: keeps exchanges going, whichever of them is waited for.

The first collective of an exchange starts when its gradients are there, during the backward pass; or, if the host must
see something of a device before that, when the gradients of the next exchange are there. The ones after it start while
somebody waits, or by a thread. Waiting for one exchange moves all of them, because another rank may be waiting for any
of those, so their phases overlap each other.

Why the thread is not the default: Horovod names a collective without a name after the number of
collectives that the process has started. Where exchanges go on at moments that differ between
ranks, ``hvd.allreduce(loss)`` between ``backward()`` and ``step()`` has different names on different
ranks, and hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from hvd_qsgd.collectives.base import Collectives, Handle
from hvd_qsgd.exchanges.base import Request, Steps, ToHost

T = TypeVar("T")

#: Seconds between two looks at collectives under way: short against a network round trip,
#: long enough to leave the core to Horovod's own thread.
PAUSE = 100e-6
#: The same of the thread, which takes its time from the backward pass; Horovod looks once in a millisecond, too.
THREAD_PAUSE = 1e-3

#: Surrounds what goes on in a task, for profilers: "encode", "wait" or "decode".
Span = Callable[[str], AbstractContextManager[Any]]


def no_span(phase: str) -> AbstractContextManager[Any]:
    return nullcontext()


class Task:
    """One exchange under way on this rank.

    Attributes:
        encode_seconds: of computing until the first collective had left.
        decode_seconds: of computing from then on.
        wait_seconds: in which somebody waited for this task, and no task had anything to do.
    """

    def __init__(self, steps: Generator[Request, Any, Any], collectives: Collectives, span: Span = no_span) -> None:
        self.span = span
        self.encode_seconds = self.decode_seconds = self.wait_seconds = 0.0
        self._steps = steps
        self._collectives = collectives
        self._handle: Handle | None = None
        self._turn = threading.Lock()
        self.error: BaseException | None = None
        self.finished = False
        #: Whether a collective was started, and not only copies of what is on a device to the host.
        self.left = False
        #: What the exchange returned.
        self.value: Any = None
        self._resume(None)

    def advance(self) -> bool:
        """Go on if the last collective has ended and no other thread is at it; True if something was done."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if self.finished or self._handle is None or not self._handle.done():
                return False
            self._resume(self._handle)
            return True
        finally:
            self._turn.release()

    def leave(self) -> None:
        """Return when the first collective was started."""
        while not (self.left or self.finished):
            if not self.advance():
                self.pause()

    def pause(self) -> None:
        """Wait a moment, for this task's sake."""
        begin = time.perf_counter()
        time.sleep(PAUSE)
        self.wait_seconds += time.perf_counter() - begin

    def _resume(self, handle: Handle | None) -> None:
        encodes, begin = not self.left, time.perf_counter()
        with self.span("encode" if encodes else "decode"):
            self._compute(handle)
        seconds = time.perf_counter() - begin
        if encodes:
            self.encode_seconds += seconds
        else:
            self.decode_seconds += seconds

    def _compute(self, handle: Handle | None) -> None:
        try:
            outcome: Any = handle.result() if handle is not None else None
            request = self._steps.send(outcome)
            self._handle = self._collectives.start(request)
            self.left = self.left or not isinstance(request, ToHost)
        except StopIteration as stop:
            self.value = stop.value
            self.finished = True
        except BaseException as error:
            # Kept for whoever waits for it: who looked in may be waiting for another exchange.
            self.error = error
            self.finished = True


def run_exchange(steps: Generator[Request, Any, T], collectives: Collectives) -> T:
    """Run one exchange from start to end in the calling thread, and return what it returns.

    For collectives that match calls by their order, like those of MPI: an engine would start
    the phases of several exchanges in an order that differs between ranks.
    """
    task = Task(steps, collectives)
    while not task.finished:
        if not task.advance():
            task.pause()
    if task.error is not None:
        raise task.error
    value: T = task.value
    return value


class Engine:
    """The exchanges that this process has under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: list[Task] = []
        #: While there is something to move, and somebody wants that.
        self._thread: threading.Thread | None = None

    def submit(self, steps: Steps, collectives: Collectives, span: Span = no_span, threaded: bool = False) -> Task:
        """Start an exchange: encodes and starts its first collective before it returns.

        If the host must look at a device before that, the collective starts with the next exchange, or when somebody
        waits: by then the look has come, most likely, and it is the same moment on all ranks.

        Args:
            threaded: let a thread move all exchanges from now on, until none is under way.
        """
        if not threaded:
            with self._lock:
                tasks = self._under_way()
            for before in tasks:
                before.leave()
        task = Task(steps, collectives, span)
        with self._lock:
            self._tasks.append(task)
            if threaded and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hvd_qsgd progress", daemon=True)
                self._thread.start()
        return task

    def wait(self, task: Task) -> None:
        """Return when ``task`` has ended; raises what ended it, if it failed."""
        if not task.finished:
            with task.span("wait"):
                while not task.finished:
                    if not self._advance():
                        task.pause()
        with self._lock:
            self._tasks = self._under_way()
        if task.error is not None:
            raise task.error

    def abandon(self) -> None:
        """Forget what is under way, because other ranks will never answer it."""
        with self._lock:
            self._tasks = []

    def _under_way(self) -> list[Task]:
        return [task for task in self._tasks if not task.finished]

    def _advance(self) -> bool:
        # Not under the lock: what a task computes must not keep others from starting.
        with self._lock:
            tasks = self._under_way()
        moved = [task.advance() for task in tasks]
        return any(moved)

    def _run(self) -> None:
        while True:
            if not self._advance():
                time.sleep(THREAD_PAUSE)
            with self._lock:
                if not self._under_way():
                    self._thread = None
                    return
