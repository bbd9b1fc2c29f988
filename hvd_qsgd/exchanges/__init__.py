"""Exchanges: how the payloads of all ranks become one mean.

One file per exchange; ``registry.py`` is the only list of those of this package. Others come from packages with
entry points in the group ``hvd_qsgd.exchanges``, or from :func:`register`. Every exchange ends in the same bits on
every rank.
"""

from __future__ import annotations

import functools
from typing import Any

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import registry
from hvd_qsgd.exchanges.base import Exchange, Job, Piece, Steps
from hvd_qsgd.exchanges.joined import joined
from hvd_qsgd.plugins import Registry, name_fault


def _fault(name: Any, exchange: Any) -> str:
    if not isinstance(exchange, Exchange):
        return "it must be an instance of hvd_qsgd.exchanges.Exchange"
    return name_fault(name, exchange)


EXCHANGES: Registry[Exchange] = Registry(
    "hvd_qsgd.exchanges",
    "exchange",
    _fault,
    {exchange.name: exchange for exchange in vars(registry).values() if isinstance(exchange, Exchange)},
    # They mean a choice.
    taken=("by_ranks", "auto"),
)
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
    "exchanges_for",
    "register",
    "start_exchange",
]


def register(exchange: Exchange) -> Exchange:
    """Make an exchange of yours known by its name, which is that of its generator function.

    Raises:
        ConfigError: the name belongs to another exchange, or it is no :class:`Exchange`.
    """
    EXCHANGES.register(getattr(exchange, "name", ""), exchange)
    return exchange


@functools.lru_cache(maxsize=1024)
def exchanges_for(codec: Codec) -> tuple[str, ...]:
    """Names of the exchanges that can carry a codec, in the order of preference.

    Examples:
        >>> from hvd_qsgd import QSGD, RandomK
        >>> exchanges_for(QSGD()), exchanges_for(RandomK())
        (('allgather', 'scatter_gather', 'allreduce'), ('linear', 'allgather'))
    """
    carrying = [name for name, exchange in EXCHANGES.items() if exchange.carries(codec)]
    return tuple(sorted(carrying, key=lambda name: (-EXCHANGES[name].preference, name)))


EXCHANGES.changed.append(exchanges_for.cache_clear)


def check_exchange(exchange: str, codec: Codec) -> None:
    """Raise ConfigError unless ``exchange`` is a choice to be made or an exchange that can carry the codec."""
    if exchange == AUTO and not codec.encodes:
        raise ConfigError(
            f"exchange={exchange!r} measures how long encoding takes, and the codec {codec.name!r} encodes nothing by "
            f"itself; it travels by {', '.join(exchanges_for(codec))}."
        )
    if exchange in (BY_RANKS, AUTO):
        return
    if exchange not in EXCHANGES:
        raise ConfigError(f"exchange={exchange!r} is not one of {', '.join(map(repr, [BY_RANKS, AUTO, *EXCHANGES]))}.")
    if not EXCHANGES[exchange].carries(codec):
        raise ConfigError(
            f"exchange={exchange!r} cannot carry the codec {codec.name!r}; it travels by "
            f"{', '.join(exchanges_for(codec))}."
        )


def choose_exchange(exchange: str, codec: Codec, ranks: int) -> str:
    """The exchange that "by_ranks" means.

    It is the first of :func:`exchanges_for`. That is an allreduce of their own for codecs whose messages add up, and
    allgather for others. Of these allgather sends (n-1) payloads a rank and scatter_gather 2 (n-1)/n, but in two phases
    and with a second rounding: it pays from four ranks. Codes whose size varies are short because rounding is coarse,
    so a second one costs more than the bytes: that is for the user to ask for.
    """
    if exchange != BY_RANKS:
        return exchange
    names = exchanges_for(codec)
    if not names:
        raise ConfigError(f"No exchange can carry the codec {codec.name!r}: register the one that it is made for.")
    pays = ranks >= 4 and names[0] == "allgather" and "scatter_gather" in names and not codec.variable_size
    return "scatter_gather" if pays else names[0]


def start_exchange(exchange: str, job: Job) -> Steps:
    """The steps of an exchange by name, with the pieces joined if the codec encodes them as one."""
    yield from joined(EXCHANGES[exchange], job) if job.codec.whole_buffer else EXCHANGES[exchange](job)
    yield from job.finish()
