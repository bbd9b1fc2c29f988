"""One rank of a pipeline. Started by ``test_pipeline_ranks.py``; what it checks is in the functions below."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hvd_qsgd import QSGD, Cast, ExchangeError, MinMax, TopK
from hvd_qsgd.pipeline import Direction, Pipeline, SimulatedPipeline, StageError, split
from hvd_qsgd.pipeline.ends import AFTER
from hvd_qsgd.pipeline.transport import ACTIVATION, CONTROL

D = Direction
CASES: dict[str, tuple[Direction, Direction]] = {
    "uncompressed": (D(), D()),
    "qsgd": (D(QSGD(8)), D(QSGD(4))),
    "minmax": (D(MinMax(4), per_sample=True), D(QSGD(8), at_inference=False)),
    "shared mask": (D(TopK(0.3), per_sample=True), D(shared_mask=True)),
    "ef": (D(TopK(0.3), "ef", at_inference=False), D(TopK(0.3), "ef")),
    "ef-mixed": (D(TopK(0.3), "ef-mixed"), D(TopK(0.3), "ef-mixed", per_sample=True)),
    "ef21": (D(TopK(0.3), "ef21"), D(QSGD(4), "ef21", shared_mask=True)),
    "aq-sgd after warm-up": (D(QSGD(4), "aq-sgd", warmup_epochs=1), D(QSGD(8))),
    "aq-sgd": (D(TopK(0.2), "aq-sgd", per_sample=True), D(Cast("bfloat16"), shared_mask=True)),
}
SAMPLES, BATCH, EPOCHS = 40, 15, 3


def stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32)]
    return split(nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 3)), {1: [], 2: [4], 4: [2, 5, 7]}[count])


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 12, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


def train(pipeline: Any, after_step: Callable[[], None] = lambda: None) -> tuple[list[Any], Any]:
    """Losses of all steps, the last batch of each epoch a short one, and what is predicted in the end."""
    inputs, targets = data()
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.SGD(pipeline.parameters(), 0.1, momentum=0.9)
    losses = []
    for epoch in range(EPOCHS):
        pipeline.set_epoch(epoch)
        for rows in torch.randperm(SAMPLES, generator=generator).split(BATCH):
            optimizer.zero_grad()
            losses.append(pipeline.train_step(cross_entropy, inputs[rows], targets[rows], samples=rows.numpy()))
            optimizer.step()
            after_step()
    return losses, pipeline.predict(inputs)


def check_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.detach().numpy().view(np.int32), b.detach().numpy().view(np.int32))


def identical(count: int, transport: Any, cases: list[str], gpipe: list[str]) -> None:
    """Losses, weights and predictions are those of the simulation, bit for bit."""
    for name in cases:
        forward, backward = CASES[name]
        simulated = SimulatedPipeline(stages(count), forward=forward, backward=backward)
        expected = train(simulated)
        for schedule in ("1f1b", "gpipe") if name in gpipe else ("1f1b",):
            pipeline = Pipeline(
                stages(count), forward=forward, backward=backward, schedule=schedule, transport=transport
            )
            with pipeline:
                losses, predicted = train(pipeline)
                pipeline.verify()
            check_same(pipeline.parameters(), list(simulated.stages[pipeline.stage].parameters()))
            if pipeline.is_last:
                assert losses == expected[0]
                check_same([predicted], [expected[1]])
            else:
                assert set(losses) == {None} and predicted is None
            sent = {name: stats.payload_bytes for name, stats in pipeline.stats().tensors.items()}
            assert sent.items() <= {n: s.payload_bytes for n, s in simulated.stats().tensors.items()}.items()
            report(pipeline, f"{name} {schedule}: identical")


def checkpoint(count: int) -> None:
    """A run that goes on from a checkpoint equals one that was not interrupted; a lost part is found out."""
    forward, backward = CASES["ef21"]
    options: dict[str, Any] = {"forward": forward, "backward": backward}
    inputs, targets = data()

    def gradients(pipeline: Pipeline) -> list[torch.Tensor]:
        pipeline.module.zero_grad()
        pipeline.train_step(cross_entropy, inputs, targets)
        return [parameter.grad.clone() for parameter in pipeline.parameters() if parameter.grad is not None]

    with Pipeline(stages(count), **options) as pipeline:
        first = gradients(pipeline)
        state = pipeline.state_dict()
        second = gradients(pipeline)
    with Pipeline(stages(count), **options) as pipeline:
        pipeline.load_state_dict(state)
        check_same(gradients(pipeline), second)
        pipeline.reset()
        check_same(gradients(pipeline), first)
    with Pipeline(stages(count), **options) as pipeline, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.load_state_dict({} if pipeline.stage == 0 else state)
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == (2 if pipeline.stage < 2 else 0), messages
        assert all("remembered different things" in message for message in messages)
        pipeline.verify()
        gradients(pipeline)
    report(pipeline, "checkpoint: went on")
    pipeline = Pipeline(stages(count), **options)
    gradients(pipeline)
    # A rank that is still in its step would be told there.
    pipeline.transport.close()
    if pipeline.stage == 0:
        pipeline.ends.by_place[AFTER, ACTIVATION].store.clear()
    try:
        pipeline.verify()
    except ExchangeError as error:
        # Ranks that do not see it themselves may be told or be through already.
        assert "remember different things" in str(error)
    else:
        assert pipeline.stage > 1
    report(pipeline, "checkpoint: a difference was found")


def hybrid(count: int) -> None:
    """Two replicas of two stages: gradients are averaged over the replicas of a stage, compressed."""
    import horovod.torch as hvd

    from hvd_qsgd.pipeline.transport_horovod import stage_sets
    from hvd_qsgd.torch import IdentityCompressor, QSGDCompressor

    hvd.init()
    sets = stage_sets(count)
    inputs, targets = data()
    for compression, exact in ((IdentityCompressor(min_elements=1), True), (QSGDCompressor(8, min_elements=1), False)):
        direction = Direction() if exact else Direction(QSGD(8))
        with Pipeline(stages(count), forward=direction, backward=direction, micro_batches=2) as pipeline:
            # Batch statistics are those of a micro-batch; without them replicas equal one large batch.
            pipeline.module.eval()
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(pipeline.parameters(), 0.1),
                pipeline.named_parameters(),
                compression=compression,
                backward_passes_per_step=2,
                process_set=sets[pipeline.stage],
            )
            single = SimulatedPipeline(stages(count), micro_batches=1).eval()
            reference = torch.optim.SGD(single.parameters(), 0.1)
            own = slice(pipeline.replica, SAMPLES, pipeline.replicas)
            for _ in range(5):
                optimizer.zero_grad()
                pipeline.train_step(cross_entropy, inputs[own], targets[own])
                optimizer.step()
                reference.zero_grad()
                single.train_step(cross_entropy, inputs, targets)
                reference.step()
            for mine, theirs in zip(pipeline.parameters(), single.stages[pipeline.stage].parameters()):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 if exact else 0.02)
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in pipeline.parameters()])
            gathered = hvd.allgather(flat, name=f"weights.{pipeline.stage}.{exact}", process_set=sets[pipeline.stage])
            check_same(list(gathered.view(pipeline.replicas, -1)), [flat] * pipeline.replicas)
            assert exact or compression.stats().ratio > 2
            report(pipeline, f"hybrid, exact={exact}: replicas agree")
    hvd.shutdown()


class OnDevice(torch.Tensor):
    """Host memory that says it is a GPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def device_memory() -> None:
    """Rank 0 sends from the memory of a GPU, which is played by host memory; rank 1 receives there.

    With an MPI that reaches it MPI is given that memory, else page-locked memory of the host, and never before
    the GPU's stream has come so far. mpi4py takes the path of GPU tensors (DLPack), MPI that of the host.
    """
    from types import SimpleNamespace

    from hvd_qsgd.pipeline import transport_mpi

    log: list[Any] = []
    stream = SimpleNamespace(synchronize=lambda: log.append("waited"))
    torch.cuda.current_stream = lambda device: stream  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0

    def allocate(size: int, device: torch.device, page_locked: bool = False) -> torch.Tensor:
        log.append((device.type, page_locked))
        memory = torch.empty(size, dtype=torch.uint8)
        return memory if device.type == "cpu" else memory.as_subclass(OnDevice)

    transport_mpi.allocate = allocate
    sent = torch.arange(1_000_003).to(torch.uint8)
    for reached in (False, True):
        log.clear()
        transport = transport_mpi.MPITransport(device_memory=reached)
        transport.device = torch.device("cuda", 0)
        if transport.rank == 0:
            message = sent.as_subclass(OnDevice)
            transport.send(1, ACTIVATION, message)
            if transport._outgoing:
                assert (transport._outgoing[0][1].data_ptr() == message.data_ptr()) == reached
            transport.flush()
            assert log == (["waited"] if reached else [("cpu", True), "waited"]), log
            transport.send(1, CONTROL, sent[:9])
        else:
            received = transport.receive(0, ACTIVATION)
            assert log[:2] == ([("cuda", False), "waited"] if reached else [("cpu", True), *log[1:2]]), log
            assert isinstance(received, OnDevice) == reached
            np.testing.assert_array_equal(received.as_subclass(torch.Tensor).numpy(), sent.numpy())
            control = transport.receive(0, CONTROL)
            assert log[-1] == ("cpu", False) and control.device.type == "cpu"
        transport.close()
        print(f"RANK {transport.rank} device memory, reached={reached}: right\n", end="", flush=True)
    print(f"RANK {transport.rank} MPI says {transport_mpi.reaches_device_memory()}\n", end="", flush=True)


