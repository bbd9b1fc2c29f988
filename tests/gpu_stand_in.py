"""A stand-in for a GPU that finds races, and work for which the host would have to wait.

Tensors say that they are on ``cuda:0`` and hold a tensor of the CPU. Each operation belongs to the stream that is
current when it is called, as on a GPU, and vector clocks say what it is ordered after:

* reading what another stream wrote, or writing what another stream uses, without waiting, is a :class:`RaceError`;
* memory that is freed while it was used on another stream than the one it comes from, and was not recorded
  there, is one as well;
* what would make the host wait for the device (``item()``, ``cpu()``, ``nonzero()``, a copy that is not from or to
  pinned memory) is a :class:`HostWaitsError`;
* a copy to pinned memory arrives when an event after it is asked for, not before.

Horovod is the real one, on the tensors inside; :class:`Horovod` adds what it does with streams.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hvd_qsgd.collectives import horovod_torch
from hvd_qsgd.kernels.triton import probe
from hvd_qsgd.torch import streams

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
#: Their results, or the sizes of those, are numbers that the host must know.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.is_nonzero.default,
}

#: They touch no memory.
VIEWS = {
    f"aten::{name}"
    for name in (
        *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty_like", "expand", "new_empty"),
        *("permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view"),
    )
}


class RaceError(AssertionError):
    """Two streams use the same memory in no order."""


class HostWaitsError(AssertionError):
    """The host would wait for the device."""


Clock = dict[Any, int]


def join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.clock: Clock = {}
        #: Copies to pinned memory that have not arrived.
        self.copies: list[Callable[[], object]] = []

    def wait_stream(self, other: Stream) -> None:
        join(self.clock, other.clock)


class Event:
    def __init__(self) -> None:
        self._asked = False

    def record(self, stream: Stream) -> None:
        self._clock, self._copies = dict(stream.clock), stream.copies
        stream.copies = []

    def query(self) -> bool:
        asked, self._asked = self._asked, True
        if asked:
            self.synchronize()
        return asked

    def synchronize(self) -> None:
        join(WORLD.host, self._clock)
        for copy in self._copies:
            copy()
        self._copies = []


class World:
    """One device: its streams, which of them is current, and what the host knows to be over."""

    def __init__(self) -> None:
        self.default, self.nccl = Stream(), Stream()
        self.current = self.default
        self.host: Clock = {}
        self.faults: list[str] = []

    def tick(self, stream: Stream) -> int:
        join(stream.clock, self.host)
        stream.clock[stream] = stream.clock.get(stream, 0) + 1
        return stream.clock[stream]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


WORLD = World()


class Memory:
    """What was done with a block of the device's memory."""

    def __init__(self, home: Stream) -> None:
        self.home = home
        self.written: tuple[Stream, int] | None = None
        self.read: Clock = {}
        self.log = {"used": {home}, "recorded": {home}}
        weakref.finalize(self, self._freed, self.log, WORLD.faults)

    @staticmethod
    def _freed(log: dict[str, set[Stream]], faults: list[str]) -> None:
        if log["used"] - log["recorded"]:
            faults.append("memory was freed that a stream uses which was not recorded")

    def use(self, stream: Stream, write: bool) -> None:
        tick = WORLD.tick(stream)
        self.log["used"].add(stream)
        before = [*([self.written] if self.written else []), *(self.read.items() if write else [])]
        for other, when in before:
            if stream.clock.get(other, 0) < when:
                raise RaceError("written" if write else "read" + " without waiting for the stream that used it before")
        if write:
            self.written, self.read = (stream, tick), {}
        else:
            self.read[stream] = tick


