"""What an exchange will cost, and whether it is worth it.

A run measures a few numbers of its own network and machine (:func:`measure_costs`); with what
an exchange does (:class:`hvd_qsgd.exchanges.base.Work`) they predict its time (:meth:`Costs.predict`),
and the predictions decide what ``exchange="auto"`` does (:func:`decide`).

The model: a collective takes ``start + hop * (n - 1)`` seconds and so many for each byte that a
rank sends. Encoding and decoding take so many seconds for each element, and take them from the
training itself. The wire works beside it: behind the backward pass, for the first phase of an
exchange, and behind the encoding and decoding of other bundles of gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hvd_qsgd.codecs.base import Codec, Kernels, adds_in_lanes
from hvd_qsgd.exchanges import EXCHANGES, exchanges_for
from hvd_qsgd.exchanges.base import AllGather, AllReduce, AllToAll, Empty, Request, Work, ring_bytes

#: Horovod's own allreduce, in predictions and decisions.
UNCOMPRESSED = "none"
#: Compression must promise at least this part of the time, or gradients go uncompressed.
MARGIN = 0.05
#: Bytes that a rank sends, and elements that it encodes, in one measurement.
PROBE_BYTES = 1 << 22
PROBE_ELEMENTS = 1 << 20
REPEATS = 3
COLLECTIVES = ("allgather", "alltoall", "allreduce")


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured on one network, one machine and one codec."""

    #: For a collective, whatever its size: Horovod's negotiation and the calls.
    start: float
    #: For each rank after the first that takes part in a collective.
    hop: float
    #: For each byte that a rank sends, by collective.
    byte: Mapping[str, float]
    #: For each element that is encoded, decoded, or put into lanes and read from them again.
    encode: float
    decode: float
    lanes: float = 0.0

    def predict(
        self, exchange: str, codec: Codec, elements: int, ranks: int, bundles: int = 1, hidden: float = 0.0
    ) -> float:
        """Seconds that a step gets longer by the mean of ``elements`` float32 values over ``ranks`` ranks.

        Args:
            exchange: a name in EXCHANGES, or "none" for Horovod's own allreduce.
            bundles: number of exchanges into which the elements are divided evenly.
            hidden: seconds of backward pass behind which transfers can hide.
        """
        if ranks == 1 or elements == 0:
            return 0.0
        if exchange == UNCOMPRESSED:
            work = Work({"allreduce": ring_bytes(4 * elements, ranks)})
        else:
            work = EXCHANGES[exchange].work(codec, elements, ranks)
        first, *later = (sent * self.byte[collective] for collective, sent in work.sent.items())
        if work.agreements:
            # What is sent first is short, and the rest waits for its outcome.
            first, later = 0.0, [first, *later]
        wire = max(first - hidden, 0.0) + sum(later)
        codec_time = work.encoded * self.encode + work.decoded * self.decode + work.lanes * self.lanes
        phases = len(work.sent) + work.agreements
        return phases * (self.start + self.hop * (ranks - 1)) + max(codec_time, wire + codec_time / bundles)


def measure_costs(kernels: Kernels, ranks: int, empty: Empty, name: str) -> Generator[Request, Any, Costs]:
    """Measure, and agree on the slowest rank's numbers: all ranks return the same costs.

    Written like an exchange: it yields collectives and is resumed with their outcomes. Takes
    some twenty collectives of up to 4 MiB.

    Args:
        kernels: of the codec, on the backend that will be used.
        empty: makes the arrays of that backend.
        name: prefix of the collectives, the same on all ranks.
    """
    seconds: list[float] = []
    for collective, size in ((AllGather, 4), *((kind, PROBE_BYTES) for kind in (AllGather, AllToAll, AllReduce))):
        times = []
        for _ in range(REPEATS + 1):
            request = _probe(collective, size, ranks, empty, name)
            begin = time.perf_counter()
            yield request
            times.append(time.perf_counter() - begin)
        seconds.append(statistics.median(times[1:]))
    start = seconds[0]
    # What a probe took beyond a small one; never nothing, however fast the network.
    byte = [max(taken - start, 0.1 * taken) / PROBE_BYTES for taken in seconds[1:]]
    values = yield from agree_on_largest([start, *byte, *measure_codec(kernels, empty)], empty, name)
    encode, decode, lanes = values[1 + len(COLLECTIVES) :]
    return Costs(values[0], 0.0, dict(zip(COLLECTIVES, values[1:])), encode, decode, lanes)


