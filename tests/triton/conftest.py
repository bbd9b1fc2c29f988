"""For tests that ``tests/test_kernels_triton.py`` starts in processes of their own: how the kernels run there.

``KERNELS_RUN_ON`` is "interpreter", Triton's own, which runs a kernel's source; or a GPU, for which the compiler makes
code, and ``tools/ptx_machine.py`` runs it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "tools"), str(Path(__file__).parents[1])]

TARGET = os.environ.setdefault("KERNELS_RUN_ON", "interpreter")
if TARGET == "interpreter":
    # Triton decides when it is imported whether it compiles kernels or interprets them with NumPy.
    os.environ["TRITON_INTERPRET"] = "1"
    collect_ignore = ["test_ptx_machine.py"]
else:
    import compile_gpu_kernels
    import ptx_machine

    from hvd_qsgd.kernels.triton import qsgd, topk

    compile_gpu_kernels.pretend(TARGET)
    qsgd.launch = topk.launch = ptx_machine.launch