class Far(torch.Tensor):
    """A tensor on the device."""

    inner: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory | None = None) -> Far:
        far = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        far.inner = inner
        far.memory = Memory(WORLD.current) if memory is None else memory
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.inner})"

    # torch's own indexing asks a driver for the current device.

    def __getitem__(self, index: Any) -> Far:
        if not isinstance(index, torch.Tensor):
            return Far(self.inner[index], self.memory)
        return aten.index.Tensor(self, [index])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, torch.Tensor):
            aten.index_put_.default(self, [index], value)
        elif isinstance(value, torch.Tensor):
            self[index].copy_(value)
        else:
            self[index].fill_(value)

    def record_stream(self, stream: Any) -> None:
        self.memory.log["recorded"].add(stream)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def _waits(self, *arguments: Any, **settings: Any) -> Any:
        raise HostWaitsError("a value of the device")

    tolist = numpy = cpu = item = new_tensor = _waits  # type: ignore[assignment]
    __array__ = __int__ = __float__ = __bool__ = __index__ = _waits  # type: ignore[assignment]


def far(tensor: torch.Tensor) -> Far:
    """A copy on the device, written by the current stream."""
    made = Far(tensor.clone())
    made.memory.use(WORLD.current, write=True)
    return made


def carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of which some tensors, or the result, are on the device."""
    if func in WAITING:
        raise HostWaitsError(str(func))
    if func is aten.copy_.default:
        copy(*args, **kwargs)
        return args[0]
    if func is aten._to_copy.default and torch.device(kwargs.get("device") or DEVICE).type == "cpu":
        raise HostWaitsError(str(func))
    made_here = {}
    for position, argument in enumerate(func._schema.arguments):
        values = args[position] if position < len(args) else kwargs.get(argument.name)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(value, torch.Tensor) and not isinstance(value, Far) and value.dim():
                raise HostWaitsError(f"{func} of tensors of the host and of the device")
            if isinstance(value, Far):
                made_here[value.inner.untyped_storage().data_ptr()] = value.memory
                if func._schema.name not in VIEWS:
                    value.memory.use(WORLD.current, bool(argument.alias_info and argument.alias_info.is_write))
                if position == 1 and "aten::index" in func._schema.name and value.dtype == torch.bool:
                    raise HostWaitsError("a mask as an index")
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(Far, lambda value: value.inner, (args, kwargs))
    outcome = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:
        return args[0]

    def wrap(value: torch.Tensor) -> Far:
        shared = made_here.get(value.untyped_storage().data_ptr()) if value.numel() else None
        wrapped = Far(value, shared)
        if shared is None:
            wrapped.memory.use(WORLD.current, write=True)
        return wrapped

    return tree_map_only(torch.Tensor, wrap, outcome)


def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
    if isinstance(source, Far):
        source.memory.use(WORLD.current, write=False)
    if isinstance(target, Far):
        target.memory.use(WORLD.current, write=True)
    if isinstance(source, Far) and isinstance(target, Far):
        target.inner.copy_(source.inner)
    elif not non_blocking or not pinned(target if isinstance(source, Far) else source):
        raise HostWaitsError("a copy from or to memory that is not pinned")
    elif isinstance(target, Far):
        target.inner.copy_(source)
    else:
        values = source.inner.clone()
        WORLD.current.copies.append(lambda: target.copy_(values))


def pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "is_far_pinned", False)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    tensor.is_far_pinned = True  # type: ignore[attr-defined]
    return tensor


class Factories(TorchFunctionMode):
    """What torch decides before operations are dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = getattr(func, "__name__", "")
        if kwargs.pop("pin_memory", False):
            return pin(func(*args, **kwargs).fill_(77))
        if name == "copy_" and any(isinstance(value, Far) for value in args):
            # torch would ask a driver for the current device.
            copy(*args, **kwargs)
            return tensor
        if isinstance(tensor, Far):
            if name == "to" and DEVICE in args:
                return tensor
            return aten.bitwise_not.default(tensor) if name == "__invert__" else func(*args, **kwargs)
        if tensor is not None and name == "pin_memory":
            return tensor if pinned(tensor) else pin(tensor.clone())
        if tensor is not None and name == "to" and DEVICE in (*args, *kwargs.values()):
            if not (pinned(tensor) and kwargs.get("non_blocking")):
                raise HostWaitsError("a copy from memory that is not pinned")
            return far(tensor)
        if tensor is None and str(kwargs.get("device")).startswith("cuda"):
            if name in ("tensor", "as_tensor", "frombuffer"):
                raise HostWaitsError(f"torch.{name} on the device")
            return far(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class Dispatch(TorchDispatchMode):
    """Operations without a tensor of the device among their arguments that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = any(issubclass(kind, Far) for kind in types) or str(kwargs.get("device")).startswith("cuda")
        return carry_out(func, args, kwargs) if on_device else func(*args, **kwargs)


class Horovod:
    """Horovod 0.28.1 built with NCCL: real collectives of the tensors inside, and what happens on streams."""

    def __init__(self, nccl: bool, ends_early: bool) -> None:
        self._nccl, self._ends_early = nccl, ends_early
        self._inputs: dict[int, Far] = {}
        self.on_the_device = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(hvd, name)

    def nccl_built(self) -> int:
        return 22000 * self._nccl

    def allgather_async(self, tensor: torch.Tensor, **settings: Any) -> int:
        return self._start(hvd.allgather_async, tensor, False, (), settings)

    def alltoall_async(self, tensor: torch.Tensor, splits: torch.Tensor, **settings: Any) -> int:
        return self._start(hvd.alltoall_async, tensor, False, (splits,), settings)

    def allreduce_async_(self, tensor: torch.Tensor, **settings: Any) -> int:
        return self._start(hvd.allreduce_async_, tensor, True, (), settings)

    def _start(self, function: Any, tensor: torch.Tensor, write: bool, more: Any, settings: Any) -> int:
        if not isinstance(tensor, Far):
            return int(function(tensor, *more, **settings))
        assert self._nccl, "without NCCL nothing of the device comes to Horovod"
        self.on_the_device += 1
        WORLD.nccl.wait_stream(WORLD.current)  # the ready event
        tensor.memory.log["recorded"].add(WORLD.nccl)  # Horovod keeps its input until it has been asked for the result
        tensor.memory.use(WORLD.nccl, write)
        handle = int(function(tensor.inner, *more, **settings))
        self._inputs[handle] = tensor
        return handle

    def synchronize(self, handle: int) -> Any:
        outcome = hvd.synchronize(handle)
        sent = self._inputs.pop(handle, None)
        if sent is None:
            return outcome
        if isinstance(outcome, tuple):
            result: Any = (self._received(outcome[0]), outcome[1])
        else:
            result = sent if outcome is sent.inner else self._received(outcome)
        if self._ends_early:
            WORLD.default.wait_stream(WORLD.nccl)
        else:
            join(WORLD.host, WORLD.nccl.clock)
        return result

    @staticmethod
    def _received(tensor: torch.Tensor) -> Far:
        memory = Memory(WORLD.default)
        memory.log["recorded"].add(WORLD.nccl)
        memory.use(WORLD.nccl, write=True)
        return Far(tensor, memory)


@contextlib.contextmanager
def gpu(monkeypatch: Any, nccl: bool = True, ends_early: bool = False) -> Iterator[Horovod]:
    """A world with a device, in which this package has not run yet; races that show late are raised at the end."""
    WORLD.__init__()  # type: ignore[misc]
    horovod = Horovod(nccl, ends_early)
    streams.own_stream.cache_clear()
    with monkeypatch.context() as patch, contextlib.ExitStack() as modes:
        patch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", str(int(ends_early)))
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", WORLD.stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: WORLD.current)
        patch.setattr(torch.cuda, "default_stream", lambda device=None: WORLD.default)
        patch.setattr(probe, "works_on", lambda device: False)
        patch.setattr(horovod_torch, "hvd", horovod)
        modes.enter_context(Factories())
        modes.enter_context(Dispatch())
        yield horovod
    streams.own_stream.cache_clear()
    assert not WORLD.faults, WORLD.faults
