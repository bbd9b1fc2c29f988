"""Whether Triton can be relied on for a device: asked once, by what it makes there."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import numpy as np
import torch

from hvd_qsgd.codecs.qsgd import QSGD

NOT_INSTALLED = "Triton is not installed"


@functools.cache
def fault_on(device: torch.device) -> str:
    """Why the Triton kernels cannot be used on a device, or "" if they can.

    Buckets that are hard to get right are encoded and decoded there and compared with the
    specification. Triton needs a driver, a GPU that it knows and a C compiler; what is amiss
    shows when the first kernel is compiled.
    """
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    try:
        from hvd_qsgd.kernels.triton.qsgd import QSGDKernels

        codec = QSGD()
        kernels, x = QSGDKernels(codec), hard_buckets(codec.bucket_size)
        source = torch.from_numpy(x).to(device)
        payload = torch.empty(codec.payload_size(len(x)), dtype=torch.uint8, device=device)
        kernels.encode_into(source, payload, key=0x0123456789ABCDEF)
        decoded = torch.empty_like(source)
        kernels.decode_into(payload, decoded)
    except Exception as error:  # whatever a compiler, a driver or a device may raise
        return f"Triton fails there ({type(error).__name__}: {error})"
    expected = codec.encode(x, key=0x0123456789ABCDEF)
    same = np.array_equal(payload.cpu().numpy(), expected)
    same &= np.array_equal(decoded.cpu().numpy(), codec.decode(expected, x.shape), equal_nan=True)
    return "" if same else "Triton makes other bytes there than the specification"


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the Triton kernels serve a device; warns if they are here and cannot be used."""
    fault = fault_on(device)
    if fault not in ("", NOT_INSTALLED):
        warnings.warn(f"{fault}: gradients on {device} are encoded by torch operations, which is slower.", stacklevel=2)
    return not fault


def hard_buckets(bucket: int) -> np.ndarray:
    """Buckets that a careless compiler rounds otherwise: all magnitudes, ties, subnormals, zeros, NaN; and a tail."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(8 * bucket + bucket // 2).astype(np.float32)
    x[:bucket] *= np.float32(2.0**-135)
    x[bucket : 2 * bucket] = rng.integers(-14, 15, bucket) / 2
    x[2 * bucket : 3 * bucket] = 0
    x[3 * bucket] = np.nan
    x[4 * bucket : 5 * bucket] = np.ldexp(x[4 * bucket : 5 * bucket], rng.integers(-140, 120, bucket))
    return x
