"""Every backend gives the bytes of the NumPy code, touches nothing else, and is as quiet as promised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkers import (
    FILLER,
    check_halves,
    check_kernels,
    check_lanes,
    check_same_bits,
    flip_bit,
    float32_arrays,
    gauss,
    hard_arrays,
    qsgd_codecs,
    wrapper,
)
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT

from hvd_qsgd import (
    QSGD,
    Cast,
    Codec,
    ConfigError,
    EliasQSGD,
    GlobalTopK,
    Identity,
    MinMax,
    PayloadError,
    RandomK,
    Rows,
    RowTopK,
    Scaled,
    Sign,
    ThresholdTopK,
    TopK,
)
from hvd_qsgd.codecs.topk_threshold import METHODS
from hvd_qsgd.kernels import KERNELS, kernels_for

#: Backends that must be here; the others are skipped, and the report says so.
REQUESTED = os.environ.get("HVD_QSGD_TEST_BACKENDS", "numba,torch").split(",")
BACKENDS = [
    pytest.param(backend, marks=[] if backend in REQUESTED else pytest.mark.skip(reason=f"{backend}: not requested"))
    for backend in ("numba", "torch")
]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)

HARD = hard_arrays()
KEYS = (0, 2**64 - 1, 0x0123456789ABCDEF)
CODECS: list[Codec] = [
    *(
        QSGD(bits=bits, norm=norm, rounding=rounding)
        for bits in range(2, 9)
        for norm, rounding in (("max", "stochastic"),)
    ),
    *(QSGD(bits=bits, norm="l2", rounding=rounding) for bits in (2, 5) for rounding in ("stochastic", "nearest")),
    QSGD(bits=3, bucket_size=8),
    QSGD(bits=7, bucket_size=24, rounding="nearest"),
    QSGD(bits=6, bucket_size=65536, norm="l2"),
    TopK(),
    TopK(k=1),
    TopK(ratio=1),
    TopK(ratio=0.3, values="float16"),
    TopK(k=10**6),
    *(MinMax(bits) for bits in range(2, 9)),
    Rows(TopK(0.1), 100),
    Rows(QSGD(bucket_size=64), 50),
    Rows(MinMax(3), 33),
    Identity(),
    Cast(),
    Cast("bfloat16"),
    Sign(),
    Sign(8),
    RandomK(),
    RandomK(0.3, unbiased=True),
    RandomK(1),
    RowTopK(),
    RowTopK(0.2, 24),
    RowTopK(1, 512),
    GlobalTopK(0.1),
    Scaled(QSGD(norm="l2")),
    Scaled(RandomK(0.2, unbiased=True)),
    EliasQSGD(),
    EliasQSGD(2, 65536),
    EliasQSGD(8, 64, "max", "nearest"),
    ThresholdTopK(),
    *(ThresholdTopK(0.1, method=method) for method in METHODS),
    Scaled(EliasQSGD()),
]
EACH_PAIR = pytest.mark.parametrize(
    ("backend", "codec"),
    [pytest.param(*b.values, c, marks=b.marks) for b in BACKENDS for c in CODECS],
    ids=str,
)


def some_codec() -> st.SearchStrategy[Codec]:
    topk = st.builds(TopK, ratio=st.floats(0.01, 1), values=st.sampled_from(["float32", "float16"]))
    rows = st.builds(RowTopK, ratio=st.floats(0.01, 1), row=st.integers(2, 40))
    random = st.builds(RandomK, ratio=st.floats(0.01, 1), unbiased=st.booleans())
    others = [Identity(), Cast(), Cast("bfloat16"), Sign(8), Sign(24)]
    minmax = st.builds(MinMax, st.integers(2, 8))
    plain = st.one_of(qsgd_codecs(), topk, minmax, rows, random, st.sampled_from(others))
    return st.one_of(plain, st.builds(Rows, st.one_of(qsgd_codecs(), topk, minmax), st.integers(1, 40)))


@EACH_PAIR
def test_bytes_and_values_are_those_of_numpy(backend: str, codec: Codec) -> None:
    for number, x in enumerate(HARD.values()):
        first = codec.granularity * (0, 1, 2**23 + 7)[number % 3]
        check_kernels(codec, kernels_for(codec, backend), x, KEYS[number % 3], first, wrapper(backend))


@EACH_BACKEND
@given(codec=some_codec(), x=float32_arrays(), key=st.integers(0, 2**64 - 1), bucket=st.integers(0, 2**28))
def test_bytes_and_values_are_those_of_numpy_on_any_input(
    backend: str, codec: Codec, x: np.ndarray, key: int, bucket: int
) -> None:
    check_kernels(codec, kernels_for(codec, backend), x, key, bucket * codec.granularity, wrapper(backend))


@EACH_BACKEND
@given(
    codec=st.one_of(
        st.builds(
            EliasQSGD,
            bits=st.integers(2, 8),
            bucket_size=st.sampled_from([8, 24, 64]),
            norm=st.sampled_from(["max", "l2"]),
            rounding=st.sampled_from(["stochastic", "nearest"]),
        ),
        st.builds(ThresholdTopK, ratio=st.floats(0.01, 1), method=st.sampled_from(METHODS)),
    ),
    x=float32_arrays(),
    key=st.integers(0, 2**64 - 1),
)
def test_bytes_of_varying_number_are_those_of_numpy_on_any_input(
    backend: str, codec: Codec, x: np.ndarray, key: int
) -> None:
    check_kernels(codec, kernels_for(codec, backend), x, key, 0, wrapper(backend))


@EACH_BACKEND
def test_a_large_tensor_gives_the_bytes_of_numpy(backend: str) -> None:
    x = gauss(2**20 + 10**5 + 77)
    for codec in (QSGD(), TopK(), RowTopK(), RandomK(), Sign()):
        check_kernels(codec, kernels_for(codec, backend), x, 5, 0, wrapper(backend))
    check_lanes(QSGD(), kernels_for(QSGD(), backend), x, 5, 7, wrapper(backend))


def misleading_arrays() -> dict[str, np.ndarray]:
    """Large arrays of which a sample at equal distances gives a wrong idea."""
    length = 1 << 17
    at_each = {step: np.arange(length) % step == 0 for step in (8, 9)}
    noise = gauss(length)
    return {
        "large where sampled": np.where(at_each[8], noise + 100, noise),
        "small where sampled": np.where(at_each[8], noise, noise + 100),
        "almost all zero": np.where(np.arange(length) > length - 500, noise, 0),
        "zero but where sampled": np.where(at_each[8], noise, 0),
        "a single value": np.ones(length, np.float32),
        "few values": np.round(noise),
        "descending": np.sort(noise)[::-1],
        "NaN where not sampled": np.where(np.arange(length) == 12345, np.nan, noise),
        "subnormal": noise * np.float32(2.0**-140),
    }


MISLEADING = misleading_arrays()


@pytest.mark.parametrize("name", MISLEADING)
@pytest.mark.parametrize("codec", [TopK(), TopK(k=1), TopK(ratio=0.2)], ids=str)
def test_topk_by_numba_is_not_misled(codec: Codec, name: str) -> None:
    x = np.ascontiguousarray(MISLEADING[name], np.float32)
    check_same_bits(encoded(kernels_for(codec, "numba"), x), codec.encode(x))


def encoded(kernels: Any, x: np.ndarray) -> np.ndarray:
    out = np.empty(kernels.codec.payload_size(x.size), np.uint8)
    return out[: kernels.encode_into(x, out)]


@EACH_BACKEND
@given(codec=qsgd_codecs(), length=st.integers(1, 100), seed=st.integers(0, 99))
def test_any_bytes_decode_to_the_values_of_numpy(backend: str, codec: QSGD, length: int, seed: int) -> None:
    """A QSGD payload of the right size is always one, be its codes and scales what they may."""
    payload = np.random.default_rng(seed).integers(0, 256, codec.payload_size(length), np.uint8)
    expected, made = (np.ones(length, np.float32) for _ in range(2))
    for mode in ("add", "subtract", "set"):
        with np.errstate(over="ignore", invalid="ignore"):
            codec.decode_into(payload, expected, mode)
        kernels_for(codec, backend).decode_into(wrapper(backend)(payload), wrapper(backend)(made), mode)
        check_same_bits(made, expected)


@EACH_BACKEND
@pytest.mark.parametrize(
    "codec", [QSGD(bits=bits) for bits in range(2, 9)] + [QSGD(norm="l2", rounding="nearest")], ids=str
)
def test_lanes_are_those_of_numpy(backend: str, codec: QSGD) -> None:
    for number, x in enumerate(HARD.values()):
        check_lanes(
            codec, kernels_for(codec, backend), x, (1, 2, 3, 64, 1024)[number % 5], KEYS[number % 3], wrapper(backend)
        )


@EACH_BACKEND
@given(codec=qsgd_codecs(), x=float32_arrays(), ranks=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_lanes_are_those_of_numpy_on_any_input(backend: str, codec: QSGD, x: np.ndarray, ranks: int, key: int) -> None:
    check_lanes(codec, kernels_for(codec, backend), x, ranks, key, wrapper(backend))


# -- the checkers can fail ----------------------------------------------------------------------


class FlippedBit:
    """Kernels that get one bit wrong in what one of their functions writes."""

    def __init__(self, codec: Codec, function: str, bit: int, mode: str = "") -> None:
        self.codec, self.function, self.bit, self.mode = codec, function, bit, mode

    def __getattr__(self, name: str) -> Any:
        original = getattr(self.codec, name)

        def wrong(*arguments: Any) -> Any:
            result = original(*arguments)
            out = arguments[{"average_into": 2, "to_lanes": 3, "from_lanes": 3}.get(name, 1)]
            if not self.mode or self.mode == arguments[-1]:
                out[...] = flip_bit(out, self.bit)
            return result

        return wrong if name == self.function else original


@pytest.mark.parametrize("codec", [QSGD(), TopK(), MinMax(), Rows(TopK(), 300), Identity(), Cast()], ids=str)
@pytest.mark.parametrize(
    ("function", "bit", "mode"),
    [
        ("encode_into", 0, ""),
        ("encode_into", 8 * 9 + 3, ""),
        ("encode_into", -1, ""),
        ("decode_into", 1, "set"),
        ("decode_into", 2, "add"),
        ("decode_into", 8 * 4 * 500, "subtract"),
        ("average_into", 8 * 4 * 500, ""),
    ],
)
def test_kernel_check_fails_on_one_flipped_bit(codec: Codec, function: str, bit: int, mode: str) -> None:
    x = gauss(1030)
    check_kernels(codec, codec, x)
    # The last bit of the buffer lies beyond the payload.
    bit = bit if bit >= 0 else 8 * (codec.payload_size(x.size) + 3) - 1
    with pytest.raises(AssertionError, match="bytes differ"):
        check_kernels(codec, FlippedBit(codec, function, bit, mode), x)


@pytest.mark.parametrize("function", ["agree_into", "to_lanes", "from_lanes"])
def test_lane_check_fails_on_one_flipped_bit(function: str) -> None:
    x = gauss(1030)
    check_lanes(QSGD(), QSGD(), x, 4)
    with pytest.raises(AssertionError):
        check_lanes(QSGD(), FlippedBit(QSGD(), function, 3), x, 4)


def test_kernel_check_fails_if_what_is_not_finite_is_overlooked() -> None:
    class Careless(Identity):
        def all_finite(self, x: Any) -> bool:
            return True

    check_kernels(Identity(), Careless(), gauss(9))
    with pytest.raises(AssertionError):
        check_kernels(Identity(), Careless(), np.array([1, np.inf], np.float32))


def test_kernel_check_fails_if_the_input_is_changed() -> None:
    class Greedy(Identity):
        def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
            size = super().encode_into(x, out, key, first)
            x[-1:] = 0
            return size

    with pytest.raises(AssertionError, match="bytes differ"):
        check_kernels(Identity(), Greedy(), gauss(9))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("codec", [QSGD(), QSGD(5, 72, "l2"), QSGD(3, 64, rounding="nearest")], ids=str)
def test_torch_operations_take_half_precision_as_it_is(codec: QSGD, dtype: str) -> None:
    kernels = kernels_for(codec, "torch")
    assert kernels.halves and not kernels_for(codec, "numba").halves
    for x in [*hard_arrays().values(), gauss(1030)]:
        check_halves(codec, kernels, x, dtype)


@pytest.mark.parametrize(
    "function", ["encode_into", "decode_into", "average_into", "agree_into", "to_lanes", "from_lanes"]
)
def test_half_precision_check_fails_on_one_flipped_bit(function: str) -> None:
    import torch

    class Flipped(FlippedBit):
        def __getattr__(self, name: str) -> Any:
            original = getattr(self.codec, name)

            def wrong(*arguments: Any) -> None:
                original(*arguments)
                out = arguments[{"average_into": 2, "to_lanes": 3, "from_lanes": 3}.get(name, 1)]
                out.view(torch.uint8)[9] ^= 1

            return wrong if name == self.function else original

    kernels: Any = kernels_for(QSGD(), "torch")
    with pytest.raises(AssertionError, match="bytes differ"):
        check_halves(QSGD(), Flipped(kernels, function, 0), gauss(1030), "float16")


# -- finding kernels ------------------------------------------------------------------------------


def test_every_codec_has_kernels_on_every_backend() -> None:
    for backend in ("numpy", "numba", "torch"):
        for codec in CODECS:
            assert kernels_for(codec, backend).codec == codec
    for codec in (QSGD(), TopK(), Identity(), Cast()):
        assert kernels_for(codec, "tensorflow").codec == codec
    assert kernels_for(QSGD(), "numpy") == QSGD()
    assert kernels_for(QSGD(), "numba") is kernels_for(QSGD(), "numba")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match="Unknown backend 'cuda'; known are numpy, numba, torch"):
        kernels_for(QSGD(), "cuda")


def test_a_codec_without_kernels_for_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS["torch"], "topk")
    with pytest.raises(ConfigError, match="'topk' has no torch kernels"):
        kernels_for(TopK(k=987654), "torch")


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_requested_backend_that_is_missing_fails(backend: str) -> None:
    """Never silently the NumPy code in its place."""
    script = f"import sys; sys.modules[{backend!r}] = None\n"
    script += f"from hvd_qsgd import kernels, QSGD; kernels.kernels_for(QSGD(), {backend!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"ModuleNotFoundError: import of {backend} halted" in result.stderr


def run_where_nothing_can_be_kept(directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python over a copy of the package that takes no caches, of a user who has none, not even root."""
    copy = directory / "hvd_qsgd"
    shutil.copytree(ROOT / "hvd_qsgd", copy, ignore=shutil.ignore_patterns("__pycache__", "examples"))
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(directory)}
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=directory,
        env={**variables, **nowhere},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_work_where_nothing_can_be_kept_and_say_so_once(tmp_path: Path) -> None:
    """As a package that belongs to root is used by somebody without a home."""
    done = run_where_nothing_can_be_kept(
        tmp_path,
        "import numpy as np\nimport hvd_qsgd\nfrom hvd_qsgd.kernels import kernels_for\n"
        "x = np.arange(99, dtype=np.float32)\n"
        "for codec in (hvd_qsgd.Cast(), hvd_qsgd.Sign()):\n"
        "    out = np.empty(codec.payload_size(99), np.uint8)\n"
        "    size = kernels_for(codec, 'numba').encode_into(x, out)\n"
        "    assert (out[:size] == codec.encode(x)).all()\n"
        "print(hvd_qsgd.__file__)\n",
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "hvd_qsgd" / "__init__.py"
    assert done.stderr.count("Compiled kernels cannot be kept") == 1 and "NUMBA_CACHE_DIR" in done.stderr


# -- misuse -----------------------------------------------------------------------------------------


@EACH_BACKEND
@pytest.mark.parametrize(
    "codec",
    [QSGD(), TopK(), MinMax(), Rows(TopK(), 300), Identity(), Cast(), Sign(), RandomK(), RowTopK()],
    ids=str,
)
def test_a_payload_of_a_wrong_size_is_refused(backend: str, codec: Codec) -> None:
    payload = codec.encode(gauss(1000))
    for wrong in (payload[:-1], np.append(payload, np.uint8(0)), payload[:0]):
        out = np.ones(1000, np.float32)
        with pytest.raises(PayloadError, match="bytes, but"):
            kernels_for(codec, backend).decode_into(wrapper(backend)(wrong.copy()), wrapper(backend)(out))
        assert (out == 1).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("codec", [QSGD(), TopK(), MinMax(), Rows(QSGD(), 9), Identity(), Cast()])
def test_an_unknown_mode_is_refused(backend: str, codec: Codec) -> None:
    payload, out = codec.encode(gauss(10)), np.ones(10, np.float32)
    with pytest.raises(ConfigError, match="mode='plus' is not one of"):
        kernels_for(codec, backend).decode_into(wrapper(backend)(payload), wrapper(backend)(out), "plus")


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_buffer_that_is_too_small_is_refused(backend: str) -> None:
    """As by the NumPy code; above all nothing is written behind it."""
    memory = np.full(1000, FILLER, np.uint8)
    for codec in (QSGD(), MinMax(4), Rows(QSGD(), 200), Rows(MinMax(4), 2)):
        for kernels, wrap in ((codec, wrapper("numpy")), (kernels_for(codec, backend), wrapper(backend))):
            with pytest.raises((ValueError, RuntimeError)):
                kernels.encode_into(wrap(gauss(512)), wrap(memory[:100]))
            assert set(memory[100:]) == {FILLER}


# -- resources --------------------------------------------------------------------------------------


def test_numba_qsgd_allocates_next_to_nothing() -> None:
    codec = QSGD()
    kernels = kernels_for(codec, "numba")
    x = gauss(1 << 20)
    out = np.empty(codec.payload_size(x.size), np.uint8)
    agreed = np.empty(codec.agreement_length(x.size), np.int32)
    lanes = np.empty(codec.lanes_length(x.size, 8), np.int32)

    def work() -> None:
        kernels.encode_into(x, out, 1)
        kernels.decode_into(out, x, "add")
        kernels.average_into(out, [(0, len(out))] * 2, x)
        kernels.agree_into(x, agreed)
        kernels.to_lanes(x, agreed, 8, lanes)
        kernels.from_lanes(lanes, agreed, 8, x, 8)

    def peak() -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    work()
    assert peak() < 16 << 10
    # The measurement sees the arrays of NumPy: the same work by the specification takes megabytes.
    kernels = codec
    assert peak() > 1 << 20


def lets_another_thread_run(work: Callable[[], Any]) -> bool:
    """Whether another Python thread comes to its turn while the work is done, if need be a hundred times.

    The interpreter would take the GIL from a busy thread only after an hour: who runs was let run.
    """
    turns, stop = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count)
    sys.setswitchinterval(3600)
    try:
        other.start()
        before = turns
        for _ in range(100):
            work()
            if turns > before:
                return True
        return False
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()


@pytest.mark.parametrize("codec", [QSGD(), TopK()], ids=str)
def test_numba_lets_other_threads_run(codec: Codec) -> None:
    kernels = kernels_for(codec, "numba")
    x = gauss(1 << 20)
    out = np.empty(codec.payload_size(x.size), np.uint8)
    kernels.encode_into(x[:512], out)
    assert lets_another_thread_run(lambda: kernels.encode_into(x, out))


def test_that_other_threads_run_would_be_seen_to_fail() -> None:
    assert not lets_another_thread_run(lambda: sum(range(10**5)))
