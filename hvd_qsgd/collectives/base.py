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
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def start(self, request: Request) -> Handle:
        """Start a collective that every rank of the group starts under the same name."""
        ...
