"""Who calls a compressor.

Horovod hands ``compress`` a tensor alone, one at a time. What will be done with it, and which
other gradients come with it, is in the frames of the Horovod functions above, which are read
here, and only here. Autograph may have rewritten these functions (``tf__allreduce``), but it
keeps their global and local variables. Horovod 0.28.1 is the last release; its code does not change.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow.mpi_ops import _normalize_name
from tensorflow.python.ops.control_flow_v2_func_graphs import WhileBodyFuncGraph

from hvd_qsgd.errors import UnsupportedError
from hvd_qsgd.tensorflow.preflight import Meeting

#: Frames to look through: tf.cond and autograph put some forty between Horovod's functions.
DEPTH = 200
OPERATIONS = {hvd.Adasum: "Adasum", hvd.Min: "Min", hvd.Max: "Max", hvd.Product: "Product"}
REDUCTIONS = ("allreduce", "grouped_allreduce")
REFUSED = ("reducescatter", "grouped_reducescatter")


@dataclass(frozen=True)
class CallSite:
    """What the caller of ``compress`` knows.

    Attributes:
        process_set: whose ranks take part.
        tensors: what will be handed in together, this tensor among them.
        handed: the objects that stand for them: the tensors themselves, or variables or arrays.
        names: of each; None where ``hvd.allreduce`` was called without a name.
        variables: whose gradients the tensors are, or None.
        graph: where all tensors are at hand; None where nothing is traced.
        grouped: whether the result goes into a grouped allreduce, whose tensors share a type.
        marker: an object that is the same for all tensors of this call and for no other call.
        reduction: what else the caller asks of Horovod.
        meeting: where the ranks that make this call compare what they mean.
    """

    process_set: Any
    tensors: Sequence[tf.Tensor]
    handed: Sequence[Any]
    names: Sequence[str | None]
    variables: Sequence[Any] | None
    graph: Any
    grouped: bool
    marker: Any
    reduction: str
    meeting: Meeting


def find_call_site(tensor: tf.Tensor) -> CallSite:
    """Read the call site of a ``compress`` from the stack.

    Raises:
        UnsupportedError: the caller is no Horovod function, or one whose operation is not linear.
    """
    stack = list(_horovod_frames())
    # Of frames with one name the innermost.
    frames = dict(reversed(stack))
    if any(name in frames for name in REFUSED):
        raise UnsupportedError(
            "hvd.reducescatter cannot be combined with this compression: each rank would need another part of the "
            "result. Use hvd.allreduce, or compression=hvd.Compression.fp16."
        )
    function = next((name for name in frames if name in REDUCTIONS), None)
    if function is None:
        raise UnsupportedError(
            "compress() was not called by a function of Horovod that this package knows, so the name and the process "
            "set of the tensor are unknown. Pass the compressor as compression= to hvd.DistributedGradientTape, "
            "hvd.DistributedOptimizer, hvd.allreduce or hvd.grouped_allreduce of Horovod 0.28; to encode without "
            "Horovod use hvd_qsgd.QSGD or hvd_qsgd.TopK."
        )
    caller = frames[function].f_locals
    if caller["op"] not in (hvd.Average, hvd.Sum):
        raise UnsupportedError(
            f"op={OPERATIONS.get(caller['op'], caller['op'])} cannot be combined with compression: only the mean and "
            f"the sum of compressed tensors are defined. Use op=hvd.Average or op=hvd.Sum, or "
            f"compression=hvd.Compression.none."
        )
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    grouped = function == "grouped_allreduce"
    marker = caller["tensors"] if grouped else tensor
    members = list(marker) if grouped else [tensor]
    names: list[str | None] = [caller["name"] and (f"{caller['name']}.{i}" if grouped else caller["name"])
                               for i in range(len(members))]  # fmt: skip
    variables: list[Any] | None = None
    if "allreduce_grads" in frames:
        gradients = frames["allreduce_grads"].f_locals
        if grouped:
            # Autograph moves the body of a loop, and what is assigned there, into a function.
            groups = (frame.f_locals.get("index_group") for _, frame in stack)
            variables = [gradients["vars"][i] for i in next(group for group in groups if isinstance(group, list))]
        elif _elastic():
            variables = [next(v for grad, v in zip(gradients["grads"], gradients["vars"]) if grad is tensor)]
        else:
            # Each gradient is handed in inside of a tf.cond of its own; together they are at hand outside of it.
            marker = gradients["grads"]
            members, variables = list(marker), list(gradients["vars"])
            graph = graph and graph.outer_graph
        names = [variable.name.partition(":")[0] for variable in variables]
    meeting = _meeting(caller, tensor) if marker is tensor else Meeting()
    dense = [i for i, member in enumerate(members) if member is not None and not isinstance(member, tf.IndexedSlices)]
    return CallSite(
        process_set=caller["process_set"],
        tensors=[tf.convert_to_tensor(members[i]) for i in dense],
        handed=[members[i] for i in dense],
        names=[names[i] for i in dense],
        variables=variables and [variables[i] for i in dense],
        graph=graph,
        grouped=grouped,
        marker=marker,
        reduction=f"{'Sum' if caller['op'] == hvd.Sum else 'Average'}, prescale_factor={caller['prescale_factor']}, "
        f"postscale_factor={caller['postscale_factor']}",
        meeting=meeting,
    )


def _meeting(caller: dict[str, Any], tensor: Any) -> Meeting:
    """Of a tensor that is handed in alone: as Horovod names its own operation, which has no name outside of graphs."""
    name = caller["name"] or "HorovodAllreduce"
    if caller["name"] is None and not tf.executing_eagerly():
        name = f"HorovodAllreduce_{_normalize_name(tf.convert_to_tensor(tensor).name)}"
    return Meeting(name, caller["ignore_name_scope"])


def _horovod_frames() -> Iterator[tuple[str, FrameType]]:
    """Functions of horovod.tensorflow above, the innermost first, with their names."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(DEPTH):
        if frame is None:
            return
        if frame.f_globals is vars(hvd):
            name = frame.f_code.co_name.removeprefix("tf__")
            yield name, frame
            if name == "allreduce_grads":
                return
        frame = frame.f_back


def in_loop() -> bool:
    """Whether the body of a ``tf.while_loop`` is traced, or something in it."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None and not isinstance(graph, WhileBodyFuncGraph):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def check_not_compiled() -> None:
    """Raise UnsupportedError if the graph that is traced is for XLA, which can compile no exchange between ranks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if getattr(frame.f_locals.get("self"), "_jit_compile", None) is True:
            raise UnsupportedError(
                "XLA is to compile a function that exchanges tensors between ranks, which it cannot. "
                "Pass jit_compile=False to tf.function or to model.compile()."
            )
        frame = frame.f_back


def _elastic() -> bool:
    """Whether Horovod asks for the number of ranks anew in each step."""
    return bool(int(os.environ.get("HOROVOD_ELASTIC", "0")))
