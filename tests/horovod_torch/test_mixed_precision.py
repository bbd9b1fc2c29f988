"""What people do to make training faster, beside compression: AMP with a gradient scaler, and torch.compile."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from rank_checks import assert_equal, assert_same_on_all_ranks, digest, normal

from hvd_qsgd.torch import QSGDCompressor, TopKCompressor

COMPRESSORS = {
    "plain": lambda: QSGDCompressor(bits=8),
    "allreduce": lambda: QSGDCompressor(bits=8, exchange="allreduce"),
    "feedback": lambda: QSGDCompressor(rounding="nearest", error_feedback=True),
    "topk": lambda: TopKCompressor(0.1),
}


def made(compression: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    # Without biases, which would go through Horovod and tell of an overflow that compression hides.
    layers = [torch.nn.Linear(40, 64, bias=False), torch.nn.ReLU(), torch.nn.Linear(64, 32, bias=False)]
    model = torch.nn.Sequential(*layers).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    named = list(model.named_parameters())
    return model, hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=compression, **settings)


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_scaler_sees_an_overflow_on_one_rank(kind: str, dtype: torch.dtype) -> None:
    """All ranks skip that step, halve the scale, and go on with finite weights and residuals."""
    compression = COMPRESSORS[kind]()
    model, optimizer = made(compression)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        x = normal((16, 40), seed=step)
        overflows = step == 2
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(x).float().square().mean()
        if overflows and hvd.rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        assert same == overflows
        assert scaler.get_scale() == (128.0 if step >= 2 else 256.0)
        assert all(p.isfinite().all() for p in model.parameters())
    assert_same_on_all_ranks(model.parameters())
    assert compression.stats().tensors and not any(record.bypassed for record in compression.stats().tensors.values())
    assert all(torch.as_tensor(array).isfinite().all() for array in compression.feedback.arrays().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_precision_come_back_in_it(dtype: torch.dtype) -> None:
    model, optimizer = made(QSGDCompressor(), dtype)
    for step in range(2):
        optimizer.zero_grad()
        model(normal((16, 40), seed=step).to(dtype)).float().square().mean().backward()
        optimizer.step()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert_same_on_all_ranks(model.parameters())


def test_a_compiled_model_trains_to_the_same_bits() -> None:
    """Compression sees the gradients of a compiled model like any others, and is not compiled itself."""
    ended = []
    for backend in (None, "aot_eager"):
        model, optimizer = made(QSGDCompressor())
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        run = torch.compile(model, backend=backend) if backend else model
        for step in range(3):
            optimizer.zero_grad()
            run(normal((16, 40), seed=step)).square().mean().backward()
            optimizer.step()
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs) == bool(backend)
        ended.append([p.detach().clone() for p in model.parameters()])
        assert_same_on_all_ranks(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*ended))


def graphs() -> int:
    """How many graphs torch.compile has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("compiled", ["optimizer.step", "step", "step and backward pass"])
def test_a_compiled_step_trains_to_the_same_bits(compiled: str) -> None:
    """Horovod's functions and ours are left as they are in it, also where the backward pass calls them."""

    def trained(compression: Any, compiled: str, **settings: Any) -> torch.Tensor:
        torch._dynamo.reset()
        model, optimizer = made(compression, **settings)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            update()
            return hvd.allreduce(x + 1.0, name="compiled", compression=compression)

        def update() -> None:
            optimizer.step()

        if compiled == "optimizer.step":
            update = torch.compile(update, backend="aot_eager")
        elif compiled:
            step = torch.compile(step, backend="aot_eager")
        before, means = graphs(), []
        with torch._dynamo.config.patch(compiled_autograd=compiled == "step and backward pass"):
            for seed in range(3):
                means.append(step(normal((40, 40), seed)))
        assert bool(graphs() - before) == bool(compiled)
        records = compression.stats().tensors
        compressed = {name: record.exchanges for name, record in records.items() if not record.bypassed}
        assert compressed == {"0.weight": 3, "2.weight": 3, "compiled": 3}
        return digest([*model.parameters(), *means])

    assert_equal(trained(TopKCompressor(0.1), compiled, groups=1), trained(TopKCompressor(0.1), "", groups=1))
    if compiled == "step":
        QSGDCompressor._default = None
        assert_equal(trained(QSGDCompressor, compiled), trained(QSGDCompressor(), ""))
