"""Triton kernels, interpreted on the CPU, give the bytes of the NumPy code and touch nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkers import (
    FILLER,
    check_halves,
    check_kernels,
    check_lanes,
    check_same_bits,
    float32_arrays,
    gauss,
    hard_arrays,
    qsgd_codecs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qsgd import QSGD, Codec, ConfigError, PayloadError, Rows, Scaled, Sign, TopK
from hvd_qsgd.codecs.bits import plane_widths
from hvd_qsgd.kernels import kernels_for, kernels_of
from hvd_qsgd.kernels.triton import probe, qsgd, topk
from hvd_qsgd.kernels.triton.launch import launch
from hvd_qsgd.kernels.triton.qsgd import Group, QSGDKernels

KEY = 0x0123456789ABCDEF
CODECS = [
    *(QSGD(bits, 32) for bits in range(2, 9)),
    QSGD(4, 32, "l2"),
    QSGD(5, 72, "l2", "nearest"),
    QSGD(7, 24, rounding="nearest"),
    QSGD(3, 8),
]


def hard_buckets(bucket: int) -> np.ndarray:
    """Everything that is hard, as whole buckets end to end, and a tail: one launch for all."""
    arrays = [np.resize(x, -(-len(x) // bucket) * bucket) for x in hard_arrays(bucket).values() if len(x)]
    return np.concatenate([*arrays, gauss(bucket // 2 + 1)])


@pytest.mark.parametrize("codec", [QSGD(), QSGD(6, 1000), QSGD(2, 8192), QSGD(3, 1024, "l2")], ids=str)
def test_long_buckets_are_those_of_numpy(codec: QSGD) -> None:
    """Where a bucket takes many tiles, or none of its parts is a power of two."""
    x = np.resize(probe.hard_buckets(codec.bucket_size), 3 * codec.bucket_size + 77)
    check_kernels(codec, kernels_for(codec, "triton"), x, KEY, 0, torch.from_numpy)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_and_values_are_those_of_numpy(codec: QSGD) -> None:
    x = hard_buckets(codec.bucket_size)
    check_kernels(codec, kernels_for(codec, "triton"), x, KEY, codec.granularity * (2**23 + 7), torch.from_numpy)


@pytest.mark.parametrize(
    ("codec", "ranks"), [(QSGD(4, 32), 4), (QSGD(2, 32), 1), (QSGD(8, 32), 1000), (QSGD(5, 24, "l2"), 3)], ids=str
)
def test_lanes_are_those_of_numpy(codec: QSGD, ranks: int) -> None:
    check_lanes(
        codec, kernels_for(codec, "triton"), hard_buckets(codec.bucket_size), ranks, 2**64 - 1, torch.from_numpy
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("codec", [QSGD(4, 32), QSGD(5, 72, "l2"), QSGD(7, 24, rounding="nearest")], ids=str)
def test_half_precision_is_taken_as_it_is(codec: QSGD, dtype: str) -> None:
    check_halves(codec, kernels_for(codec, "triton"), probe.hard_buckets(codec.bucket_size), dtype, KEY)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 17, 100])
def test_tails_are_those_of_numpy(length: int) -> None:
    for codec in (QSGD(bits=2 + length % 7), QSGD(bits=7, bucket_size=8)):
        check_kernels(codec, kernels_for(codec, "triton"), gauss(length), length, 0, torch.from_numpy)


@settings(max_examples=6)
@given(codec=qsgd_codecs(), x=float32_arrays(), key=st.integers(0, 2**64 - 1), bucket=st.integers(0, 2**28))
def test_bytes_of_any_input_are_those_of_numpy(codec: QSGD, x: np.ndarray, key: int, bucket: int) -> None:
    check_kernels(codec, kernels_for(codec, "triton"), x, key, bucket * codec.granularity, torch.from_numpy)


@settings(max_examples=6)
@given(codec=qsgd_codecs(), x=float32_arrays(), ranks=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_lanes_of_any_input_are_those_of_numpy(codec: QSGD, x: np.ndarray, ranks: int, key: int) -> None:
    check_lanes(codec, kernels_for(codec, "triton"), x, ranks, key, torch.from_numpy)


@settings(max_examples=6)
@given(codec=qsgd_codecs(), length=st.integers(1, 100), seed=st.integers(0, 99))
def test_any_bytes_decode_to_the_values_of_numpy(codec: QSGD, length: int, seed: int) -> None:
    payload = np.random.default_rng(seed).integers(0, 256, codec.payload_size(length), np.uint8)
    expected, made = (np.ones(length, np.float32) for _ in range(2))
    for mode in ("add", "subtract", "set"):
        with np.errstate(over="ignore", invalid="ignore"):
            codec.decode_into(payload, expected, mode)
        kernels_for(codec, "triton").decode_into(torch.from_numpy(payload), torch.from_numpy(made), mode)
        check_same_bits(made, expected)


def test_payloads_at_uneven_distances_are_averaged() -> None:
    codec, x = QSGD(), gauss(700)
    payload = codec.encode(x)
    size = len(payload)
    message = np.full(3 * size + 20, FILLER, np.uint8)
    spans = [(start, start + size) for start in (0, size + 1, 2 * size + 20)]
    for start, stop in spans:
        message[start:stop] = payload
    expected, made = np.empty(700, np.float32), np.empty(700, np.float32)
    codec.average_into(message, spans, expected)
    kernels_for(codec, "triton").average_into(torch.from_numpy(message), spans, torch.from_numpy(made))
    check_same_bits(made, expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_are_moved_in_fours_only_where_every_plane_allows_it(bits: int) -> None:
    """The compiler is told so, and would otherwise move bytes at addresses that no GPU allows."""
    payload = torch.zeros(8, dtype=torch.uint8)
    found = set()
    for m in range(1, 30):
        codec = QSGD(bits, 8 * m)
        told = QSGDKernels(codec)._aligned(Group(0, 1, 8 * m, 8 * m, 0), payload, payload[4:], 12)
        starts = np.cumsum([8 * m * width // 8 for width in plane_widths(bits)])
        assert told == (starts % 4 == 0).all()
        found.add(told)
    assert found == ({True} if bits in (4, 8) else {True, False})
    kernels, group = QSGDKernels(QSGD()), Group(0, 1, 512, 512, 0)
    assert not kernels._aligned(group, payload[1:], payload)
    assert not kernels._aligned(group, payload, payload[2:])
    assert not kernels._aligned(group, payload, payload, 6)
    assert not kernels._aligned(Group(1, 1, 100, 0, 100), payload, payload)


@pytest.mark.parametrize("codec", [TopK(), TopK(k=1), TopK(ratio=0.3), TopK(ratio=1)], ids=str)
def test_topk_selects_what_numpy_selects(codec: TopK) -> None:
    arrays = {**hard_arrays(), "many": gauss(9000), "few values": np.round(gauss(9000)), "equal": np.ones(5000)}
    kernels = kernels_for(codec, "triton")
    assert type(kernels).__module__ == "hvd_qsgd.kernels.triton.topk"
    for x in arrays.values():
        x = np.ascontiguousarray(x, np.float32)
        expected = codec.encode(x)
        made = torch.full((codec.payload_size(len(x)),), FILLER, dtype=torch.uint8)
        used = kernels.encode_into(torch.from_numpy(x), made)
        check_same_bits(made[:used].numpy(), expected)


@pytest.mark.parametrize(
    "codec", [Scaled(QSGD(norm="l2")), Rows(QSGD(bucket_size=64), 200), Sign(), TopK(0.1)], ids=str
)
def test_other_codecs_are_served_too(codec: Codec) -> None:
    check_kernels(codec, kernels_for(codec, "triton"), gauss(600), KEY, 0, torch.from_numpy)


def test_misuse_is_refused_as_elsewhere() -> None:
    codec, kernels = QSGD(), kernels_for(QSGD(), "triton")
    x = gauss(1000)
    payload = codec.encode(x)
    for wrong in (payload[:-1], np.append(payload, np.uint8(0)), payload[:0]):
        with pytest.raises(PayloadError, match="bytes, but"):
            kernels.decode_into(torch.from_numpy(wrong.copy()), torch.from_numpy(x))
    with pytest.raises(ConfigError, match="mode='plus' is not one of"):
        kernels.decode_into(torch.from_numpy(payload), torch.from_numpy(x), "plus")
    memory = np.full(1000, FILLER, np.uint8)
    with pytest.raises(PayloadError, match="does not fit"):
        kernels.encode_into(torch.from_numpy(x), torch.from_numpy(memory[:100]))
    assert set(memory) == {FILLER}


# -- the proof before first use -------------------------------------------------------------------


@pytest.fixture
def _forgetful() -> Any:
    yield
    probe.fault_on.cache_clear()
    probe.works_on.cache_clear()


@pytest.mark.usefixtures("_forgetful")
def test_kernels_that_prove_themselves_are_used() -> None:
    assert probe.fault_on(torch.device("cpu")) == ""
    assert probe.works_on(torch.device("cpu"))


@pytest.mark.usefixtures("_forgetful")
@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("payload", "the payload of QSGD"),
        ("lanes", "making lanes of QSGD"),
        ("topk", "the payload of TopK"),
        ("error", "RuntimeError: no compiler"),
    ],
)
def test_kernels_that_fail_are_not_used_and_it_is_said(wrong: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = qsgd.launch

    def careless(kernel: Any, grid: Any, tensors: Any, *numbers: Any, **constants: Any) -> None:
        if wrong == "error":
            raise RuntimeError("no compiler")
        original(kernel, grid, tensors, *numbers, **constants)
        if kernel is {"payload": qsgd.encode_buckets, "lanes": qsgd.to_lanes, "topk": topk.write_chosen}[wrong]:
            tensors[-1][0] ^= 1

    monkeypatch.setattr(qsgd, "launch", careless)
    monkeypatch.setattr(topk, "launch", careless)
    monkeypatch.setattr(probe, "hard_buckets", lambda bucket: gauss(bucket + 9))
    with pytest.warns(UserWarning, match=f"{fault}.*encoded by torch operations"):
        assert not probe.works_on(torch.device("cpu"))


# -- where kernels run ----------------------------------------------------------------------------


@pytest.mark.parametrize(("works", "backend"), [(True, "triton"), (False, "torch")])
def test_a_gpu_is_served_by_triton_where_that_works(works: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "works_on", lambda device: works)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 1))
    assert kernels_of(QSGD(), on_gpu) is kernels_for(QSGD(), backend)
    assert kernels_of(QSGD(), torch.ones(1)) is kernels_for(QSGD(), "torch")


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself takes the current device and its current stream."""
    events: list[Any] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        events.append(("enter", device))
        yield
        events.append("exit")

    monkeypatch.setattr(torch.cuda, "device", current)
    device = torch.device("cuda", 1)
    kernel = {(3,): lambda *arguments, **options: events.append(options["enable_fp_fusion"])}
    launch(kernel, (3,), (SimpleNamespace(device=device),), 7)  # type: ignore[arg-type]
    assert events == [("enter", device), False, "exit"]
