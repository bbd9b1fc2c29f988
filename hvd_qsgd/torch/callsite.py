"""Who calls a compressor.

Horovod hands ``compress`` the tensor alone. Its name, its process set and what will be done
with it are in the frames of the Horovod functions above, which are read here, and only
here. They are found by their code objects, so no function of the same name elsewhere can
be mistaken for them. Horovod 0.28.1 is the last release; its code does not change.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from horovod.torch.optimizer import _DistributedAdasumOptimizer, _DistributedOptimizer

from hvd_qsgd.errors import UnsupportedError

#: Frames between compress() and the Horovod function: list comprehensions and wrappers of ours.
DEPTH = 8
OPERATIONS = {hvd.Adasum: "Adasum", hvd.Min: "Min", hvd.Max: "Max", hvd.Product: "Product"}


@dataclass(frozen=True)
class Call:
    """One call of ``hvd.allreduce`` or ``hvd.grouped_allreduce``; ``name`` is what the caller gave."""

    name: str | None
    tensors: tuple[torch.Tensor, ...]
    grouped: bool

    def name_of(self, index: int) -> str:
        """What a tensor of it is called in statistics, policies and residuals."""
        name = self.name or _unnamed(self.tensors[index])
        return f"{name}.{index}" if self.grouped else name


@dataclass(frozen=True)
class CallSite:
    """What the caller of ``compress`` knows about the tensor.

    Attributes:
        name: of the parameter, or as given to ``hvd.allreduce``.
        named: False where ``hvd.allreduce`` was called without a name.
        process_set: whose ranks take part.
        optimizer: the distributed optimizer that is calling, or None.
        parameter: whose gradient the tensor is, or None.
        grouped: whether the result goes into a grouped allreduce, whose tensors share a device.
        again: the tensor is a result of ``synchronize()`` that ``step()`` hands in once more.
        call: which began with this tensor; None in optimizers, and for the further tensors of a group.
        refusal: why compression cannot do what the caller wants.
    """

    name: str
    process_set: Any
    named: bool = True
    optimizer: Any = None
    parameter: Any = None
    grouped: bool = False
    again: bool = False
    call: Call | None = None
    refusal: UnsupportedError | None = None

    @cached_property
    def ranks(self) -> int:
        """How many take part."""
        size = self.process_set.size()
        if size is None:
            raise UnsupportedError(
                f"The process set of {self.name!r} has been removed, or was never added. Use one that "
                f"hvd.add_process_set() has returned and hvd.remove_process_set() has not got yet."
            )
        return int(size)


def find_call_site(tensor: torch.Tensor) -> CallSite:
    """Read the call site of a ``compress`` from the stack.

    Raises:
        UnsupportedError: the caller is no Horovod function, or one that nothing can be done for.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(DEPTH):
        if frame is None:
            break
        reader = READERS.get(id(frame.f_code))
        if reader is not None:
            return reader(frame, tensor)
        frame = frame.f_back
    raise UnsupportedError(
        "compress() was not called by a function of Horovod that this package knows, so the name and the process set "
        "of the tensor are unknown. Pass the compressor as compression= to hvd.DistributedOptimizer, hvd.allreduce or "
        "hvd.grouped_allreduce of Horovod 0.28; to encode without Horovod use hvd_qsgd.QSGD or hvd_qsgd.TopK. If "
        "torch.compile compiles what calls Horovod, let Horovod be called outside of it."
    )


def _from_optimizer(frame: FrameType, tensor: torch.Tensor) -> CallSite:
    variables = frame.f_locals  # Python makes it anew each time
    optimizer, parameter = variables["self"], variables["p"]
    return CallSite(
        name=optimizer._parameter_names[parameter],
        process_set=optimizer.process_set,
        optimizer=optimizer,
        parameter=parameter,
        again=_comes_again(frame),
        refusal=_refused_operation(optimizer.op),
    )


def _comes_again(frame: FrameType) -> bool:
    """Whether ``step()`` synchronizes what ``synchronize()`` has left, as without ``skip_synchronize()``.

    That ``optimizer._synchronized`` is set does not tell: it stays set where a gradient scaler skips the step.
    """
    caller = frame.f_back
    if caller is None or caller.f_code is not _DistributedOptimizer.synchronize.__code__:
        return False
    above = caller.f_back
    if above is None or above.f_code is not _DistributedOptimizer.step.__code__:
        return False
    # Horovod puts there whose gradients a backward pass has made since.
    return frame.f_locals["self"]._synchronized and not caller.f_locals["completed"]


