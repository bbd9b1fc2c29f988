"""Bundles of gradients on their way: which slices wait for which, and when they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]

from hvd_qsgd.codecs.base import Kernels
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.exchanges import Job, Piece, choose_exchange, start_exchange
from hvd_qsgd.exchanges.base import AllGather
from hvd_qsgd.kernels import kernels_for, torch_backend
from hvd_qsgd.observe.stats import TensorStats
from hvd_qsgd.reduction.agreement import check_settings, settings_message
from hvd_qsgd.reduction.buffers import Buffers
from hvd_qsgd.reduction.fusion import Slice
from hvd_qsgd.reduction.progress import Engine, Span, Task
from hvd_qsgd.torch.streams import on_own_stream

#: Collectives of all compressors share one engine: whoever waits moves everybody's exchanges.
ENGINE = Engine()
#: Characters about tensors that a rank sends to all others, once; of more it sends a hash.
MOST_TOLD = 1 << 14


def empty_on(device: torch.device) -> Callable[[int, str], Any]:
    """Makes uninitialized arrays where the kernels want them: NumPy for the CPU, else torch."""
    if device.type == "cpu":
        return np.empty
    return lambda length, dtype: torch.empty(length, dtype=getattr(torch, dtype), device=device)


def kernels_on(codec: Any, device: torch.device) -> Kernels:
    """The kernels that serve a device."""
    return kernels_for(codec, "numba" if device.type == "cpu" else torch_backend(device))


def profiler_span(phase: str) -> AbstractContextManager[Any]:
    """A range in the trace of torch's profiler, if one is on."""
    if not _profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(f"hvd_qsgd.{phase}")


def span_on(device: torch.device) -> Span:
    """What surrounds the work of an exchange on a device; whoever waits for any exchange may carry it out."""
    if device.type == "cpu":
        return profiler_span

    @contextmanager
    def span(phase: str) -> Iterator[None]:
        with profiler_span(phase), on_own_stream(device):
            yield

    return span


class Agreement:
    """Whether all ranks have the same settings: asked with the first gradient, answered before the first result.

    Args:
        name: the same on all ranks.
        settings: see :meth:`hvd_qsgd.compressors.base.CompressorBase._settings`.
        tensors: what is told where ranks differ in them, if it is not too much for a message.
        process_set: whose ranks take part.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], tensors: list[str], process_set: Any) -> None:
        # No rank may have to ask for more later: others may have got an error from Horovod by then, and be gone.
        listed = {"tensors": tensors} if sum(map(len, tensors)) <= MOST_TOLD else {}
        self._settings = {**settings, **listed}
        request = AllGather(name_in(process_set, f"settings.{name}"), settings_message(self._settings))
        self._handle = HorovodCollectives(process_set).start(request)

    def check(self) -> None:
        """Raise ExchangeError, on all ranks, if some rank has other settings than this one."""
        try:
            check_settings(self._settings, self._handle.result())
        except ExchangeError:
            ENGINE.abandon()
            raise


def name_in(process_set: Any, name: str) -> str:
    """Of a collective. Asked for when one starts: Horovod gives a set that is added again another id."""
    return f"set{process_set.process_set_id}.{name}"


class Flight:
    """One exchange of a bundle: collects its pieces, leaves when complete or when awaited."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.pieces: dict[Slice, Piece] = {}
        self.job: Job | None = None
        self.exchange = ""
        self._task: Task | None = None

    def add(self, part: Slice, piece: Piece) -> None:
        self.pieces[part] = piece
        if len(self.pieces) == len(self.bundle.slices):
            self.leave()

    def leave(self) -> None:
        """Start the exchange. Bundles list their slices in one order on all ranks, and so do jobs."""
        bundle = self.bundle
        collectives = bundle.collectives
        pieces = [self.pieces[part] for part in bundle.slices if part in self.pieces]
        self.exchange = choose_exchange(bundle.exchange, bundle.codec, collectives.ranks)
        self.job = Job(
            name=bundle.name,
            pieces=pieces,
            kernels=kernels_on(bundle.codec, bundle.device),
            rank=collectives.rank,
            ranks=collectives.ranks,
            empty=bundle.buffers_for(self),
        )
        bundle.open_flight = None
        steps = start_exchange(self.exchange, self.job)
        self._task = ENGINE.submit(steps, collectives, bundle.span, bundle.threaded)

    def wait(self) -> Job:
        """The finished job. Starts it if some pieces never came, which is so on all ranks
        (a gradient that turned out sparse); ranks that differ find out from the fingerprint."""
        if self._task is None:
            self.leave()
        assert self._task is not None and self.job is not None
        ENGINE.wait(self._task)
        return self.job

    def count(self, part: Slice, record: TensorStats) -> None:
        """Add what one slice of the finished exchange sent, and its share of the time."""
        assert self._task is not None and self.job is not None
        piece = self.pieces[part]
        record.exchange, record.codec, record.bypassed = self.exchange, self.bundle.codec_name, ""
        record.payload_bytes += piece.payload_bytes
        record.wire_bytes += self.job.wire_bytes * piece.payload_bytes / self.job.payload_bytes
        share = len(piece.x) / sum(len(other.x) for other in self.job.pieces)
        record.encode_seconds += share * self._task.encode_seconds
        record.wait_seconds += share * self._task.wait_seconds
        record.decode_seconds += share * self._task.decode_seconds

    def finite(self, part: Slice) -> bool | None:
        """Whether the mean of a slice of the finished exchange is finite, if the exchange has looked at it."""
        return self.pieces[part].finite

    @property
    def landed(self) -> bool:
        return self._task is not None and self._task.finished


class Bundle:
    """Slices that travel together, each step anew."""

    def __init__(
        self,
        slices: list[Slice],
        codec: Any,
        exchange: str,
        device: torch.device,
        process_set: Any,
        prefix: str = "",
        threaded: bool = False,
    ) -> None:
        self.slices = slices
        self.codec = codec
        self.codec_name = repr(codec)
        self.exchange = exchange
        self.device = device
        self.threaded = threaded
        self.span = span_on(device)
        self.collectives = HorovodCollectives(process_set)
        self.open_flight: Flight | None = None
        self._last_flight: Flight | None = None
        self._buffers = Buffers(empty_on(device))
        self._prefix = prefix

    @property
    def name(self) -> str:
        first = self.slices[0]
        name = f"{self._prefix}{first.name}[{first.start}]+{len(self.slices)}"
        return name_in(self.collectives.process_set, name)

    def flight_for(self, part: Slice) -> Flight:
        """The flight that takes this slice next.

        A slice that comes a second time means that the step before was abandoned by an error.
        """
        if self.open_flight is None or part in self.open_flight.pieces:
            self.open_flight = Flight(self)
        return self.open_flight

    def buffers_for(self, flight: Flight) -> Buffers:
        """The bundle's buffers, or new ones if an abandoned flight still holds them."""
        if self._last_flight is not None and not self._last_flight.landed:
            self._buffers = Buffers(empty_on(self.device))
        self._last_flight = flight
        self._buffers.rewind()
        return self._buffers
