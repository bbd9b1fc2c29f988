"""Which exchanges carry which codec follows from what codecs can do; here are the answers, written down by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hvd_qsgd import (
    QSGD,
    Cast,
    Codec,
    EliasQSGD,
    GlobalTopK,
    Identity,
    IntSGD,
    MinMax,
    PowerSGD,
    RandomK,
    Rows,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.codecs import CODECS
from hvd_qsgd.codecs.base import LaneCodec, SumCodec, adds_in_lanes, adds_values
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import AUTO, BY_RANKS, EXCHANGES, check_exchange, choose_exchange, exchanges_for

BOTH = ("allgather", "scatter_gather")
LANES = (*BOTH, "allreduce")
ONE = ("allgather",)
SUMS = ("linear", "allgather")
#: Of each codec the exchanges that carry it, in the order of preference, and what "by_ranks" takes for 1 to 8 ranks:
#: one for up to three ranks, one for more.
ANSWERS: list[tuple[Codec, tuple[str, ...], tuple[str, str]]] = [
    (QSGD(), LANES, BOTH),
    (Scaled(QSGD(norm="l2")), LANES, BOTH),
    (EliasQSGD(), BOTH, ONE * 2),
    (Scaled(EliasQSGD()), BOTH, ONE * 2),
    (Sign(), BOTH, BOTH),
    (Cast(), BOTH, BOTH),
    (Identity(), BOTH, BOTH),
    (RowTopK(), BOTH, BOTH),
    (TopK(0.1), ONE, ONE * 2),
    (GlobalTopK(0.1), ONE, ONE * 2),
    (ThresholdTopK(0.1), ONE, ONE * 2),
    (MinMax(), ONE, ONE * 2),
    (Rows(TopK(0.1), 8), ONE, ONE * 2),
    (Rows(QSGD(), 512), ONE, ONE * 2),
    (RandomK(0.1), SUMS, ("linear", "linear")),
    (Scaled(RandomK(0.1, unbiased=True)), SUMS, ("linear", "linear")),
    (PowerSGD(), ("powersgd",), ("powersgd", "powersgd")),
    (IntSGD(), ("intsgd",), ("intsgd", "intsgd")),
]
EACH = pytest.mark.parametrize(("codec", "carried_by", "chosen"), ANSWERS, ids=lambda value: str(value))


def test_every_codec_and_exchange_has_an_answer() -> None:
    assert {codec.name for codec, _, _ in ANSWERS} == set(CODECS)
    assert {name for _, names, _ in ANSWERS for name in names} == set(EXCHANGES)


@EACH
def test_exchanges_of_a_codec(codec: Codec, carried_by: tuple[str, ...], chosen: tuple[str, str]) -> None:
    assert exchanges_for(codec) == carried_by
    for exchange in EXCHANGES:
        if exchange in carried_by:
            check_exchange(exchange, codec)
        else:
            message = (
                f"exchange='{exchange}' cannot carry the codec '{codec.name}'; it travels by {', '.join(carried_by)}"
            )
            with pytest.raises(ConfigError, match=message):
                check_exchange(exchange, codec)
    check_exchange(BY_RANKS, codec)
    if "allgather" in carried_by:
        check_exchange(AUTO, codec)
    else:
        with pytest.raises(ConfigError, match="encodes nothing by itself; it travels by"):
            check_exchange(AUTO, codec)
    assert [choose_exchange(BY_RANKS, codec, ranks) for ranks in range(1, 9)] == [chosen[0]] * 3 + [chosen[1]] * 5


@pytest.mark.parametrize(("protocol", "is_one"), [(LaneCodec, adds_in_lanes), (SumCodec, adds_values)])
def test_codecs_that_add_up_have_all_of_their_protocol(protocol: type, is_one: Callable[[Codec], bool]) -> None:
    members = {
        name
        for kind in protocol.__mro__
        for name in [*vars(kind), *vars(kind).get("__annotations__", {})]
        if name[0] != "_"
    }
    assert len(members) in (4, 5)
    found = [codec for codec, _, _ in ANSWERS if is_one(codec)]
    assert len(found) == 2
    for codec in found:
        assert [name for name in members if not hasattr(codec, name)] == []
