"""Kernels: the same functions as the codecs' NumPy code, faster or on another device.

Each module below offers the codec's kernels class for one backend and must produce the same
bytes; ``tests/test_kernels.py`` runs the same checker on all of them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.codecs.rows import Rows, RowsKernels
from hvd_qsgd.errors import ConfigError

#: backend -> codec name -> "module:class". A codec without an entry for a backend over NumPy
#: arrays runs its NumPy code there.
KERNELS: dict[str, dict[str, str]] = {
    "numpy": {},
    "numba": {
        "cast": "hvd_qsgd.kernels.numba.cast:CastKernels",
        "minmax": "hvd_qsgd.kernels.numba.minmax:MinMaxKernels",
        "qsgd": "hvd_qsgd.kernels.numba.qsgd:QSGDKernels",
        "rows of topk": "hvd_qsgd.kernels.numba.rows_topk:RowsTopKKernels",
        "topk": "hvd_qsgd.kernels.numba.topk:TopKKernels",
        "topk_global": "hvd_qsgd.kernels.numba.topk:TopKKernels",
        "topk_rows": "hvd_qsgd.kernels.numba.topk_rows:RowTopKKernels",
        "topk_threshold": "hvd_qsgd.kernels.numba.topk_threshold:ThresholdKernels",
        "sign": "hvd_qsgd.kernels.numba.sign:SignKernels",
        "qsgd_elias": "hvd_qsgd.kernels.numba.elias:EliasKernels",
        "scaled": "hvd_qsgd.kernels.scaled:NumbaKernels",
    },
    "torch": {
        "minmax": "hvd_qsgd.kernels.torch.minmax:MinMaxKernels",
        "qsgd": "hvd_qsgd.kernels.torch.qsgd:QSGDKernels",
        "topk": "hvd_qsgd.kernels.torch.topk:TopKKernels",
        "identity": "hvd_qsgd.kernels.torch.plain:IdentityKernels",
        "cast": "hvd_qsgd.kernels.torch.plain:CastKernels",
        "topk_global": "hvd_qsgd.kernels.torch.topk:TopKKernels",
        "topk_rows": "hvd_qsgd.kernels.torch.topk_rows:RowTopKKernels",
        "topk_threshold": "hvd_qsgd.kernels.torch.topk_threshold:ThresholdKernels",
        "qsgd_elias": "hvd_qsgd.kernels.torch.on_host:HostKernels",
        "random_k": "hvd_qsgd.kernels.torch.random_k:RandomKKernels",
        "sign": "hvd_qsgd.kernels.torch.sign:SignKernels",
        "scaled": "hvd_qsgd.kernels.scaled:TorchKernels",
        "powersgd": "hvd_qsgd.codecs.exchanged:ExchangedKernels",
        "intsgd": "hvd_qsgd.codecs.exchanged:ExchangedKernels",
    },
    "tensorflow": {
        "qsgd": "hvd_qsgd.kernels.tensorflow.qsgd:QSGDKernels",
        "topk": "hvd_qsgd.kernels.tensorflow.topk:TopKKernels",
        "identity": "hvd_qsgd.kernels.tensorflow.plain:IdentityKernels",
        "cast": "hvd_qsgd.kernels.tensorflow.plain:CastKernels",
    },
    "triton": {
        "qsgd": "hvd_qsgd.kernels.triton.qsgd:QSGDKernels",
        "topk": "hvd_qsgd.kernels.triton.topk:TopKKernels",
        "topk_global": "hvd_qsgd.kernels.triton.topk:TopKKernels",
        "scaled": "hvd_qsgd.kernels.scaled:TritonKernels",
    },
}
#: Whose kernels stand in where a backend has none of its own for a codec: they take the same arrays.
STAND_INS = {"numba": "numpy", "triton": "torch"}


@functools.cache
def kernels_for(codec: Codec, backend: str) -> Kernels:
    """The kernels of a codec on a backend: "numpy", "numba" (CPU), "torch" (any torch device), "triton" (CUDA)
    or "tensorflow" (compiled by XLA, for any device of TensorFlow).

    Raises:
        ConfigError: no such backend, or it has no kernels for this codec.
    """
    if backend not in KERNELS:
        raise ConfigError(f"Unknown backend {backend!r}; known are {', '.join(KERNELS)}.")
    name = f"rows of {codec.inner.name}" if isinstance(codec, Rows) else codec.name
    entry = KERNELS[backend].get(name)
    if entry is None:
        if isinstance(codec, Rows):
            return RowsKernels(codec, kernels_for(codec.inner, backend))
        if backend == "numpy":
            return codec
        if backend in STAND_INS:
            return kernels_for(codec, STAND_INS[backend])
        raise ConfigError(f"The codec {codec.name!r} has no {backend} kernels; it runs on the CPU only.")
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)(codec)


def kernels_of(codec: Codec, array: Any) -> Kernels:
    """The kernels for arrays like this one: a NumPy array, a torch tensor or one that names its backend."""
    if isinstance(array, np.ndarray):
        return kernels_for(codec, "numba")
    return kernels_for(codec, getattr(array, "backend", None) or torch_backend(array.device))


def torch_backend(device: Any) -> str:
    """The backend for tensors on a torch device: Triton on a GPU if it works there, else torch operations."""
    if device.type != "cuda":
        return "torch"
    from hvd_qsgd.kernels.triton.probe import works_on

    return "triton" if works_on(device) else "torch"
