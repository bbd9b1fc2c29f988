"""Compressors for ``compression=`` of Horovod's TensorFlow functions.

``compress`` adds exchanges of its own to the graph and hands Horovod a *carrier*: one element, 1.0,
that Horovod reduces in place of the gradient. ``decompress`` takes the exchange's mean and
multiplies it by the reduced carrier, which reads 1 under Average, the number of ranks under
Sum, and includes whatever scaling Horovod applies.

Horovod asks for one gradient at a time; the first one that it asks for takes all that come with it
along, so that many gradients travel as few exchanges.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from typing_extensions import Self, Unpack

from hvd_qsgd.codecs import Codec
from hvd_qsgd.codecs.base import check_choice
from hvd_qsgd.collectives.horovod_tensorflow import HorovodCollectives
from hvd_qsgd.compressors.base import CompressorBase, class_or_instance
from hvd_qsgd.compressors.settings import Settings
from hvd_qsgd.errors import ConfigError, UnsupportedError
from hvd_qsgd.exchanges import AUTO, EXCHANGES, choose_exchange, exchanges_for
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.observe.monitor import Monitor
from hvd_qsgd.policies import Tensor
from hvd_qsgd.reduction.memory import NAMED, group_text
from hvd_qsgd.tensorflow.backends import HOST, Backend, Device, device_of, is_accelerator
from hvd_qsgd.tensorflow.callsite import CallSite, check_not_compiled, find_call_site, in_loop
from hvd_qsgd.tensorflow.plan import Departure, Entry, Plan, after
from hvd_qsgd.tensorflow.preflight import Preflight
from hvd_qsgd.tuning.auto import Advisor
from hvd_qsgd.tuning.cost import UNCOMPRESSED, Decision


@dataclass
class Ticket:
    """A tensor on its way: what ``decompress`` must know of it."""

    tensor: tf.Tensor
    plan: Plan
    index: int
    departure: Departure


@dataclass
class Unchanged:
    """A tensor that Horovod reduces itself; ``dtype`` is what to cast the result to."""

    dtype: tf.DType


@dataclass
class Call:
    """The call of a Horovod function whose tensors were taken along and are not asked for yet."""

    site: CallSite
    tickets: dict[int, list[Ticket]]


class TensorFlowSettings(Settings, total=False):
    """Settings of every compressor for TensorFlow."""

    kernels: str
    """Default: 'auto'"""


class Compressor(CompressorBase, tf.train.experimental.PythonState):
    """Horovod's compress/decompress interface around a codec.

    Use it as ``compression=`` of ``hvd.DistributedGradientTape``, ``hvd.DistributedOptimizer``,
    ``hvd.allreduce`` or ``hvd.grouped_allreduce``; both the class (all defaults) and an instance
    work. The settings are those of :class:`hvd_qsgd.compressors.base.CompressorBase`, and one more.

    Args:
        kernels: what encodes: "numba" on the CPU, to which tensors of a GPU are copied, or "tensorflow" on the tensors'
            own device, in operations that XLA compiles; "auto" takes "tensorflow" for tensors that are on a GPU. The
            bytes are the same.

    ``tf.train.Checkpoint(compression=compressor)`` saves and restores residuals and random steps. Every rank has its
    own, so every rank must write a checkpoint, under a name of its own.
    """

    def __init__(self, codec: Codec, *, kernels: str = "auto", **settings: Unpack[Settings]) -> None:
        if tf.inside_function() and not tf.executing_eagerly():
            raise ConfigError(
                f"{type(self).__name__} was made while a tf.function was traced. Each trace would begin without "
                f"residuals. Make it outside of the function."
            )
        # Before the monitor is told of this compressor.
        check_choice(type(self).__name__, "kernels", kernels, ("auto", "numba", "tensorflow"))
        super().__init__(codec, **settings)
        if not isinstance(codec, Codec) or not any(EXCHANGES[name].phases for name in exchanges_for(codec)):
            raise ConfigError(
                f"{codec} is for torch only. With TensorFlow, use one codec for all tensors, other than PowerSGD and "
                f"IntSGD."
            )
        if kernels == "tensorflow":
            kernels_for(codec, kernels)
        self.codec = codec
        self.kernels = kernels

    def _begin(self, monitor: Monitor | None = None) -> None:
        super()._begin(monitor)
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._call: Call | None = None
        self._advisor = Advisor()
        self._lock = threading.Lock()

    @classmethod
    def default(cls) -> Self:
        """See :meth:`.CompressorBase.default`; it outlives the trace in which it is first used."""
        with tf.init_scope():
            return super().default()

    # -- Horovod's interface ----------------------------------------------------------------

    @class_or_instance
    @tf.autograph.experimental.do_not_convert
    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Add the exchange of a gradient, and of all that come with it, to the graph; Horovod calls this.

        Returns:
            What Horovod has to reduce (the carrier, or the tensor itself if it is not
            compressed) and the context for :meth:`decompress`.

        Raises:
            UnsupportedError: the caller wants what compression cannot do correctly.
            ExchangeError: the ranks have different settings, or other tensors. In a graph it is raised when that runs.
        """
        site = find_call_site(tensor)
        if not site.process_set.included() or site.process_set.process_set_id is None:
            # Horovod traces what only the ranks of the process set will run, and refuses a set that was removed.
            return tensor, None
        ticket = self._ticket(site, tensor)
        tensor = ticket.tensor
        if ticket.plan.entries[ticket.index].bypass:
            if site.meeting.name is None and not tf.executing_eagerly():
                # Where a rank finds that they differ, all wait for what it has begun.
                tensor = after(ticket.departure.token, tensor)
            # Horovod cannot reduce bfloat16.
            return (tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor), Unchanged(tensor.dtype)
        dtype = tf.float64
        if site.grouped:
            # Horovod wants the tensors of a group to be of one type.
            dtype = tf.float32 if tensor.dtype == tf.bfloat16 else tensor.dtype
        # No constant, which TensorFlow would have reduced while it optimizes the graph, as in Plan.
        return tf.cast(ticket.departure.token >= 0, dtype), ticket

    @class_or_instance
    @tf.autograph.experimental.do_not_convert
    def decompress(self, tensor: tf.Tensor, context: Any) -> tf.Tensor:
        """The reduced gradient; Horovod calls this."""
        if isinstance(context, Unchanged):
            return tf.cast(tensor, context.dtype)
        if not isinstance(context, Ticket):
            return tensor
        carrier = tf.cast(tensor, tf.float64)
        # Turns of a loop may run at the same time, and Horovod takes the name of a carrier once at a time.
        mean = context.plan.land(context.index, context.departure, carrier, ordered=in_loop())
        shape = context.plan.entries[context.index].shape
        return undifferentiable(context.tensor, tf.reshape(tf.cast(mean, context.tensor.dtype), shape))

    # -- TensorFlow's checkpoints --------------------------------------------------------------

    def serialize(self) -> bytes:
        """:meth:`state_dict` as bytes, for ``tf.train.Checkpoint``."""
        state = self.state_dict()
        arrays = {f"arrays/{path}": array for path, array in state.pop("arrays").items()}
        stream = io.BytesIO()
        np.savez(stream, state=np.frombuffer(json.dumps(state).encode(), np.uint8), **arrays)
        return stream.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """The inverse of :meth:`serialize`."""
        with np.load(io.BytesIO(string_value), allow_pickle=False) as arrays:
            state = json.loads(arrays["state"].tobytes())
            names = [name for name in arrays.files if name != "state"]
            state["arrays"] = {name.removeprefix("arrays/"): arrays[name] for name in names}
        self.load_state_dict(state)

    @staticmethod
    def _saved(array: Any) -> np.ndarray:
        return np.array(array)

    # -- parts of compress ---------------------------------------------------------------------

    def _place(self) -> tuple[int, int]:
        return int(hvd.rank()), int(hvd.size())

    def _measured(self, keys: Sequence[str]) -> bool:
        """Tell the monitor that these tensors begin a step; True if it wants to know what is lost of them."""
        if self.monitor is None:
            return False
        with self._lock:
            return any([self.monitor.starts(key) for key in keys])

    def _ticket(self, site: CallSite, tensor: tf.Tensor) -> Ticket:
        call = self._call
        if call is None or call.site.marker is not site.marker or call.site.graph is not site.graph:
            call = self._call = Call(site, self._take_along(site))
        waiting = call.tickets[id(tensor)]
        ticket = waiting.pop(0)
        if not waiting:
            del call.tickets[id(tensor)]
        if not call.tickets:
            self._call = None
        return ticket

    def _take_along(self, site: CallSite) -> dict[int, list[Ticket]]:
        """Start the exchange of all tensors of a call."""
        plan = self._plan(site)
        if site.graph is None:
            departure = plan.depart(site.tensors, site.meeting)
        else:
            with site.graph.as_default():
                departure = plan.depart(site.tensors, site.meeting)
        tickets: dict[int, list[Ticket]] = {}
        for index, (handed, tensor) in enumerate(zip(site.handed, site.tensors)):
            tickets.setdefault(id(handed), []).append(Ticket(tensor, plan, index, departure))
        return tickets

    def _plan(self, site: CallSite) -> Plan:
        process_set = site.process_set
        keys = self._keys(site)
        entries = [self._entry(site, i, key) for i, key in enumerate(keys)]
        device = self._device(site, entries)
        key = (process_set, process_set.process_set_id, process_set.size(), site.reduction, device, tuple(entries))
        if key not in self._plans:
            self._plans = {key: plan for key, plan in self._plans.items() if plan.alive}
            with tf.init_scope():
                self._plans[key] = self._make_plan(site, entries, HOST if device is None else Device(device))
        return self._plans[key]

    def _device(self, site: CallSite, entries: Sequence[Entry]) -> str | None:
        """Where operations of TensorFlow encode ("" if it has not decided yet); None: Numba does, on the CPU."""
        if self.kernels == "numba":
            return None
        variables = site.variables or [None] * len(entries)
        found = [
            device_of(tensor, variable)
            for tensor, variable, entry in zip(site.tensors, variables, entries)
            if not entry.bypass
        ]
        if self.kernels == "tensorflow":
            return found[0] if found else None
        device = next((device for device in found if is_accelerator(device)), None)
        if device is not None:
            try:
                kernels_for(self.codec, "tensorflow")
            except ConfigError as error:
                warnings.warn(f"Gradients are copied from {device or 'the GPU'} to the CPU: {error}", stacklevel=2)
                return None
        return device

    def _keys(self, site: CallSite) -> list[str]:
        """The keys of the memory of a call's tensors."""
        names = []
        for index, (name, tensor) in enumerate(zip(site.names, site.tensors)):
            if name is None:
                dims = "x".join(map(str, tensor.shape)) if tensor.shape.rank is not None else "unknown"
                name = f"unnamed.{dims}.{tensor.dtype.name}" + (f".{index}" if site.grouped else "")
            names.append(name)
        owners = site.variables or [NAMED] * len(names)
        group = group_text(None if site.process_set.process_set_id == 0 else site.process_set.ranks)
        return self._claim(list(zip(names, owners)), group)

    def _entry(self, site: CallSite, index: int, key: str) -> Entry:
        tensor, name = site.tensors[index], site.names[index]
        shape = tensor.shape if site.variables is None else site.variables[index].shape
        known = shape.is_fully_defined()
        dims = tuple(shape.as_list()) if known else ()
        reason = "its shape is not known when the graph is traced"
        if known:
            described = Tensor(name or "", dims)
            reason = self._reason_to_bypass(
                described, tensor.dtype.name, tensor.dtype.is_floating, site.process_set.size()
            )
        if name is None and not reason and self._feeds(Tensor("", dims)):
            raise UnsupportedError(
                "hvd.allreduce was called without a name, and error feedback keeps a residual for each name. "
                "Pass name=, or a compressor with error_feedback=False."
            )
        return Entry(key, dims, tensor.dtype.name, reason)

    def _make_plan(self, site: CallSite, entries: Sequence[Entry], backend: Backend) -> Plan:
        check_not_compiled()
        compressed = [entry for entry in entries if not entry.bypass]
        exchange = choose_exchange(self.exchange, self.codec, site.process_set.size())
        settings = {**self._settings([]), "op": site.reduction, "tensors": list(map(str, entries))}
        preflight = Preflight(settings, site.process_set)
        if compressed and self.exchange == AUTO:
            decision = self._decide(site, compressed, backend, preflight)
            self._stats.decisions[compressed[0].key] = str(decision)
            exchange = decision.exchange
            if exchange == UNCOMPRESSED:
                reason = f'exchange="auto": {decision}'
                entries = [replace(entry, bypass=entry.bypass or reason) for entry in entries]
        if compressed and exchange != UNCOMPRESSED and not EXCHANGES[exchange].phases:
            raise ConfigError(
                f"The exchange {exchange!r} is for torch only: it does not say its phases, of which TensorFlow builds "
                f"the graph. Choose another one with exchange=."
            )
        # 0 stands for all cores.
        self._use_threads(hvd.local_size(), tf.config.threading.get_intra_op_parallelism_threads() or sys.maxsize)
        return Plan(self, entries, site.process_set, exchange, backend, preflight)

    def _decide(self, site: CallSite, compressed: Sequence[Entry], backend: Backend, preflight: Preflight) -> Decision:
        """Choose an exchange.

        The first time ranks meet and measure, with nothing else on the network while the graph is traced; later a rank
        decides by itself, from what was measured.
        """
        elements = sum(entry.elements for entry in compressed)
        kernels, collectives = backend.kernels(self.codec), HorovodCollectives(site.process_set)
        if not self._advisor.knows(kernels, collectives):
            preflight.check(site.meeting.attend(preflight.words, site.graph, site.process_set))
        return self._advisor.decide(
            kernels,
            collectives,
            backend.empty,
            f"set{site.process_set.process_set_id}",
            elements,
            -(-elements // self.fusion_elements),
        )


@tf.custom_gradient
def undifferentiable(tensor: tf.Tensor, mean: tf.Tensor) -> Any:
    """``mean``, which was made of ``tensor``."""

    def gradient(*_: Any) -> Any:
        raise UnsupportedError(
            "A gradient was asked for through a compressed allreduce, which is not differentiable. "
            "Use tf.stop_gradient, or compression=hvd.Compression.none."
        )

    return mean, gradient
