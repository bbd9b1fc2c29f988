"""Exchanges: how the payloads of all ranks become one mean.

One file per exchange; ``registry.py`` is the only list of them. Every exchange ends in
the same bits on every rank.
"""

from __future__ import annotations

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import registry
from hvd_qsgd.exchanges.base import Exchange, Job, Piece, Steps
from hvd_qsgd.exchanges.joined import joined

EXCHANGES = {exchange.name: exchange for exchange in vars(registry).values() if isinstance(exchange, Exchange)}
#: Chosen by the number of ranks; chosen by measurement, which may also turn compression off.
BY_RANKS, AUTO = "by_ranks", "auto"

__all__ = [
    "AUTO",
    "BY_RANKS",
    "EXCHANGES",
    "Exchange",
    "Job",
    "Piece",
    "Steps",
    "check_exchange",
    "choose_exchange",
    "start_exchange",
]


def check_exchange(exchange: str, codec: Codec) -> None:
    """Raise ConfigError unless ``exchange`` is a choice to be made or an exchange that can carry the codec."""
    if exchange == AUTO and "allgather" not in codec.exchanges:
        raise ConfigError(
            f"exchange={exchange!r} measures how long encoding takes, and the codec {codec.name!r} encodes nothing by "
            f"itself; it travels by {', '.join(codec.exchanges)}."
        )
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

    Codecs whose messages add up go by an allreduce of their own. Of the others allgather sends
    (n-1) payloads a rank and scatter_gather 2 (n-1)/n, but in two phases and with a second
    rounding: it pays from four ranks. Codes whose size varies are short because rounding is
    coarse, so a second one costs more than the bytes: that is for the user to ask for.
    """
    if exchange != BY_RANKS:
        return exchange
    if not set(codec.exchanges) & {"allgather", "scatter_gather"} or "linear" in codec.exchanges:
        return codec.exchanges[0]
    pays = ranks >= 4 and "scatter_gather" in codec.exchanges and not codec.variable_size
    return "scatter_gather" if pays else "allgather"


def start_exchange(exchange: str, job: Job) -> Steps:
    """The steps of an exchange by name, with the pieces joined if the codec encodes them as one."""
    yield from joined(EXCHANGES[exchange], job) if job.codec.whole_buffer else EXCHANGES[exchange](job)
    yield from job.finish()
