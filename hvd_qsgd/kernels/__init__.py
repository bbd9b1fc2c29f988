"""Kernels: the same functions as the codecs' NumPy code, faster or on another device.

Each module below offers the codec's kernels class for one backend and must produce the same
bytes; ``tests/test_kernels.py`` runs the same checker on all of them. Those of other packages come from entry points
in the group ``hvd_qsgd.kernels``, named like "numba.qsgd", or from :func:`register`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, TypeVar

import numpy as np

from hvd_qsgd.codecs.base import Codec, Kernels
from hvd_qsgd.codecs.exchanged import ExchangedCodec, ExchangedKernels
from hvd_qsgd.codecs.rows import Rows, RowsKernels
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.plugins import Registry, class_fault

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
AnyKernels = TypeVar("AnyKernels", bound="type[Kernels]")


def _fault(name: Any, kernels: Any) -> str:
    backend, _, codec = str(name).partition(".")
    if not backend or not codec or backend == "numpy":
        return 'the name must be a backend other than "numpy", a dot, and the name of a codec, as "numba.qsgd"'
    return class_fault(Kernels, kernels)


#: Kernels of others, by "backend.codec".
ADDED: Registry[type[Kernels]] = Registry(
    "hvd_qsgd.kernels",
    "kernels class",
    _fault,
    {},
    taken=[f"{backend}.{codec}" for backend, codecs in KERNELS.items() for codec in codecs],
)


def register(backend: str, codec: str, kernels: AnyKernels) -> AnyKernels:
    """Let a class of yours make the kernels of a codec on a backend: it is called with the codec.

    Args:
        backend: see :func:`kernels_for`; or one of yours, which your arrays name by their attribute ``backend``.
        codec: the name of the codec.
        kernels: a class that derives from :class:`hvd_qsgd.codecs.Kernels`.

    Raises:
        ConfigError: there are others already, or it does not derive from ``Kernels``.
    """
    ADDED.register(f"{backend}.{codec}", kernels)
    return kernels


@functools.cache
def kernels_for(codec: Codec, backend: str) -> Kernels:
    """The kernels of a codec on a backend: "numpy", "numba" (CPU), "torch" (any torch device), "triton" (CUDA)
    or "tensorflow" (compiled by XLA, for any device of TensorFlow).

    Raises:
        ConfigError: no such backend, or it has no kernels for this codec.
    """
    if backend not in KERNELS and backend not in (added := {name.partition(".")[0] for name in ADDED}):
        raise ConfigError(f"Unknown backend {backend!r}; known are {', '.join({**KERNELS, **dict.fromkeys(added)})}.")
    name = f"rows of {codec.inner.name}" if isinstance(codec, Rows) else codec.name
    kernels = _class_of(backend, name)
    if kernels is None:
        if isinstance(codec, Rows):
            return RowsKernels(codec, kernels_for(codec.inner, backend))
        if backend == "numpy":
            return codec
        if isinstance(codec, ExchangedCodec):
            return ExchangedKernels(codec)
        if backend in STAND_INS:
            return kernels_for(codec, STAND_INS[backend])
        raise ConfigError(f"The codec {codec.name!r} has no {backend} kernels; it runs on the CPU only.")
    return kernels(codec)


ADDED.changed.append(kernels_for.cache_clear)


def _class_of(backend: str, codec: str) -> Any:
    """The class of kernels for the name of a codec, or None."""
    entry = KERNELS.get(backend, {}).get(codec)
    if entry is None:
        # A codec is its own NumPy kernels.
        return None if backend == "numpy" else ADDED.get(f"{backend}.{codec}")
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


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
