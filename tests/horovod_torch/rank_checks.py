"""What the tests inside the ranks share: inputs, and comparisons between ranks."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from expectations import REFERENCES, SHAPE, assert_equal, assert_within_a_level, reference_allgather

from hvd_qsgd import Codec
from hvd_qsgd.reduction.memory import group_text

__all__ = ["REFERENCES", "SHAPE", "assert_equal", "assert_within_a_level", "reference_allgather"]

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


def by_ranks(codec: Codec) -> str:
    """The exchange that "by_ranks" has to choose."""
    return "scatter_gather" if hvd.size() >= 4 and not codec.variable_size else "allgather"


# -- inputs ---------------------------------------------------------------------------------


def normal(shape: Sequence[int], seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Normal numbers that differ between ranks."""
    generator = torch.Generator().manual_seed(1000 * seed + (hvd.rank() if rank is None else rank))
    return torch.randn(tuple(shape), generator=generator)


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


def check_resumes(make: Callable[[], Any], shapes: Mapping[str, tuple[int, ...]], check: Any = None) -> None:
    """Ranks agree, and a run that is saved and resumed ends with the bits of one that was not interrupted.

    Args:
        make: a new compressor.
        check: is called with each compressor after its run.
    """

    def run(saved: bytes | None, start: Parameters, seeds: range) -> tuple[bytes, Parameters, torch.Tensor]:
        weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in start.items()}
        compressor = make()
        if saved is not None:
            compressor.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        train(make_optimizer(weights, compressor), weights, seeds)
        assert_same_on_all_ranks(weights.values())
        if check is not None:
            check(compressor)
        stream = io.BytesIO()
        torch.save(compressor.state_dict(), stream)
        return stream.getvalue(), weights, digest([*weights.values(), *compressor.state_dict()["arrays"].values()])

    beginning = make_parameters(shapes)
    _, _, uninterrupted = run(None, beginning, range(4))
    saved, halfway, _ = run(None, beginning, range(2))
    _, _, resumed = run(saved, halfway, range(2, 4))
    assert_equal(resumed, uninterrupted)


# -- one step, up to the reduced gradients ----------------------------------------------------


def check_gradients(
    parameters: Parameters,
    raw: Gradients,
    codec: Codec,
    step: int,
    *,
    factor: float = 1.0,
    seed: int = 0,
    bypassed: Collection[str] = (),
    reference: Callable[..., Any] = reference_allgather,
    process_set: Any = hvd.global_process_set,
) -> None:
    """The reduced gradients are those of the reference for what the ranks put in, and the same everywhere.

    Biases, small tensors and what is ``bypassed`` besides are plain means.
    """
    group = "" if process_set is hvd.global_process_set else f" ({group_text(process_set.ranks)})"
    for name, parameter in parameters.items():
        inputs = gather(raw[name], process_set)
        if name in bypassed or parameter.dim() < 2 or parameter.numel() < 1024:
            mean = torch.stack(inputs).sum(0) / len(inputs)
        else:
            mean = torch.from_numpy(reference(codec, inputs, f"{name}{group}", step, seed))
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
