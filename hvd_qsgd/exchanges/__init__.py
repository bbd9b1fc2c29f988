"""Exchanges: how the payloads of all ranks become one mean.

One file per exchange; the registry below is the only list of them. Every exchange ends in
the same bits on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges.allgather import allgather
from hvd_qsgd.exchanges.allreduce import allreduce
from hvd_qsgd.exchanges.base import Job, Piece, Steps
from hvd_qsgd.exchanges.intsgd import intsgd
from hvd_qsgd.exchanges.joined import joined
from hvd_qsgd.exchanges.linear import linear
from hvd_qsgd.exchanges.powersgd import powersgd
from hvd_qsgd.exchanges.scatter_gather import scatter_gather

EXCHANGES: dict[str, Callable[[Job], Steps]] = {
    "allgather": allgather,
    "scatter_gather": scatter_gather,
    "allreduce": allreduce,
    "linear": linear,
    "powersgd": powersgd,
    "intsgd": intsgd,
}

__all__ = ["EXCHANGES", "Job", "Piece", "Steps", "check_exchange", "choose_exchange", "start_exchange"]


def check_exchange(exchange: str, codec: Codec) -> None:
    """Raise ConfigError unless ``exchange`` is "auto" or one that can carry the codec."""
    if exchange != "auto" and exchange not in EXCHANGES:
        raise ConfigError(f"exchange={exchange!r} is not one of 'auto', {', '.join(map(repr, EXCHANGES))}.")
    if exchange != "auto" and exchange not in codec.exchanges:
        raise ConfigError(
            f"exchange={exchange!r} cannot carry the codec {codec.name!r}; it travels by {', '.join(codec.exchanges)}."
        )


def choose_exchange(exchange: str, codec: Codec, ranks: int) -> str:
    """The exchange that "auto" means.

    allgather sends (n-1) payloads a rank and scatter_gather 2 (n-1)/n, but in two phases
    and with a second rounding: it pays from four ranks.
    """
    if exchange != "auto":
        return exchange
    if not set(codec.exchanges) & {"allgather", "scatter_gather"} or "linear" in codec.exchanges:
        return codec.exchanges[0]
    return "scatter_gather" if ranks >= 4 and "scatter_gather" in codec.exchanges else "allgather"


def start_exchange(exchange: str, job: Job) -> Steps:
    """The steps of an exchange by name, with the pieces joined if the codec encodes them as one."""
    return joined(EXCHANGES[exchange], job) if job.codec.whole_buffer else EXCHANGES[exchange](job)