class Failing(nn.Module):
    """Fails, or is killed, in the third forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("what went wrong")
        return x


def failure(count: int, transport: Any, how: str) -> None:
    """Stage 1 fails; the others must end, and know why."""
    parts = stages(count)
    if how in ("error", "kill"):
        parts[1] = nn.Sequential(parts[1], Failing(how))
    inputs, targets = data()
    directions = Direction(QSGD(8)), Direction(QSGD(8))
    try:
        with Pipeline(parts, forward=directions[0], backward=directions[1], transport=transport) as pipeline:
            for step in range(20):
                if how == "outside" and step == 2 and pipeline.stage == 1:
                    raise ValueError("what went wrong")
                pipeline.train_step(cross_entropy, inputs, targets)
    except StageError as error:
        print(f"stage {pipeline.stage} was told: {error}\n", end="", flush=True)
        raise


def report(pipeline: Pipeline, text: str) -> None:
    # In one write, because the launcher tags each.
    print(f"RANK {pipeline.transport.rank} {text}\n", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    works = ["identical", "checkpoint", "hybrid", "device_memory", "error", "kill", "outside"]
    parser.add_argument("work", nargs="+", choices=works)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--transport", choices=["mpi", "horovod"], default="mpi")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--gpipe", nargs="*", default=[], help="cases that are run with this schedule, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transport: Any = None
    if arguments.transport == "horovod":
        import horovod.torch as hvd

        from hvd_qsgd.pipeline.transport_horovod import HorovodTransport, pipeline_links

        hvd.init()
        transport = HorovodTransport(pipeline_links(arguments.stages))
    for work in arguments.work:
        if work == "identical":
            identical(arguments.stages, transport, arguments.cases, arguments.gpipe)
        elif work == "checkpoint":
            checkpoint(arguments.stages)
        elif work == "hybrid":
            hybrid(arguments.stages)
        elif work == "device_memory":
            device_memory()
        else:
            failure(arguments.stages, transport, work)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
