"""Whether Triton can be relied on for a device: asked once, by what it makes there."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import numpy as np
import torch

from hvd_qsgd.codecs.base import MODES, Codec
from hvd_qsgd.codecs.qsgd import QSGD
from hvd_qsgd.codecs.topk import TopK
from hvd_qsgd.kernels import kernels_for

NOT_INSTALLED = "Triton is not installed"


@functools.cache
def fault_on(device: torch.device) -> str:
    """Why the Triton kernels cannot be used on a device, or "" if they can.

    Values that are hard to get right are encoded, decoded and put into lanes there, and compared
    with the specification. Triton needs a driver, a GPU that it knows and a C compiler; what is
    amiss shows when the first kernel is compiled.
    """
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    x = hard_buckets(QSGD().bucket_size)
    try:
        for codec, values in ((QSGD(), x), (TopK(0.1), np.nan_to_num(x))):
            what = differs(codec, kernels_for(codec, "triton"), values, device)
            if what:
                return f"Triton makes other bits there than the specification ({what} of {codec})"
    except Exception as error:  # whatever a compiler, a driver or a device may raise
        return f"Triton fails there ({type(error).__name__}: {error})"
    return ""


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the Triton kernels serve a device; warns if they are here and cannot be used."""
    fault = fault_on(device)
    if fault not in ("", NOT_INSTALLED):
        warnings.warn(f"{fault}: gradients on {device} are encoded by torch operations, which is slower.", stacklevel=2)
    return not fault


def differs(codec: Codec, kernels: Any, x: np.ndarray, device: torch.device) -> str:
    """Which of the things that a codec does gives other bits on a device than in the specification; "" if none."""
    key, ranks = 0x0123456789ABCDEF, 4
    source = torch.from_numpy(x).to(device)
    pairs: dict[str, tuple[np.ndarray, torch.Tensor]] = {}

    def empty(length: int, dtype: str) -> tuple[np.ndarray, torch.Tensor]:
        return np.empty(length, dtype), torch.empty(length, dtype=getattr(torch, dtype), device=device)

    # The largest numbers may add up to infinity.
    with np.errstate(over="ignore", invalid="ignore"):
        payload, made = empty(codec.payload_size(len(x)), "uint8")
        sizes = codec.encode_into(x, payload, key), kernels.encode_into(source, made, key)
        payload, made = pairs["the payload"] = payload[: sizes[0]], made[: sizes[1]]
        for mode in MODES:
            expected, decoded = pairs[f"decoding to {mode}"] = x.copy(), source.clone()
            codec.decode_into(payload, expected, mode)
            kernels.decode_into(made, decoded, mode)
        message, spans = (
            np.tile(payload, ranks),
            [(rank * len(payload), (rank + 1) * len(payload)) for rank in range(ranks)],
        )
        expected, decoded = pairs["the average"] = empty(len(x), "float32")
        codec.average_into(message, spans, expected)
        kernels.average_into(torch.from_numpy(message).to(device), spans, decoded)
        if isinstance(codec, QSGD):
            scales = pairs["agreeing"] = empty(codec.agreement_length(len(x)), "int32")
            words = pairs["making lanes"] = empty(codec.lanes_length(len(x), ranks), "int32")
            means = pairs["reading lanes"] = empty(len(x), "float32")
            for number, (implementation, array) in enumerate(((codec, x), (kernels, source))):
                implementation.agree_into(array, scales[number])
                implementation.to_lanes(array, scales[number], ranks, words[number], key)
                implementation.from_lanes(words[number], scales[number], ranks, means[number], ranks)
        if kernels.halves:
            for dtype in (torch.float16, torch.bfloat16):
                halves = torch.from_numpy(x).to(dtype)
                payload, made = pairs[f"the payload of {dtype}"] = empty(codec.payload_size(len(x)), "uint8")
                codec.encode_into(halves.to(torch.float32).numpy(), payload, key)
                kernels.encode_into(halves.to(device), made, key)
                expected = np.empty_like(x)
                codec.decode_into(payload, expected)
                decoded = torch.empty_like(halves, device=device)
                kernels.decode_into(made, decoded)
                rounded = torch.from_numpy(expected).to(dtype).to(torch.float32).numpy()
                pairs[f"decoding to {dtype}"] = rounded, decoded.to(torch.float32)
    for what, (specified, found) in pairs.items():
        if not np.array_equal(found.cpu().numpy(), specified, equal_nan=specified.dtype.kind == "f"):
            return what
    return ""


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
