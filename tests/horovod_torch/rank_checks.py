"""What the tests inside the ranks share: references, and comparisons between ranks.

References use the codecs' NumPy code and Horovod's plain allgather, nothing else of what they check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from hvd_qsgd import Codec
from hvd_qsgd.random_words import key_of, stream_of

#: Not a multiple of any bucket size: 10 buckets of 512 and a tail, an odd number of elements.
SHAPE = (71, 73)
#: A power of two, so that its products are exact.
LR = 0.125
Parameters = dict[str, torch.nn.Parameter]
Gradients = Mapping[str, torch.Tensor]


# -- between ranks --------------------------------------------------------------------------


def gather(tensor: torch.Tensor, process_set: Any = hvd.global_process_set) -> list[torch.Tensor]:
    """The tensors of all ranks, by Horovod's own allgather, as float32 or wider."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    if dense.dtype in (torch.float16, torch.bfloat16):
        dense = dense.float()
    # Horovod numbers what has no name, and ranks outside a process set would count differently.
    name = f"gather.{process_set.process_set_id}.{dense.dtype}.{tuple(dense.shape)}"
    return list(hvd.allgather(dense.unsqueeze(0).contiguous(), name=name, process_set=process_set))


def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """32 bytes that differ if any bit, shape or dtype of the tensors does."""
    state = hashlib.blake2b(digest_size=32)
    for tensor in tensors:
        dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        state.update(f"{dense.dtype}{tuple(dense.shape)}".encode())
        # Elements of a bfloat16 or of a tensor in another memory format have no NumPy view.
        state.update(bytes(dense.contiguous().reshape(-1).view(torch.uint8).numpy()) if dense.numel() else b"")
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)


def assert_same_on_all_ranks(tensors: Iterable[torch.Tensor], process_set: Any = hvd.global_process_set) -> None:
    digests = gather(digest(tensors), process_set)
    different = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    assert not different, f"the bits of ranks {different} differ from those of rank 0"


def assert_equal(result: torch.Tensor, expected: np.ndarray | torch.Tensor) -> None:
    """Equal values of one shape; NaN equals NaN. Both are compared in float64."""
    got, wanted = (np.asarray(torch.as_tensor(x).detach().double().to_dense()) for x in (result, expected))
    assert got.shape == wanted.shape, f"shape {got.shape} instead of {wanted.shape}"
    wrong = np.flatnonzero(~((got == wanted) | (np.isnan(got) & np.isnan(wanted))).reshape(-1))
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} elements differ; element {wrong[0]} is {got.reshape(-1)[wrong[0]]!r} "
        f"instead of {wanted.reshape(-1)[wrong[0]]!r}"
    )


# -- references -----------------------------------------------------------------------------


def key(name: str, rank: int, step: int, seed: int = 0, phase: int = 0) -> int:
    return key_of(stream_of(seed, rank, name), step, phase)


def decoded(codec: Codec, x: torch.Tensor, random_key: int) -> np.ndarray:
    """One rank's payload of ``x``, decoded: float32 of the same shape."""
    array = x.detach().to_dense().float().numpy()
    return codec.decode(codec.encode(array, random_key), array.shape)


def reference_allgather(codec: Codec, inputs: Sequence[torch.Tensor], name: str, step: int, seed: int = 0) -> Any:
    """The mean of what the ranks' payloads decode to, added up in rank order in float32."""
    total = decoded(codec, inputs[0], key(name, 0, step, seed))
    for rank in range(1, len(inputs)):
        total = total + decoded(codec, inputs[rank], key(name, rank, step, seed))
    return np.asarray(total / np.float32(len(inputs)))