def steps_now() -> bool:
    """Whether ``decompress`` is called for an optimizer that steps next, and not by ``synchronize()`` of a program."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(DEPTH):
        if frame is None or frame.f_code is _DistributedOptimizer.synchronize.__code__:
            break
        frame = frame.f_back
    caller = frame and frame.f_back
    return caller is not None and caller.f_code is _DistributedOptimizer.step.__code__


def _from_optimizer_group(frame: FrameType, tensor: torch.Tensor) -> CallSite:
    optimizer = frame.f_locals["self"]
    parameter = next(p for p in frame.f_locals["ps"] if p.grad is tensor)
    return CallSite(
        name=optimizer._parameter_names[parameter],
        process_set=optimizer.process_set,
        optimizer=optimizer,
        parameter=parameter,
        grouped=True,
        refusal=_refused_operation(optimizer.op),
    )


def _from_allreduce(frame: FrameType, tensor: torch.Tensor) -> CallSite:
    return _from_call(frame, Call(frame.f_locals["name"], (tensor,), grouped=False), 0)


def _from_grouped_allreduce(frame: FrameType, tensor: torch.Tensor) -> CallSite:
    call = Call(frame.f_locals["name"], tuple(frame.f_locals["tensors"]), grouped=True)
    return _from_call(frame, call, next(i for i, member in enumerate(call.tensors) if member is tensor))


def _from_call(frame: FrameType, call: Call, index: int) -> CallSite:
    return CallSite(
        name=call.name_of(index),
        process_set=frame.f_locals["process_set"],
        named=call.name is not None,
        grouped=call.grouped,
        call=call if index == 0 else None,
        refusal=_refused_operation(frame.f_locals["op"]) or _refused_tensors(call.tensors),
    )


def _refused_tensors(tensors: tuple[torch.Tensor, ...]) -> UnsupportedError | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return UnsupportedError(
            "A tensor that requires a gradient came to a compressed allreduce, which is not differentiable. "
            "Pass tensor.detach(), or compression=hvd.Compression.none."
        )
    ids = [id(tensor) for tensor in tensors]
    if len(set(ids)) == len(ids):
        return None
    first, second = next((ids.index(each), i) for i, each in enumerate(ids) if ids.index(each) != i)
    return UnsupportedError(
        f"hvd.grouped_allreduce got one tensor twice, at {first} and {second} of its list, and a compressor "
        f"cannot tell which of them it is asked for. Pass it once, or tensor.clone()."
    )


def _refused_operation(operation: Any) -> UnsupportedError | None:
    # Allreduces resolve the default, None, only after they compressed.
    if operation in (None, hvd.Average, hvd.Sum):
        return None
    return UnsupportedError(
        f"op={OPERATIONS.get(operation, operation)} cannot be combined with compression: only the mean and the sum "
        f"of compressed tensors are defined. Use op=hvd.Average or op=hvd.Sum, or compression=hvd.Compression.none."
    )


def _unnamed(tensor: torch.Tensor) -> str:
    # Not from a counter: ranks that call in different orders must not mix up tensors.
    return f"unnamed.{'x'.join(map(str, tensor.shape))}.{str(tensor.dtype).removeprefix('torch.')}"


def _refuse_adasum(frame: FrameType, tensor: torch.Tensor) -> CallSite:
    raise UnsupportedError(
        "hvd.DistributedOptimizer(op=hvd.Adasum) cannot be combined with this compression: Adasum is not linear, so "
        "the result would be wrong. Use op=hvd.Average or op=hvd.Sum, or compression=hvd.Compression.fp16."
    )


def _refuse_reducescatter(frame: FrameType, tensor: torch.Tensor) -> CallSite:
    raise UnsupportedError(
        "hvd.reducescatter cannot be combined with this compression: each rank would need another part of the result. "
        "Use hvd.allreduce, or compression=hvd.Compression.fp16."
    )


def _code(function: Any) -> int:
    # The functions live as long as Horovod, and the hash of code takes microseconds.
    return id(function.__code__)


READERS: dict[int, Any] = {
    _code(_DistributedOptimizer._allreduce_grad_async): _from_optimizer,
    _code(_DistributedOptimizer._grouped_allreduce_grad_async): _from_optimizer_group,
    _code(_DistributedAdasumOptimizer._allreduce_grad_async): _refuse_adasum,
    _code(mpi_ops.allreduce): _from_allreduce,
    _code(mpi_ops.grouped_allreduce): _from_grouped_allreduce,
    _code(mpi_ops.reducescatter): _refuse_reducescatter,
    _code(mpi_ops.grouped_reducescatter): _refuse_reducescatter,
}
