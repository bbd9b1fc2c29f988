"""For tests that ``tests/test_kernels_triton.py`` starts in a process of their own."""

from __future__ import annotations

import os

# Triton decides when it is imported whether it compiles kernels or interprets them with NumPy.
os.environ["TRITON_INTERPRET"] = "1"
