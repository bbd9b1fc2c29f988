"""Gradients that are synchronized and never applied.

``optimizer.synchronize()`` without ``optimizer.step()`` happens where one model's loss makes gradients in another
one (GANs), where a gradient scaler skips a step, or where a program looks at gradients and drops them. What
compression has lost of them is lost with them, so residuals go back to what they were before.

Horovod's optimizer remembers in ``_synchronized`` that no step has followed ``synchronize()``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from hvd_qsgd.feedback import Feedback
from hvd_qsgd.torch.callsite import CallSite


def not_applied(optimizer: Any) -> bool:
    """Whether the optimizer has not stepped since its gradients were synchronized last."""
    return optimizer is not None and bool(optimizer._synchronized)


class Discards:
    """Tells gradients that were dropped from gradients to which the next backward pass adds.

    A program may add up several synchronized gradients before it steps. Then each of them is applied in the end.
    Only the moment before the backward pass tells: what is dropped is None or zero by then.
    """

    def __init__(self) -> None:
        #: Keys of the tensors whose next gradient is of interest.
        self._watched: set[str] = set()
        self._hooked: set[str] = set()

    def watch(self, site: CallSite, key: str, feedback: Feedback) -> None:
        """Look at the gradient of a parameter when the next one comes."""
        parameter = site.parameter
        self._watched.add(key)
        if key in self._hooked or not parameter.requires_grad:
            return
        self._hooked.add(key)
        optimizer, of_parameter = weakref.ref(site.optimizer), weakref.ref(parameter)

        def before_accumulation(_: torch.Tensor) -> None:
            if key not in self._watched:
                return
            self._watched.discard(key)
            gradient = getattr(of_parameter(), "grad", None)
            if not_applied(optimizer()) and gradient is not None and bool(gradient.any()):
                feedback.settle(key, applied=True)

        parameter.register_hook(before_accumulation)
