"""How kernels are compiled, and kept on disk for later runs where there is a place for them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from numba import njit


def jit(function: Callable[..., Any]) -> Any:
    """The function, compiled when it is first called; it does without Python's lock, and without checking bounds."""
    compiled = njit(nogil=True, boundscheck=False, error_model="numpy")(function)
    try:
        compiled.enable_caching()
    except RuntimeError:
        # Nobody else's directory will do, such as one in /tmp: what is kept is run.
        _warn_once()
    return compiled


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "Compiled kernels cannot be kept: neither the directory of hvd_qsgd nor this user's cache can be written to. "
        "Every process compiles them anew, which takes seconds. Set NUMBA_CACHE_DIR to a directory that can.",
        RuntimeWarning,
        stacklevel=2,
    )
