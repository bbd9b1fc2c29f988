"""Before something of an allreduce is exchanged: whether all ranks mean the same by the call.

Without compression, ranks whose tensors do not match learn of it at once, because Horovod compares what comes under one
name. A compressor would start collectives of its own, and wait for them where another rank leaves its tensor to
Horovod or compresses one of another shape. So it first reduces two words under the very names that Horovod gives the
tensors of the call: a rank that leaves them to Horovod does not match these, and the others learn from the words
whether they agree. Nothing stays in Horovod's queue, and no exchange has begun.
"""

from __future__ import annotations

import contextlib
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qsgd.collectives.horovod_torch import mismatched
from hvd_qsgd.errors import ExchangeError, UnsupportedError
from hvd_qsgd.reduction.agreement import check_words
from hvd_qsgd.torch.callsite import Call
from hvd_qsgd.torch.flights import Agreement

#: No tensor that is reduced has it; two words.
SHAPE = (1, 1, 1, 1, 1, 1, 2)


def preflight(call: Call, process_set: Any, settings: dict[str, Any], tensors: list[str]) -> None:
    """Return when all ranks are known to mean the same.

    Args:
        call: what they are in.
        process_set: whose ranks take part.
        settings: of the compressor; see :meth:`hvd_qsgd.compressors.base.CompressorBase._settings`.
        tensors: what will be done with each tensor of the call.

    Raises:
        ExchangeError: they do not, on all ranks that compress; those that leave the tensors to Horovod get an error
            from it.
    """
    words = torch.tensor(check_words(settings), dtype=torch.int32, device="cpu").view(SHAPE)
    reduced = [words.clone() for _ in call.tensors]
    arguments = {"name": call.name, "op": hvd.Max, "process_set": process_set}
    if call.grouped:
        # Horovod has a name for each tensor of a group, and ends none of them before all.
        handle = hvd.grouped_allreduce_async_(reduced, **arguments)
    else:
        handle = hvd.allreduce_async_(reduced[0], **arguments)
    name = call.name or "without a name"
    try:
        hvd.synchronize(handle)
    except HorovodInternalError as error:
        if not mismatched(error):
            raise
        raise ExchangeError(
            f"Another rank leaves to Horovod what this one compresses in an allreduce {name!r}: here it is {tensors}. "
            f"All ranks must give tensors of the same shape and type, and the same compressor settings ({error})"
        ) from error
    if all(torch.equal(each, words) for each in reduced):
        return
    # With a rank that has joined nothing can be gathered.
    with contextlib.suppress(UnsupportedError):
        Agreement(name, settings, tensors, process_set).check()
    raise ExchangeError(
        f"The ranks do not mean the same by an allreduce {name!r}: here it is {tensors}. All ranks must give tensors "
        f"of the same shape and type, and the same compressor settings."
    )
