"""What the tests inside the ranks share: inputs, and comparisons between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from expectations import REFERENCES, assert_equal, reference_allgather

from hvd_qsgd import Codec


def gather(tensor: Any, process_set: Any = hvd.global_process_set) -> list[np.ndarray]:
    """The tensors of all ranks, by Horovod's own allgather, as float32 or wider."""
    array = np.asarray(tensor)
    dense = tf.constant(array if array.dtype.kind in "iu" or array.dtype == np.float64 else array.astype(np.float32))
    return list(hvd.allgather(dense[None], process_set=process_set).numpy())


def digest(tensors: Iterable[Any]) -> np.ndarray:
    """32 bytes that differ if any bit, shape or dtype of the tensors does."""
    state = hashlib.blake2b(digest_size=32)
    for tensor in tensors:
        array = np.asarray(tensor)
        state.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return np.frombuffer(state.digest(), np.uint8)


def assert_same_on_all_ranks(tensors: Iterable[Any], process_set: Any = hvd.global_process_set) -> None:
    digests = gather(digest(tensors), process_set)
    different = [rank for rank, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    assert not different, f"the bits of ranks {different} differ from those of rank 0"


def by_ranks(codec: Codec) -> str:
    """The exchange that "by_ranks" has to choose."""
    return "scatter_gather" if hvd.size() >= 4 and not codec.variable_size else "allgather"


def normal(shape: Sequence[int], seed: int = 0, rank: int | None = None) -> np.ndarray:
    """Normal numbers that differ between ranks."""
    generator = np.random.default_rng([seed, hvd.rank() if rank is None else rank])
    return generator.standard_normal(shape).astype(np.float32)


def dyadic(shape: Sequence[int], seed: int = 0, rank: int | None = None) -> np.ndarray:
    """Numbers whose sums are exact in float32, in any order."""
    return np.rint(64 * normal(shape, seed, rank)) / 64


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a graph."""
    return tf.function(function)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


#: Both ways to run something, for parametrize.
MODES = [eager, traced]


def gradients_of(variables: Sequence[Any], compression: Any, **settings: Any) -> Callable[..., Any]:
    """A function of one tensor for each variable that has exactly these as gradients, reduced by a distributed tape."""

    def reduced(*raw: Any) -> Any:
        with tf.GradientTape() as tape:
            products = [tf.reduce_sum(tf.cast(v, g.dtype) * g) for v, g in zip(variables, raw)]
            loss = tf.add_n([tf.cast(product, tf.float32) for product in products])
        tape = hvd.DistributedGradientTape(tape, compression=compression, **settings)
        return tape.gradient(loss, list(variables))

    return reduced


def assert_means(
    codec: Codec,
    results: Sequence[Any],
    raw: Sequence[Any],
    names: Sequence[str],
    step: int,
    reference: Callable[..., Any] = reference_allgather,
    factor: float = 1.0,
    process_set: Any = hvd.global_process_set,
) -> None:
    """Results are those of the reference for what the ranks put in; what is small or flat is the plain mean."""
    for result, mine, name in zip(results, raw, names, strict=True):
        inputs = gather(mine, process_set)
        if mine.ndim < 2 or mine.size < 1024:
            expected = np.sum(inputs, axis=0) / len(inputs)
        else:
            expected = reference(codec, inputs, name, step)
        assert_equal(result, (expected * np.float32(factor)).astype(np.asarray(result).dtype))
    assert_same_on_all_ranks(results, process_set)


def check_allreduces(
    compressor: Any, exchange: str, x: Any, name: str, steps: range, mode: Callable[..., Any], seed: int = 0
) -> None:
    """Allreduces of ``x``: results as specified, of the same dtype, and the same everywhere."""
    x = tf.constant(x)
    reduce = mode(lambda x: hvd.allreduce(x, name=name, compression=compressor))
    for step in steps:
        result = reduce(x)
        assert result.dtype == x.dtype
        expected = REFERENCES[exchange](compressor.codec, gather(x), name, step, seed)
        assert_equal(result, tf.cast(expected, x.dtype))
        assert_same_on_all_ranks([result])
