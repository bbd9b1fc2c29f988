"""What only a GPU can show. None of it has been run on one yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
from launch import ROOT, launch

from hvd_qsgd import QSGD, Codec, EliasQSGD, RowTopK, ThresholdTopK, TopK
from hvd_qsgd.codecs.readback import Looks
from hvd_qsgd.kernels import kernels_for

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BACKENDS = ["triton", "torch"]
T = TypeVar("T")


@pytest.fixture
def _the_host_must_not_wait() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", [QSGD(), QSGD(7, 4096), QSGD(norm="l2"), TopK(0.1)], ids=str)
def test_bytes_are_those_of_numpy(codec: Codec, backend: str) -> None:
    from hvd_qsgd.kernels.triton.probe import differs, hard_buckets

    x = np.resize(hard_buckets(512), 2**20 + 77)
    x = np.nan_to_num(x) if isinstance(codec, TopK) else x
    assert differs(codec, kernels_for(codec, backend), x, torch.device("cuda")) == ""


@needs_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("_the_host_must_not_wait")
def test_no_kernel_makes_the_host_wait(backend: str, dtype: str) -> None:
    codec, length = QSGD(), 2**20 + 77
    kernels = kernels_for(codec, backend)
    x = torch.randn(length, device="cuda", dtype=getattr(torch, dtype))
    size = codec.payload_size(length)
    message = torch.zeros(2 * size, dtype=torch.uint8, device="cuda")
    agreed = torch.zeros(codec.agreement_length(length), dtype=torch.int32, device="cuda")
    lanes = torch.zeros(codec.lanes_length(length, 2), dtype=torch.int32, device="cuda")
    for mode in ("default", "error"):  # what is compiled first may wait
        torch.cuda.set_sync_debug_mode(mode)
        kernels.encode_into(x, message[:size])
        kernels.decode_into(message[:size], x, "add")
        kernels.average_into(message, [(0, size), (0, size)], x)
        kernels.agree_into(x, agreed)
        kernels.to_lanes(x, agreed, 2, lanes)
        kernels.from_lanes(lanes, agreed, 2, x, 2)


@needs_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "codec", [TopK(0.01), TopK(0.9, values="float16"), ThresholdTopK(), RowTopK(), EliasQSGD()], ids=str
)
@pytest.mark.usefixtures("_the_host_must_not_wait")
def test_the_host_waits_for_nothing_but_its_looks(codec: Codec, backend: str) -> None:
    length = 2**20 + 77
    kernels = kernels_for(codec, backend)
    x = torch.randn(length, device="cuda")
    message = torch.zeros(2 * codec.payload_size(length), dtype=torch.uint8, device="cuda")

    def prepared(looks: Looks[T], mode: str) -> T:
        seen: Any = None
        while True:
            torch.cuda.set_sync_debug_mode(mode)
            try:
                asked = looks.send(seen)
            except StopIteration as stop:
                return stop.value
            torch.cuda.set_sync_debug_mode("default")
            seen = [array.cpu().numpy() for array in asked]

    for mode in ("default", "error"):  # what is compiled first may wait
        size = prepared(kernels.prepare_encode(x, keep_error=True), mode)(message)
        message[size : 2 * size] = message[:size].clone()
        prepared(kernels.prepare_average(message, [(0, size), (size, 2 * size)], length), mode)(x)


@pytest.mark.parametrize("early", ["0", "1"] if torch.cuda.device_count() > 1 else ["0"])
def test_exchanges_between_gpus_end_in_the_bits_of_the_cpu(early: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does training; where there are not two GPUs, the same program shows on the CPU that it can be run."""
    monkeypatch.setenv("HOROVOD_ENABLE_ASYNC_COMPLETION", early)
    ranks = torch.cuda.device_count()
    if ranks < 2:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        ranks = 2
    outcome = launch([str(ROOT / "tests" / "horovod_torch" / "on_gpus.py")], ranks)
    assert outcome.status == 0, outcome.output
    assert outcome.output.count("SAME BITS") == ranks
