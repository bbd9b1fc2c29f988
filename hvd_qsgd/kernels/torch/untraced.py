"""What ``torch.compile`` has to leave alone where it compiles a training step, or ``optimizer.step``.

It would trace what the bytes and numbers of one step were, and repeat that in the next. And it runs what it has traced
from code of its own, where :mod:`hvd_qsgd.torch.callsite` could not find Horovod's functions and their variables.
What comes before and after is compiled.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch._dynamo

F = TypeVar("F", bound=Callable[..., Any])

#: Whose functions are not compiled; those of others that they call may be.
PACKAGES = ("horovod", "hvd_qsgd")
#: Where torch keeps which files it does not trace: since 2.3, and before.
RULES = ("torch._dynamo.trace_rules", "torch._dynamo.skipfiles")


def untraced(function: F) -> F:
    """The function, of which nothing is compiled, nor of what it calls."""
    undisturbed: F = torch._dynamo.disable(function)
    return undisturbed


def out_of_inference(function: F) -> F:
    """The function, run outside of ``torch.inference_mode()``, with gradients switched off as they are in it.

    What a compressor keeps is changed in later steps, and Horovod resizes it in its thread. The mode forbids both for
    tensors that are made in it.
    """

    @functools.wraps(function)
    def outside(*arguments: Any, **settings: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **settings)
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments, **settings)

    return cast(F, outside)


def _leave_packages_untraced() -> None:
    for name in RULES:
        try:
            add = importlib.import_module(name).add
        except (ImportError, AttributeError):
            continue
        for package in PACKAGES:
            add(package)
        return


_leave_packages_untraced()
