"""How fast codecs and exchanges are here: ``hvd-qsgd bench``."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_qsgd.codecs import Cast, Codec, EliasQSGD, RowTopK, Sign
from hvd_qsgd.commands.estimate import CODECS
from hvd_qsgd.commands.job import check_launched
from hvd_qsgd.exchanges.base import ring_bytes
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.tuning.cost import PROBE_ELEMENTS, measure_codec, median_time

BENCHED: dict[str, Codec] = {
    **CODECS,
    "QSGD, 4 bits, entropy coded": EliasQSGD(),
    "Sign": Sign(),
    "TopK, 1 % of each row": RowTopK(0.01),
    "bfloat16": Cast("bfloat16"),
}


@dataclass(frozen=True)
class CodecSpeed:
    """Bytes of float32 that a thread encodes and decodes a second, and how many times smaller payloads are."""

    codec: str
    ratio: float
    encode: float
    decode: float


@dataclass(frozen=True)
class ExchangeTime:
    """Seconds of an allreduce (median of the slowest rank), and bytes that rank 0 sent if collectives run as rings."""

    method: str
    seconds: float
    sent: float


def codec_speeds() -> list[CodecSpeed]:
    """A memcpy and the codecs, on normally distributed numbers; the medians of a few calls on 4 MiB."""
    x = np.random.default_rng(0).standard_normal(PROBE_ELEMENTS).astype(np.float32)
    out = np.empty_like(x)
    copied = x.nbytes / median_time(lambda: np.copyto(out, x), out)
    speeds = [CodecSpeed("memcpy", 1.0, copied, copied)]
    for name, codec in BENCHED.items():
        kernels = kernels_for(codec, "numba")
        encode, decode, _ = measure_codec(kernels, np.empty)
        payload = np.empty(codec.payload_size(x.size), np.uint8)
        speeds.append(CodecSpeed(name, x.nbytes / kernels.encode_into(x, payload), 4 / encode, 4 / decode))
    return speeds


def exchange_times(elements: int, repeats: int) -> tuple[int, list[ExchangeTime]]:
    """This process's rank, and times of plain Horovod, of half precision and of compressors; call it on all ranks.

    Raises:
        SetupError: this process was not started by a launcher, or torch is missing.
    """
    check_launched("hvd-qsgd bench --exchange")
    import horovod.torch as hvd
    import torch

    from hvd_qsgd.torch import Compressor, QSGDCompressor, TopKCompressor

    hvd.init()
    x = torch.randn(1, elements, generator=torch.Generator().manual_seed(hvd.rank()))
    methods: dict[str, Any] = {
        "Horovod, uncompressed": hvd.Compression.none,
        "hvd.Compression.fp16": hvd.Compression.fp16,
        "QSGD, 8 bits": QSGDCompressor(8, min_elements=0),
        "QSGD, 4 bits": QSGDCompressor(min_elements=0),
        'QSGD, 4 bits, exchange="allreduce"': QSGDCompressor(exchange="allreduce", min_elements=0),
        "TopK, 1 %": TopKCompressor(min_elements=0),
    }
    times = []
    for method, compression in methods.items():
        seconds = []
        for _ in range(repeats + 1):
            hvd.barrier()
            begin = time.perf_counter()
            hvd.allreduce(x, name=f"bench.{method}", compression=compression)
            seconds.append(time.perf_counter() - begin)
        slowest = float(hvd.allreduce(torch.tensor(statistics.median(seconds[1:])), name="slowest", op=hvd.Max))
        if isinstance(compression, Compressor):
            sent = compression.stats().wire_bytes / (repeats + 1)
        else:
            sent = ring_bytes(elements * (2 if compression is hvd.Compression.fp16 else 4), hvd.size())
        times.append(ExchangeTime(method, slowest, sent))
    return hvd.rank(), times
