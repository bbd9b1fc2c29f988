"""What ``torch.compile`` has to leave alone where it compiles a training step, or ``optimizer.step``.

It would trace what the bytes and numbers of one step were, and repeat that in the next. And it runs what it has traced
from code of its own, where :mod:`hvd_qsgd.torch.callsite` could not find Horovod's functions and their variables.
What comes before and after is compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

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
