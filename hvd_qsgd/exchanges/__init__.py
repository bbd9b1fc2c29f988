"""Exchanges: how the payloads of all ranks become one mean.

One file per exchange; the registry below is the only list of them. Every exchange ends in
the same bits on every rank.
"""

from __future__ import annotations

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges.allgather import ALLGATHER
from hvd_qsgd.exchanges.allreduce import ALLREDUCE
from hvd_qsgd.exchanges.base import Exchange, Job, Piece, Steps
from hvd_qsgd.exchanges.scatter_gather import SCATTER_GATHER

EXCHANGES: dict[str, Exchange] = {
    "allgather": ALLGATHER,
    "scatter_gather": SCATTER_GATHER,
    "allreduce": ALLREDUCE,
}
#: Chosen by the number of ranks; chosen by measurement, which may also turn compression off.
BY_RANKS, AUTO = "by_ranks", "auto"

__all__ = ["AUTO", "BY_RANKS", "EXCHANGES", "Exchange", "Job", "Piece", "Steps", "check_exchange", "choose_exchange"]


def check_exchange(exchange: str, codec: Codec) -> None:
    """Raise ConfigError unless ``exchange`` is a choice to be made or an exchange that can carry the codec."""
    if exchange in (BY_RANKS, AUTO):
        return
    if exchange not in EXCHANGES:
        raise ConfigError(f"exchange={exchange!r} is not one of {', '.join(map(repr, [BY_RANKS, AUTO, *EXCHANGES]))}.")
    if exchange not in codec.exchanges:
        raise ConfigError(
            f"exchange={exchange!r} cannot carry the codec {codec.name!r}; it travels by {', '.join(codec.exchanges)}."
        )


def choose_exchange(exchange: str, codec: Codec, ranks: int) -> str:
    """The exchange that "by_ranks" means.

    allgather sends (n-1) payloads a rank and scatter_gather 2 (n-1)/n, but in two phases
    and with a second rounding: it pays from four ranks.
    """
    if exchange != BY_RANKS:
        return exchange
    return "scatter_gather" if ranks >= 4 and "scatter_gather" in codec.exchanges else "allgather"