def agree_on_largest(values: Sequence[float], empty: Empty, name: str) -> Generator[Request, Any, list[float]]:
    """The largest value of all ranks, for each of some float32 values that are not negative."""
    words = empty(len(values), "int32")
    # Such floats order like their bit patterns.
    words[:] = _like(words, np.array(values, np.float32).view(np.int32))
    words = yield AllReduce(f"{name}.agreed", words, "max")
    return np.array(words.tolist(), np.int32).view(np.float32).astype(float).tolist()


def _probe(collective: Callable[..., Request], size: int, ranks: int, empty: Empty, name: str) -> Request:
    """A collective in which a rank sends about ``size`` bytes."""
    if collective is AllReduce:
        words = empty(max(size * ranks // (2 * (ranks - 1)) // 4, 1) if ranks > 1 else 1, "int32")
        words[:] = 0
        return AllReduce(f"{name}.allreduce.{size}", words, "sum")
    if collective is AllToAll:
        part = size // max(ranks - 1, 1)
        return AllToAll(f"{name}.alltoall.{size}", empty(part * ranks, "uint8"), [part] * ranks)
    return AllGather(f"{name}.allgather.{size}", empty(max(size // max(ranks - 1, 1), 1), "uint8"))


def _like(target: Any, values: np.ndarray) -> Any:
    """NumPy values for an array of any backend."""
    return values if isinstance(target, np.ndarray) else target.new_tensor(values.tolist())


def measure_codec(kernels: Kernels, empty: Empty) -> tuple[float, float, float]:
    """Seconds for an element: to encode it, to decode it, and through lanes and back (0 without lanes)."""
    codec: Any = kernels.codec
    granularity = max(codec.granularity, 1)
    length = -(-PROBE_ELEMENTS // granularity) * granularity
    x, out = empty(length, "float32"), empty(length, "float32")
    x[:] = _like(x, np.resize(np.random.default_rng(0).standard_normal(4096).astype(np.float32), length))
    payload = empty(codec.payload_size(length), "uint8")
    size = kernels.encode_into(x, payload)
    encode = median_time(lambda: kernels.encode_into(x, payload), payload) / length
    decode = median_time(lambda: kernels.decode_into(payload[:size], out), out) / length
    if not adds_in_lanes(codec):
        return encode, decode, 0.0
    lanes_kernels: Any = kernels
    agreed = empty(codec.agreement_length(length), "int32")
    words = empty(codec.lanes_length(length, 2), "int32")

    def through_lanes() -> None:
        lanes_kernels.agree_into(x, agreed)
        lanes_kernels.to_lanes(x, agreed, 2, words)
        lanes_kernels.from_lanes(words, agreed, 2, out, 2)

    return encode, decode, median_time(through_lanes, out) / length


def median_time(call: Callable[[], object], made: Any) -> float:
    """Seconds of a call: the median of a few, after one to warm up.

    Reading a value of what it ``made`` waits for the device on which it is made.
    """
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        call()
        made[:1].tolist()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


@dataclass(frozen=True)
class Decision:
    """What ``exchange="auto"`` chose: "none" or the name of an exchange, and what was predicted, in seconds."""

    exchange: str
    predicted: Mapping[str, float]

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        choice = "compression is off" if self.exchange == UNCOMPRESSED else self.exchange
        times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in self.predicted.items())
        return f"{choice} (predicted: {times})"


def decide(costs: Costs, codec: Codec, elements: int, ranks: int, bundles: int = 1, hidden: float = 0.0) -> Decision:
    """The fastest exchange, or "none" unless compression promises to be faster by :data:`MARGIN`.

    The arguments are those of :meth:`Costs.predict`.
    """
    carrying = exchanges_for(codec)
    names = [UNCOMPRESSED, *carrying]
    predicted = {name: costs.predict(name, codec, elements, ranks, bundles, hidden) for name in names}
    best = min(carrying, key=lambda name: predicted[name])
    worth_it = predicted[best] < (1 - MARGIN) * predicted[UNCOMPRESSED]
    return Decision(best if worth_it else UNCOMPRESSED, predicted)