def reference_scatter_gather(codec: Codec, inputs: Sequence[torch.Tensor], name: str, step: int, seed: int = 0) -> Any:
    """That mean, encoded once more by the rank that owns a shard; for a tensor that travels alone."""
    mean = reference_allgather(codec, inputs, name, step, seed)
    flat, result = torch.from_numpy(mean.reshape(-1)), np.empty(mean.size, np.float32)
    units, ranks = -(-mean.size // codec.granularity), len(inputs)
    for owner in range(ranks):
        start, stop = (codec.granularity * (units * r // ranks) for r in (owner, owner + 1))
        result[start:stop] = decoded(codec, flat, key(name, owner, step, seed, phase=1))[start:stop]
    return result.reshape(mean.shape)


def reference_allreduce(codec: Any, inputs: Sequence[torch.Tensor], name: str, step: int, seed: int = 0) -> Any:
    """Levels on the largest scale of each bucket, added up."""
    arrays = [x.detach().float().reshape(-1).numpy() for x in inputs]
    ranks, length = len(arrays), arrays[0].size
    scales = np.max([codec.scales(x) for x in arrays], axis=0).view(np.int32)
    words = np.empty((ranks, codec.lanes_length(length, ranks)), np.int32)
    for rank, x in enumerate(arrays):
        codec.to_lanes(x, scales, ranks, words[rank], key(name, rank, step, seed))
    mean = np.empty(length, np.float32)
    codec.from_lanes(words.sum(axis=0, dtype=np.int32), scales, ranks, mean, ranks)
    return mean.reshape(inputs[0].shape)


REFERENCES = {
    "allgather": reference_allgather,
    "scatter_gather": reference_scatter_gather,
    "allreduce": reference_allreduce,
}


def by_ranks(codec: Codec) -> str:
    """The exchange that "by_ranks" has to choose."""
    return "scatter_gather" if hvd.size() >= 4 and not codec.variable_size else "allgather"


def assert_within_a_level(codec: Any, result: torch.Tensor, inputs: Sequence[torch.Tensor], roundings: int = 1) -> None:
    """Every element of the mean is off by less than ``roundings`` steps between two levels.

    The step of a bucket is at most that of the rank with the largest scale there; a mean's scale is not larger.
    """
    arrays = [x.detach().float().reshape(-1).numpy() for x in inputs]
    step = np.max([codec.scales(x) for x in arrays], axis=0) / codec.levels
    error = np.abs(result.detach().double().reshape(-1).numpy() - np.mean(arrays, axis=0, dtype=np.float64))
    bound = roundings * np.repeat(step, codec.bucket_size)[: error.size] * (1 + 1e-5)
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"


# -- inputs ---------------------------------------------------------------------------------


def normal(shape: Sequence[int], seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Normal numbers that differ between ranks."""
    generator = torch.Generator().manual_seed(1000 * seed + (hvd.rank() if rank is None else rank))
    return torch.randn(*shape, generator=generator)


def dyadic(shape: Sequence[int], seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Numbers whose sums are exact in float32, in any order."""
    return (64 * normal(shape, seed, rank)).round() / 64


def make_parameters(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> Parameters:
    """Parameters that are the same on all ranks."""
    return {
        name: torch.nn.Parameter(normal(shape, seed=99 + i, rank=0).to(dtype))
        for i, (name, shape) in enumerate(shapes.items())
    }


def make_optimizer(parameters: Parameters, compression: Any, lr: float = LR, **settings: Any) -> Any:
    optimizer = torch.optim.SGD(list(parameters.values()), lr=lr)
    return hvd.DistributedOptimizer(
        optimizer, named_parameters=list(parameters.items()), compression=compression, **settings
    )


def make_gradients(parameters: Parameters, seed: int = 0, rank: int | None = None) -> dict[str, torch.Tensor]:
    return {
        name: dyadic(p.shape, seed=100 * seed + i, rank=rank).to(p.dtype)
        for i, (name, p) in enumerate(parameters.items())
    }


def backward(parameters: Parameters, gradients: Mapping[str, torch.Tensor]) -> None:
    """A backward pass whose gradients are exactly these; Horovod's hooks run as in any other."""
    named = [(parameters[name], gradient.clone()) for name, gradient in gradients.items()]
    torch.autograd.backward([p for p, _ in named], [gradient for _, gradient in named])


def train(optimizer: Any, parameters: Parameters, seeds: Iterable[int]) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        backward(parameters, make_gradients(parameters, seed))
        optimizer.step()


# -- one step, up to the reduced gradients ----------------------------------------------------


def check_gradients(
    parameters: Parameters,
    raw: Gradients,
    codec: Codec,
    step: int,
    *,
    factor: float = 1.0,
    index: int = 0,
    seed: int = 0,
    bypassed: Collection[str] = (),
    reference: Callable[..., Any] = reference_allgather,
    process_set: Any = hvd.global_process_set,
) -> None:
    """The reduced gradients are those of the reference for what the ranks put in, and the same everywhere.

    Biases, small tensors and what is ``bypassed`` besides are plain means.
    """
    for name, parameter in parameters.items():
        inputs = gather(raw[name], process_set)
        if name in bypassed or parameter.dim() < 2 or parameter.numel() < 1024:
            mean = torch.stack(inputs).sum(0) / len(inputs)
        else:
            mean = torch.from_numpy(reference(codec, inputs, f"{index}/{name}", step, seed))
        assert parameter.grad.dtype == parameter.dtype
        assert_equal(parameter.grad, (mean * factor).to(parameter.dtype))
    assert_same_on_all_ranks([p.grad for p in parameters.values()], process_set)


def reduce_gradients(optimizer: Any, parameters: Parameters, raw: Gradients) -> None:
    """One step up to the reduced gradients."""
    optimizer.zero_grad()
    backward(parameters, raw)
    optimizer.synchronize()


def apply_gradients(optimizer: Any) -> None:
    with optimizer.skip_synchronize():
        optimizer.step()
