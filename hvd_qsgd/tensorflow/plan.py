"""Plans: tensors that are exchanged together, as operations of a graph.

An exchange is a generator. In a graph it runs in segments: a call of Python up to its first
collective, Horovod's own asynchronous operation, a call that resumes it, and so on;
which collectives come is known beforehand (``Exchange.phases``). No thread of TensorFlow waits
for the network, and whatever does not depend on each other overlaps. Eager calls run the same graph.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.collectives.horovod_tensorflow import INPUTS, HorovodCollectives, emit, inputs_of, outcome_of
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.exchanges import EXCHANGES, Job, Piece, start_exchange
from hvd_qsgd.exchanges.base import Steps
from hvd_qsgd.observe.probe import Probe
from hvd_qsgd.policies import Tensor
from hvd_qsgd.reduction.buffers import Buffers
from hvd_qsgd.reduction.fusion import Slice, plan_bundles
from hvd_qsgd.tensorflow.backends import HOST, Backend
from hvd_qsgd.tensorflow.floats import with_subnormals
from hvd_qsgd.tensorflow.preflight import Meeting, Preflight

if TYPE_CHECKING:
    from hvd_qsgd.tensorflow.compressor import Compressor

#: Runs of a plan under way at a time. More are leftovers of runs that an error has ended.
MOST_RUNS = 16


@dataclass(frozen=True)
class Entry:
    """A tensor of a plan.

    Attributes:
        key: by which all ranks know it, and this one what it remembers of it.
        bypass: why it is left to Horovod, if it is.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    bypass: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def element_size(self) -> int:
        return int(tf.as_dtype(self.dtype).size)

    @property
    def described(self) -> Tensor:
        return Tensor(self.key, self.shape)

    def __str__(self) -> str:
        """What all ranks must agree on."""
        described = f"{self.dtype} {self.shape}"
        return f"{described}, left to Horovod" if self.bypass else f"{self.key} {described}"


