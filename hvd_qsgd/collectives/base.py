"""The interface between exchanges and what moves their bytes."""

from __future__ import annotations

from typing import Any, Protocol

from hvd_qsgd.exchanges.base import Request


class Handle(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Whether :meth:`result` returns without waiting."""
        ...

    def result(self) -> Any:
        """The outcome, as the request's class describes it; called once."""
        ...


class Collectives(Protocol):
    """Asynchronous collectives among the ranks of one group."""

    @property
    def rank(self) -> int:
        """Of this process in the group, from 0."""
        ...

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    def start(self, request: Request) -> Handle:
        """Start a collective that every rank of the group starts under the same name."""
        ...


class OfProcessSet:
    """Rank and size of a Horovod process set of any framework.

    They are asked anew each time, because an elastic job changes them.
    """

    def __init__(self, process_set: Any) -> None:
        self.process_set = process_set

    @property
    def rank(self) -> int:
        """See :class:`Collectives`."""
        return int(self.process_set.rank())

    @property
    def ranks(self) -> int:
        """See :class:`Collectives`."""
        return int(self.process_set.size())

    def start(self, request: Request) -> Handle:
        """See :class:`Collectives`."""
        raise NotImplementedError


class Names:
    """Names of Horovod's collectives.

    They differ before and after a job's ranks have changed. What a rank starts in the very moment in which
    Horovod dies of a lost rank can stay in Horovod's queue (it looks whether it is shut down before it takes
    the queue's lock), and would be taken for what the ranks that are left start under the same name.
    """

    #: How often the ranks have changed; the same on all ranks.
    generation = 0

    @classmethod
    def of(cls, name: str) -> str:
        """The name that all ranks of this generation of the job use."""
        return f"hvd_qsgd.{cls.generation}.{name}"
