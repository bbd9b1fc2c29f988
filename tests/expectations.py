"""What must come out of an exchange, for the tensors of any framework.

References use the codecs' NumPy code, nothing else of what they check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_qsgd import Codec
from hvd_qsgd.codecs.random_words import key_of, stream_of

#: Not a multiple of any bucket size: 10 buckets of 512 and a tail, an odd number of elements.
SHAPE = (71, 73)


def as_array(x: Any, dtype: Any = np.float32) -> np.ndarray:
    """A tensor of any framework, or an array, as a NumPy array."""
    if hasattr(x, "detach"):
        # bfloat16 and sparse tensors of torch have no NumPy form.
        x = x.detach().to_dense().double() if x.is_floating_point() else x.detach().to_dense()
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(dtype)


def assert_equal(result: Any, expected: Any) -> None:
    """Equal values of one shape; NaN equals NaN. Both are compared in float64."""
    got, wanted = as_array(result, np.float64), as_array(expected, np.float64)
    assert got.shape == wanted.shape, f"shape {got.shape} instead of {wanted.shape}"
    wrong = np.flatnonzero(~((got == wanted) | (np.isnan(got) & np.isnan(wanted))).reshape(-1))
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} elements differ; element {wrong[0]} is {got.reshape(-1)[wrong[0]]!r} "
        f"instead of {wanted.reshape(-1)[wrong[0]]!r}"
    )


def key(name: str, rank: int, step: int, seed: int = 0, phase: int = 0) -> int:
    return key_of(stream_of(seed, rank, name), step, phase)


def decoded(codec: Codec, x: Any, random_key: int) -> np.ndarray:
    """One rank's payload of ``x``, decoded: float32 of the same shape."""
    array = as_array(x)
    return codec.decode(codec.encode(array, random_key), array.shape)


def reference_allgather(codec: Codec, inputs: Sequence[Any], name: str, step: int, seed: int = 0) -> Any:
    """The mean of what the ranks' payloads decode to, added up in rank order in float32."""
    total = decoded(codec, inputs[0], key(name, 0, step, seed))
    for rank in range(1, len(inputs)):
        total = total + decoded(codec, inputs[rank], key(name, rank, step, seed))
    return np.asarray(total / np.float32(len(inputs)))


def reference_scatter_gather(codec: Codec, inputs: Sequence[Any], name: str, step: int, seed: int = 0) -> Any:
    """That mean, encoded once more by the rank that owns a shard; for a tensor that travels alone."""
    mean = reference_allgather(codec, inputs, name, step, seed)
    flat, result = mean.reshape(-1), np.empty(mean.size, np.float32)
    units, ranks = -(-mean.size // codec.granularity), len(inputs)
    for owner in range(ranks):
        start, stop = (codec.granularity * (units * r // ranks) for r in (owner, owner + 1))
        result[start:stop] = decoded(codec, flat, key(name, owner, step, seed, phase=1))[start:stop]
    return result.reshape(mean.shape)


def reference_allreduce(codec: Any, inputs: Sequence[Any], name: str, step: int, seed: int = 0) -> Any:
    """Levels on the largest scale of each bucket, added up."""
    arrays = [as_array(x).reshape(-1) for x in inputs]
    ranks, length = len(arrays), arrays[0].size
    scales = np.max([codec.scales(x) for x in arrays], axis=0).view(np.int32)
    words = np.empty((ranks, codec.lanes_length(length, ranks)), np.int32)
    for rank, x in enumerate(arrays):
        codec.to_lanes(x, scales, ranks, words[rank], key(name, rank, step, seed))
    mean = np.empty(length, np.float32)
    codec.from_lanes(words.sum(axis=0, dtype=np.int32), scales, ranks, mean, ranks)
    return mean.reshape(np.shape(inputs[0]))


REFERENCES = {
    "allgather": reference_allgather,
    "scatter_gather": reference_scatter_gather,
    "allreduce": reference_allreduce,
}


def assert_within_a_level(codec: Any, result: Any, inputs: Sequence[Any], roundings: int = 1) -> None:
    """Every element of the mean is off by less than ``roundings`` steps between two levels.

    The step of a bucket is at most that of the rank with the largest scale there; a mean's scale is not larger.
    """
    arrays = [as_array(x).reshape(-1) for x in inputs]
    step = np.max([codec.scales(x) for x in arrays], axis=0) / codec.levels
    error = np.abs(as_array(result, np.float64).reshape(-1) - np.mean(arrays, axis=0, dtype=np.float64))
    bound = roundings * np.repeat(step, codec.bucket_size)[: error.size] * (1 + 1e-5)
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"