@dataclass
class Flight:
    """One exchange under way: what it is, and the seconds that were spent on it so far."""

    job: Job
    steps: Steps
    buffers: Buffers
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass
class Passage:
    """One tensor in one run."""

    #: Slices whose exchange has not ended.
    missing: int
    #: Whether to measure what is lost.
    measured: bool
    #: What is encoded, and what becomes the mean.
    source: Any = None
    out: Any = None
    #: With error feedback: gradient plus residual, which the exchange turns into the new residual.
    corrected: Any = None
    probe: Probe | None = None
    step: int = 0
    pieces: list[tuple[Piece, Flight]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Run:
    """One execution of a plan's operations."""

    passages: dict[int, Passage]
    flights: dict[int, Flight] = field(default_factory=dict)


class Bundle:
    """Slices that travel together, and the buffers for it."""

    def __init__(self, slices: list[Slice], members: list[int], name: str, backend: Backend) -> None:
        self.slices = slices
        #: Which entries of the plan the slices belong to.
        self.members = members
        self.name = name
        self._backend = backend
        self._free: list[Buffers] = []

    def take_buffers(self) -> Buffers:
        """Buffers that no other run holds: a graph may run one plan several times at once."""
        try:
            buffers = self._free.pop()
        except IndexError:
            return Buffers(self._backend.empty)
        buffers.rewind()
        return buffers

    def give_back(self, buffers: Buffers) -> None:
        """Keep buffers for another run. Those of abandoned runs never come back."""
        self._free.append(buffers)


@dataclass(frozen=True)
class Departure:
    """What a plan's operations give: the number of the run, and for each bundle a value that comes at its end."""

    token: tf.Tensor
    ended: Sequence[tf.Tensor]


def independent(output: tf.Tensor) -> tf.Tensor:
    """Let the operation that ``output`` comes from wait for its inputs only.

    TensorFlow else runs operations with side effects in the order in which they are written down, so an exchange would
    not begin before the one above it has ended.
    """
    graph = output.graph
    if graph.experimental_acd_manager is not None:
        graph.experimental_acd_manager.run_independently(output.op)
    return output


def after(token: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """``tensor``, from when there is a token on.

    It does not follow from constants, not even if ``tensor`` does (see :meth:`Plan.depart`).
    """
    later = tf.reshape(tensor, tf.maximum(tf.shape(tensor), tf.cast(tf.minimum(token, 0), tf.int32)))
    later.set_shape(tensor.shape)
    return later


class Plan:
    """The exchange of some tensors, whenever its operations run.

    Args:
        compressor: whose settings and memory are used.
        entries: the tensors, in the order that :meth:`depart` gets them.
        process_set: whose ranks take part.
        exchange: a name in EXCHANGES.
        backend: what encodes, and where.
        preflight: what all ranks must agree on.
    """

    def __init__(
        self,
        compressor: Compressor,
        entries: Sequence[Entry],
        process_set: Any,
        exchange: str,
        backend: Backend,
        preflight: Preflight,
    ) -> None:
        self.entries = entries
        self.compressed = [i for i, entry in enumerate(entries) if not entry.bypass]
        self.exchange = exchange
        self.process_set = process_set
        self._process_set_id = process_set.process_set_id
        self._preflight = preflight
        self._compressor = compressor
        self._backend = backend
        self._kernels = backend.kernels(compressor.codec)
        self._codec_name = repr(compressor.codec)
        self._collectives = HorovodCollectives(process_set)
        self._ranks = self._collectives.ranks
        self._bundles = self._make_bundles()
        #: How many slices each compressed tensor is cut into.
        self._slices = Counter(index for bundle in self._bundles for index in bundle.members)
        self._tokens = itertools.count()
        self._runs: dict[int, Run] = {}
        #: Memory of the means of the last run, for the next one.
        self._outs: dict[int, Any] = {}

    @property
    def alive(self) -> bool:
        """Whether the process set is the one it was: Horovod gives its id to another one when it is removed."""
        return bool(self.process_set.process_set_id == self._process_set_id)

    def _make_bundles(self) -> list[Bundle]:
        index_of = {self.entries[i].key: i for i in self.compressed}
        # Last layers first: their gradients come first.
        lengths = [(self.entries[i].key, self.entries[i].elements) for i in reversed(self.compressed)]
        bundles = []
        compressor = self._compressor
        for slices in plan_bundles(lengths, compressor.codec.granularity, compressor.fusion_elements):
            first = slices[0]
            name = f"set{self._process_set_id}.{first.name}.{first.start}.{len(slices)}"
            bundles.append(Bundle(slices, [index_of[part.name] for part in slices], name, self._backend))
        return bundles

    # -- building the graph -----------------------------------------------------------------

    def depart(self, tensors: Sequence[tf.Tensor], meeting: Meeting) -> Departure:
        """Add the exchange to the current graph, or run it if there is none."""
        if tf.executing_eagerly():
            token = tf.constant(self._begin(*self._meet(meeting)))
            return Departure(token, self._function(token, *(tensors[i] for i in self.compressed)))
        with HOST.place():
            token = independent(HOST.call(self._begin, self._meet(meeting), tf.int64))
            token.set_shape(())
        return Departure(token, self._emit(token, {i: tensors[i] for i in self.compressed}))

    def _meet(self, meeting: Meeting) -> list[tf.Tensor]:
        """What :meth:`_begin` gets; nothing where Horovod itself compares all that is sent."""
        if not self.compressed and meeting.name is not None:
            return []
        if tf.executing_eagerly():
            return [meeting.emit(tf.constant(self._announce()), self.process_set)]
        # No constant: what follows from constants TensorFlow computes when it optimizes the graph, Horovod's allreduce
        # included, and so a rank that retraces would wait for others, which do not.
        words = independent(HOST.call(self._announce, [], tf.int32))
        words.set_shape([2])
        return [meeting.emit(words, self.process_set)]

    @cached_property
    def _function(self) -> Callable[..., list[tf.Tensor]]:
        def run(token: tf.Tensor, *tensors: tf.Tensor) -> list[tf.Tensor]:
            return self._emit(token, dict(zip(self.compressed, tensors)))

        kinds = [tf.TensorSpec(entry.shape, entry.dtype) for entry in (self.entries[i] for i in self.compressed)]
        # One trace is all that there is, and TensorFlow must not count it with those of other plans.
        traced: Callable[..., list[tf.Tensor]] = tf.function(run, autograph=False).get_concrete_function(
            tf.TensorSpec([], tf.int64), *kinds
        )
        return traced

    def _emit(self, token: tf.Tensor, tensors: dict[int, tf.Tensor]) -> list[tf.Tensor]:
        """What comes when the exchange of each bundle has ended."""
        with self._backend.place():
            flat = {i: tf.reshape(tf.cast(tensor, tf.float32), [-1]) for i, tensor in tensors.items()}
            ended = []
            for number, bundle in enumerate(self._bundles):
                phases = EXCHANGES[self.exchange].phases
                inputs = [flat[i] for i in bundle.members]
                arrays = self._backend.call(partial(self._start, number), [token, *inputs], INPUTS[phases[0]])
                independent(arrays[0])
                for phase, types in zip(phases, [*(INPUTS[phase] for phase in phases[1:]), [tf.int64]]):
                    for array in arrays:
                        array.set_shape([None])
                    outputs = emit(phase, f"{bundle.name}.{phase}", arrays, self.process_set)
                    arrays = self._backend.call(partial(self._resume, number, phase), [token, *outputs], types)
                    independent(arrays[0])
                ended.append(arrays[0])
        return ended

    def land(self, index: int, departure: Departure, carrier: tf.Tensor, ordered: bool) -> tf.Tensor:
        """The mean of a tensor times the reduced carrier: float32, flat.

        Args:
            ordered: let TensorFlow begin nothing that has effects, and comes later, before this.
        """
        if tf.executing_eagerly():
            return tf.convert_to_tensor(self._land(index, departure.token.numpy(), carrier.numpy()))
        awaited = [end for end, bundle in zip(departure.ended, self._bundles) if index in bundle.members]
        with self._backend.place():
            inputs = [departure.token, carrier, *awaited]
            # Else without effects besides, lest the tf.cond that Horovod puts around it waits for that of another
            # gradient.
            mean = self._backend.call(partial(self._land, index), inputs, tf.float32, stateful=ordered)
            mean.set_shape([self.entries[index].elements])
            return mean

    # -- what the operations do ---------------------------------------------------------------

    def _announce(self) -> np.ndarray:
        """What this rank says to the others before a run."""
        if not self.alive:
            raise ExchangeError(
                f"A process set was removed since this graph was traced for it, and another one may have its id "
                f"{self._process_set_id} by now. Make the tf.function anew with the new process set."
            )
        if self._collectives.ranks != self._ranks:
            raise ExchangeError(
                f"There are {self._collectives.ranks} ranks, and this graph was traced for {self._ranks}. "
                f"Make the tf.function anew after the number of ranks has changed."
            )
        return self._preflight.words

    def _begin(self, *largest: Any) -> np.int64:
        """Begin a run, after all ranks have said what they mean."""
        for words in largest:
            self._preflight.check(np.asarray(words))
        measured = self._compressor._measured([entry.key for entry in self.entries])
        for entry in self.entries:
            if entry.bypass:
                self._compressor._record_bypassed(
                    entry.key, entry.elements, entry.element_size, self._ranks, entry.bypass
                )
        while len(self._runs) >= MOST_RUNS:
            del self._runs[next(iter(self._runs))]
        token = next(self._tokens)
        if self.compressed:
            self._runs[token] = Run({i: Passage(self._slices[i], measured) for i in self.compressed})
        return np.int64(token)

    @with_subnormals
    def _start(self, number: int, token: Any, *tensors: Any) -> list[Any]:
        begin = time.perf_counter()
        run, bundle = self._runs[int(token)], self._bundles[number]
        owner = 0 if self._compressor.codec.shared_randomness else self._collectives.rank
        pieces = []
        for part, index, x in zip(bundle.slices, bundle.members, tensors):
            passage = run.passages[index]
            with passage.lock:
                if passage.out is None:
                    self._prepare(index, passage, self._backend.array(x))
            piece = Piece(
                name=part.name,
                x=passage.source[part.start : part.stop],
                out=passage.out[part.start : part.stop],
                stream=stream_of(self._compressor.seed, owner, part.name),
                step=passage.step,
                first=part.start,
                keep_error=passage.corrected is not None or passage.measured,
                shape=self.entries[index].shape,
                memory=self._compressor.memory.of_codec(part.name),
                dtype=self.entries[index].dtype,
            )
            pieces.append((passage, piece))
        buffers = bundle.take_buffers()
        job = Job(
            name=bundle.name,
            pieces=[piece for _, piece in pieces],
            kernels=self._kernels,
            rank=self._collectives.rank,
            ranks=self._ranks,
            empty=buffers,
        )
        flight = run.flights[number] = Flight(job, start_exchange(self.exchange, job), buffers)
        for passage, piece in pieces:
            passage.pieces.append((piece, flight))
        request = next(flight.steps)
        flight.encode_seconds += time.perf_counter() - begin
        return [self._backend.value(array) for array in inputs_of(request)]

    def _prepare(self, index: int, passage: Passage, x: Any) -> None:
        entry = self.entries[index]
        passage.step = self._compressor.memory.begin(entry.key)
        passage.source = x
        if self._compressor._feeds(entry.described):
            passage.source = passage.corrected = self._compressor.feedback.correct(entry.key, x, self._ranks)
        if passage.measured:
            passage.probe = Probe(passage.source, own=passage.corrected is not None)
            passage.source = passage.probe.x
        out = self._outs.pop(index, None)
        # Nobody has it any more if only this name and the argument of getrefcount refer to it.
        if out is None or sys.getrefcount(out) > 2:
            out = self._backend.empty(entry.elements, "float32")
        passage.out = out

    @with_subnormals
    def _resume(self, number: int, phase: str, token: Any, *outputs: Any) -> list[Any]:
        begin = time.perf_counter()
        run, bundle = self._runs[int(token)], self._bundles[number]
        flight = run.flights[number]
        array, *sizes = outputs
        try:
            request = flight.steps.send(outcome_of(phase, [self._backend.array(array), *sizes]))
        except StopIteration:
            flight.decode_seconds += time.perf_counter() - begin
            bundle.give_back(flight.buffers)
            for index in bundle.members:
                passage = run.passages[index]
                with passage.lock:
                    passage.missing -= 1
                    if not passage.missing:
                        self._settle(index, passage)
            return [token]
        flight.decode_seconds += time.perf_counter() - begin
        return [self._backend.value(array) for array in inputs_of(request)]

    def _settle(self, index: int, passage: Passage) -> None:
        """All slices of a tensor are exchanged: count what was sent, keep what was lost."""
        entry = self.entries[index]
        record = self._compressor._record(entry.key, entry.elements, entry.element_size, self._ranks)
        for piece, flight in passage.pieces:
            job = flight.job
            record.exchange, record.codec, record.bypassed = self.exchange, self._codec_name, ""
            record.payload_bytes += piece.payload_bytes
            record.wire_bytes += job.wire_bytes * piece.payload_bytes / job.payload_bytes
            share = len(piece.x) / sum(len(other.x) for other in job.pieces)
            record.encode_seconds += share * flight.encode_seconds
            record.decode_seconds += share * flight.decode_seconds
        if passage.probe is not None:
            passage.probe.read(record)
        self._compressor._settle(entry.key, entry.described, passage.corrected, passage.out, self._kernels)

    @with_subnormals
    def _land(self, index: int, token: Any, carrier: Any, *_: Any) -> Any:
        run = self._runs[int(token)]
        out = run.passages.pop(index).out
        if not run.passages:
            # Tensors land in several threads, and two of them may find that they were the last.
            self._runs.pop(int(token), None)
        if float(carrier) != 1.0:
            out *= np.float32(carrier)
        self._outs[index] = out
        return self._backend.value(out)
