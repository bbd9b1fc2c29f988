"""Floating-point arithmetic as NumPy specifies it, inside of TensorFlow's threads.

TensorFlow makes the processor take subnormal numbers for zero in its threads; there, codecs
would make other bytes than everywhere else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")

#: The functions of C's fenv.h. The global interpreter lock is kept during these short calls.
_LIBM = ctypes.PyDLL(None)
#: FE_DFL_ENV of glibc and musl.
_DEFAULT = ctypes.c_void_p(-1)
#: At least sizeof(fenv_t), which is 32 on x86-64 and 8 on AArch64.
_SIZE = 64


def with_subnormals(function: Callable[P, R]) -> Callable[P, R]:
    """The function in C's default floating-point environment; the thread's own one returns afterwards."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        own = ctypes.create_string_buffer(_SIZE)
        _LIBM.fegetenv(own)
        _LIBM.fesetenv(_DEFAULT)
        try:
            return function(*args, **kwargs)
        finally:
            _LIBM.fesetenv(own)

    return wrapped
