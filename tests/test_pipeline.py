"""Boundaries, their memories and messages, and pipelines inside one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkers import check_same_bits, flip_bit
from pipeline_worker import CASES, check_same, data, stages, train
from torch import nn
from torch.nn.functional import cross_entropy

from hvd_qsgd import QSGD, Cast, ConfigError, ExchangeError, Identity, MinMax, Rows, TopK, UnsupportedError
from hvd_qsgd.kernels import kernels_of
from hvd_qsgd.pipeline import Boundary, Direction, Receiver, RowStore, Sender, Settings, SimulatedPipeline, split
from hvd_qsgd.pipeline.base import cut
from hvd_qsgd.pipeline.schedule import BACKWARD, FORWARD, actions


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small here, and threads that wait for each other slow them down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FEEDBACKS = ("none", "ef", "ef-mixed", "ef21", "aq-sgd")


def ends(direction: Direction, **settings: Any) -> tuple[Sender, Receiver]:
    arguments = ("boundary0.forward", direction, Settings(verify_every=1, **settings))
    return Sender(*arguments), Receiver(*arguments)


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(pair: tuple[Sender, Receiver], x: torch.Tensor, **options: Any) -> torch.Tensor:
    message, _ = pair[0].encode(x, **options)
    return pair[1].decode(message, mask=options.get("mask")).tensor


# -- what feedback promises ------------------------------------------------------------------------


def test_error_feedback_loses_nothing() -> None:
    """The sum of what was sent and what is left is the sum of what was given."""
    for feedback in ("ef", "ef-mixed"):
        pair = ends(Direction(TopK(0.1), feedback, per_sample=True))
        given, received = torch.zeros(6, 50), torch.zeros(6, 50)
        for step in range(30):
            x = gauss(6, 50, seed=step)
            given += x
            received += through(pair, x)
        left = torch.from_numpy(pair[0].store.read(np.arange(6), 50))
        torch.testing.assert_close(received + left, given, atol=1e-4, rtol=0)
        assert not torch.allclose(received, given, atol=0.1)


def test_ef_mixed_sends_half_of_k_from_the_values_and_half_from_the_residual() -> None:
    pair = ends(Direction(TopK(k=4), "ef-mixed"))
    first = through(pair, torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]]))
    assert first.tolist() == [[0, 0, 0, 0, 0, 0, 7, 8]]
    second = through(pair, torch.tensor([[9.0, 8, 0, 0, 0, 0, 0, 0]]))
    assert second.tolist() == [[9, 8, 0, 0, 5, 6, 0, 0]]


@pytest.mark.parametrize("feedback", ["ef21", "aq-sgd"])
def test_changes_are_sent_until_the_receiver_has_it_all(feedback: str) -> None:
    pair = ends(Direction(TopK(0.25), feedback))
    samples = {"samples": np.array([7, 3])}
    x = gauss(2, 20)
    check_same_bits(through(pair, x, **samples).numpy(), x.numpy())
    y = gauss(2, 20, seed=1)
    errors = [float((through(pair, y, **samples) - y).abs().max()) for _ in range(4)]
    assert errors[0] > 0.1 and errors[-1] < 1e-6
    assert pair[0].store.digest() == pair[1].store.digest()


def test_aq_sgd_remembers_samples_and_ef21_positions() -> None:
    x, y = gauss(1, 20), gauss(1, 20, seed=1)
    for feedback, same in (("aq-sgd", True), ("ef21", False)):
        pair = ends(Direction(TopK(k=1), feedback))
        through(pair, x, samples=[1])
        # With memory by position, one value of the change at a time takes the place of sample 1.
        for _ in range(2):
            through(pair, y, samples=[2])
        assert torch.equal(through(pair, x, samples=[1]), x) == same


def test_aq_sgd_takes_new_and_known_samples_in_one_batch() -> None:
    pair = ends(Direction(QSGD(8), "aq-sgd"))
    x = gauss(4, 30)
    through(pair, x[:2], samples=[10, 11])
    received = through(pair, x, samples=[12, 10, 13, 11])
    check_same_bits(received[[0, 2]].numpy(), x[[0, 2]].numpy())
    assert (received[[1, 3]] - x[[1, 3]]).abs().max() < 0.1


def test_the_first_visit_is_uncompressed_and_later_ones_are_small() -> None:
    sender, receiver = ends(Direction(QSGD(4), "aq-sgd"))
    sizes = []
    for _ in range(2):
        message, _ = sender.encode(gauss(8, 4096), samples=np.arange(8))
        receiver.decode(message)
        sizes.append(len(message))
    assert 8 * 4096 * 4 < sizes[0] < 8 * 4096 * 4 + 200
    assert sizes[1] < sizes[0] / 7.5


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_values_that_are_not_finite_arrive_and_are_not_remembered(feedback: str) -> None:
    pair = ends(Direction(TopK(0.5), feedback))
    through(pair, gauss(2, 10), samples=[0, 1])
    before = pair[0].store.digest()
    broken = gauss(2, 10)
    broken[1, 3] = float("nan")
    assert through(pair, broken, samples=[0, 1]).isnan().any()
    assert pair[0].store.digest() == before
    assert through(pair, gauss(2, 10), samples=[0, 1]).isfinite().all()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_batches_of_any_size_follow_each_other(feedback: str) -> None:
    pair = ends(Direction(TopK(0.3), feedback))
    for step, size in enumerate((4, 2, 7, 1, 7)):
        assert through(pair, gauss(size, 9, seed=step), samples=np.arange(size)).shape == (size, 9)
    assert pair[0].sequence == pair[1].sequence == 5


def test_samples_of_another_size_are_refused() -> None:
    pair = ends(Direction(TopK(0.3), "ef"))
    through(pair, gauss(2, 9))
    with pytest.raises(ConfigError, match="holds samples of 9 elements, but samples of 10 came"):
        through(pair, gauss(2, 10))


# -- masks, warm-up, inference ---------------------------------------------------------------------


def test_a_shared_mask_sends_values_only() -> None:
    forward, backward = ends(Direction(TopK(0.1), per_sample=True)), ends(Direction(shared_mask=True))
    message, mask = forward[0].encode(gauss(4, 100), want_mask=True)
    received = forward[1].decode(message)
    assert mask is not None and received.mask is not None
    assert torch.equal(mask, received.mask) and mask.sum(1).tolist() == [10] * 4
    gradient = gauss(4, 100, seed=1)
    message, _ = backward[0].encode(gradient, mask=mask)
    assert len(message) == 32 + 4 * mask.sum()
    assert torch.equal(backward[1].decode(message, mask=mask).tensor, gradient * mask)


@pytest.mark.parametrize(
    "direction", [Direction(Cast("bfloat16"), shared_mask=True), Direction(QSGD(4), "ef", shared_mask=True)]
)
def test_a_shared_mask_goes_with_any_codec_of_values(direction: Direction) -> None:
    mask = gauss(3, 40) > 0.5
    received = through(ends(direction), gauss(3, 40, seed=1), mask=mask)
    assert (received[~mask] == 0).all() and (received[mask] != 0).any()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_warm_up_is_uncompressed(feedback: str) -> None:
    sender, receiver = ends(Direction(TopK(0.1), feedback, warmup_epochs=2))
    for epoch, exact in ((0, True), (1, True), (2, False)):
        sender.epoch = epoch
        x = gauss(3, 30, seed=epoch)
        assert torch.equal(through((sender, receiver), x, samples=np.arange(3)), x) == exact


def test_warm_up_fills_the_memory_of_aq_sgd() -> None:
    sender, receiver = ends(Direction(TopK(0.1), "aq-sgd", warmup_epochs=1))
    through((sender, receiver), gauss(3, 1000), samples=np.arange(3))
    sender.epoch = 1
    message, _ = sender.encode(gauss(3, 1000), samples=np.arange(3))
    assert len(message) < 3000


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("at_inference", [True, False])
def test_inference_leaves_memories_alone(feedback: str, at_inference: bool) -> None:
    pair = ends(Direction(TopK(0.1), feedback, at_inference=at_inference))
    through(pair, gauss(3, 30), samples=np.arange(3))
    before = pair[0].store.digest(), pair[1].store.digest()
    x = gauss(5, 30, seed=1)
    assert torch.equal(through(pair, x, training=False), x) != at_inference
    assert (pair[0].store.digest(), pair[1].store.digest()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codec", [Identity(), QSGD(8), MinMax(8)], ids=str)
def test_dtype_and_shape_come_back(dtype: torch.dtype, codec: Any) -> None:
    for shape in ((3,), (2, 5), (2, 3, 4, 5), (4, 0)):
        x = gauss(*shape).to(dtype)
        received = through(ends(Direction(codec)), x.transpose(0, -1).contiguous().transpose(0, -1))
        assert (received.dtype, received.shape) == (dtype, x.shape)
        torch.testing.assert_close(received, x, atol=0.05 * (not isinstance(codec, Identity)), rtol=0)


# -- two ends that differ ---------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_default_device_or_dtype_changes_nothing(feedback: str) -> None:
    """The device "meta" stands for any that is not the CPU."""
    inputs = [gauss(6, 50, seed=seed) for seed in range(3)]

    def received() -> list[torch.Tensor]:
        pair = ends(Direction(TopK(0.1), feedback))
        samples = {"samples": np.arange(6)} if feedback == "aq-sgd" else {}
        return [through(pair, x, **samples) for x in inputs]

    expected = received()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            assert all(map(torch.equal, received(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_memory_that_differs_is_found_out() -> None:
    pair = ends(Direction(QSGD(8), "ef21"))
    through(pair, gauss(2, 10))
    keys = np.array([0])
    pair[1].store.write(keys, flip_bit(pair[1].store.read(keys, 10), 70))
    with pytest.raises(ExchangeError, match="decodes to other values than its sender decoded"):
        through(pair, gauss(2, 10))


def test_a_memory_that_is_missing_is_found_out() -> None:
    pair = ends(Direction(QSGD(8), "aq-sgd"))
    through(pair, gauss(2, 10), samples=[4, 5])
    pair[1].store.clear()
    with pytest.raises(ExchangeError, match="remember different samples"):
        through(pair, gauss(2, 10), samples=[4, 5])


def test_a_damaged_message_is_found_out() -> None:
    sender, _ = ends(Direction(QSGD(8)))
    message, _ = sender.encode(gauss(2, 100))
    whole = message.numpy()
    for damaged, text in (
        (whole[:10], "no pipeline message"),
        (flip_bit(whole, 0), "no pipeline message"),
        (flip_bit(whole, 40), "other settings"),
        (flip_bit(whole, 70), "number 0 is due"),
        (whole[:25], "damaged header"),
        (flip_bit(whole, 8 * 100), "decodes to other values"),
    ):
        with pytest.raises(ExchangeError, match=text):
            ends(Direction(QSGD(8)))[1].decode(torch.from_numpy(damaged))


def test_an_uncompressed_message_that_is_cut_short_is_found_out() -> None:
    sender, receiver = ends(Direction())
    message, _ = sender.encode(gauss(2, 10))
    with pytest.raises(ExchangeError, match="76 bytes came for a tensor"):
        receiver.decode(message[:-4])


def test_state_comes_back() -> None:
    one, other = (ends(Direction(TopK(0.2), "ef21")) for _ in range(2))
    for step in range(3):
        through(one, gauss(4, 25, seed=step))
    for old, new in zip(one, other):
        new.load_state_dict(old.state_dict())
        assert torch.equal(new.state_digest(), old.state_digest())
    x = gauss(4, 25, seed=9)
    assert torch.equal(through(one, x), through(other, x))


# -- rows in memory and on disk ----------------------------------------------------------------------


def test_rows_beyond_the_bound_are_on_disk_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_qsgd.pipeline.row_store.BLOCK_BYTES", 4000)
    stores = RowStore(), RowStore(memory_limit=10_000, directory=tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(5):
        keys = rng.permutation(60)[:40] * 1000 - 7
        rows = rng.standard_normal((40, 100)).astype(np.float32)
        for store in stores:
            store.write(keys, rows)
            check_same_bits(store.read(keys, 100), rows)
    assert stores[0].digest() == stores[1].digest()
    assert stores[0].disk_bytes == 0 and 0 < stores[1].memory_bytes <= 10_000 < stores[1].disk_bytes
    assert not list(tmp_path.iterdir())
    copy = RowStore()
    copy.load_state_dict(stores[1].state_dict())
    assert copy.digest() == stores[0].digest() and len(copy) == len(stores[0])


def test_a_digest_sees_keys_and_rows() -> None:
    digests = set()
    for keys, value in (([0, 1], 1), ([0, 2], 1), ([0, 1], 2), ([1], 1), ([], 1)):
        store = RowStore()
        store.write(np.array(keys, np.int64), np.full((len(keys), 3), value, np.float32))
        digests.add(store.digest())
    assert len(digests) == 5


# -- pipelines in one process ------------------------------------------------------------------------


def test_without_compression_it_is_the_model_itself() -> None:
    inputs, targets = data()
    pipeline = SimulatedPipeline(stages(4), micro_batches=1)
    model = nn.Sequential(*stages(4))
    loss = cross_entropy(model(inputs), targets)
    loss.backward()
    assert pipeline.train_step(cross_entropy, inputs, targets) == float(loss.detach())
    for mine, theirs in zip(pipeline.parameters(), model.parameters()):
        assert mine.grad is not None and theirs.grad is not None
        check_same_bits(mine.grad.numpy(), theirs.grad.numpy())


def test_micro_batches_add_up_to_the_gradient_of_the_mean() -> None:
    inputs, targets = data()
    gradients = []
    for micro_batches in (1, 3, 40, 100):
        pipeline = SimulatedPipeline(stages(2), micro_batches=micro_batches).eval()
        loss = pipeline.train_step(cross_entropy, inputs, targets)
        gradients.append([loss, *(p.grad.clone() for p in pipeline.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_compression_trains(name: str) -> None:
    forward, backward = CASES[name]
    losses, predicted = train(SimulatedPipeline(stages(4), forward=forward, backward=backward))
    assert np.isfinite(losses).all() and predicted.isfinite().all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_predict_leaves_modes_and_gradients_alone() -> None:
    pipeline = SimulatedPipeline(stages(2))
    pipeline.stages[1].eval()
    before = [part.training for part in pipeline.modules()]
    output = pipeline.predict(data()[0])
    assert [part.training for part in pipeline.modules()] == before and not all(before)
    assert not output.requires_grad


def test_bytes_are_counted_with_headers() -> None:
    eight = Direction(QSGD(8))
    pipeline = SimulatedPipeline([nn.Linear(8, 512), nn.Linear(512, 2)], forward=eight, backward=eight)
    pipeline.train_step(cross_entropy, gauss(400, 8), torch.zeros(400, dtype=torch.long))
    stats = pipeline.stats()
    assert set(stats.tensors) == {"boundary0.forward", "boundary0.backward"}
    assert stats.raw_bytes == 2 * 400 * 512 * 4
    assert stats.payload_bytes == 2 * (400 * (512 + 4) + 4 * 32)
    assert stats.ratio > 3.9


def test_a_boundary_works_anywhere_in_a_model() -> None:
    boundary = Boundary(Direction(QSGD(8)), Direction(QSGD(8)))
    model = nn.Sequential(nn.Linear(5, 64), boundary, nn.ReLU(), nn.Linear(64, 1))
    x = gauss(3, 5, seed=1)
    model(x).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    reference = nn.Sequential(model[0], model[2], model[3])
    torch.testing.assert_close(model(x), reference(x), atol=0.1, rtol=0)
    assert not torch.equal(model(x), reference(x))


@pytest.mark.parametrize("compiled", ["model", "step", "step and backward pass"])
def test_a_boundary_in_what_is_compiled_computes_the_same(compiled: str) -> None:
    def trained(compiled: str) -> torch.Tensor:
        torch._dynamo.reset()
        torch.manual_seed(1)
        boundary = Boundary(Direction(QSGD(4)), Direction(QSGD(8)))
        model = nn.Sequential(nn.Linear(5, 64), boundary, nn.ReLU(), nn.Linear(64, 1))

        def step(x: torch.Tensor) -> None:
            run(x).square().sum().backward()

        run: Any = torch.compile(model, backend="aot_eager") if compiled == "model" else model
        if compiled.startswith("step"):
            step = torch.compile(step, backend="aot_eager")
        with torch._dynamo.config.patch(compiled_autograd=compiled == "step and backward pass"):
            for seed in range(3):
                step(gauss(30, 5, seed=seed))
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    assert torch.equal(trained(compiled), trained(""))


def test_random_words_differ_between_boundaries_messages_replicas_and_seeds() -> None:
    x = gauss(1, 1000)
    made = set()
    for name, settings in (("a", {}), ("b", {}), ("a", {"replica": 1}), ("a", {"seed": 1})):
        sender = Sender(name, Direction(QSGD(2)), Settings(**settings))
        made |= {sender.encode(x)[0][32:].numpy().tobytes() for _ in range(2)}
    assert len(made) == 8


def test_the_comparison_with_real_ranks_fails_on_one_flipped_bit() -> None:
    weights = [gauss(3, 4), gauss(5)]
    check_same(weights, [weight.clone() for weight in weights])
    for bit in (0, 8 * 4 * 12 - 1):
        with pytest.raises(AssertionError):
            check_same(weights, [torch.from_numpy(flip_bit(weights[0].numpy(), bit)), weights[1]])


# -- order of work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 9])
def test_every_schedule_can_be_carried_out(schedule: str, micro_batches: int) -> None:
    """Every stage does all its work, each part after what it needs, and as few activations wait as promised."""
    count = 4
    todo = [list(actions(schedule, stage, count, micro_batches)) for stage in range(count)]
    everything = sorted((what, number) for what in (FORWARD, BACKWARD) for number in range(micro_batches))
    assert all(sorted(list_) == everything for list_ in todo)
    done: list[set[tuple[str, int]]] = [set() for _ in range(count)]
    waiting = [0] * count
    while any(todo):
        moved = False
        for stage in range(count):
            if todo[stage]:
                what, number = todo[stage][0]
                source = stage - 1 if what == FORWARD else stage + 1
                needs = [(what, number)] if 0 <= source < count else []
                if all(need in done[source] for need in needs) and (
                    what == FORWARD or (FORWARD, number) in done[stage]
                ):
                    done[stage].add(todo[stage].pop(0))
                    waiting[stage] += 1 if what == FORWARD else -1
                    limit = count - stage if schedule == "1f1b" else micro_batches
                    assert waiting[stage] <= limit
                    moved = True
        assert moved, "the stages wait for each other"


def test_batches_are_cut_as_evenly_as_can_be() -> None:
    for size in range(1, 20):
        for parts in range(1, 8):
            sizes = [part.stop - part.start for part in cut(size, parts)]
            assert sum(sizes) == size and len(sizes) == min(parts, size)
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


# -- GPUs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_other_devices_make_the_same_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage on a GPU does, by torch operations on the CPU: the same losses and outputs, bit for bit."""
    forward, backward = CASES[name]
    expected = train(SimulatedPipeline(stages(2), forward=forward, backward=backward))
    used = []

    def by_torch(codec: Any, like: torch.Tensor) -> tuple[Any, Any]:
        used.append(codec)
        return kernels_of(codec, like), lambda tensor: tensor

    monkeypatch.setattr("hvd_qsgd.pipeline.coding.kernels_and_arrays", by_torch)
    losses, predicted = train(SimulatedPipeline(stages(2), forward=forward, backward=backward))
    assert losses == expected[0] and (used or name == "uncompressed")
    check_same([predicted], [expected[1]])


def test_an_mpi_that_reaches_the_memory_of_gpus_is_known_by_its_own_word() -> None:
    """Libraries of three kinds play MPI; what mpi4py is linked with is asked in ``test_pipeline_ranks.py``."""
    script = """
from types import SimpleNamespace
import ctypes, mpi4py
mpi4py.rc.initialize = False
from hvd_qsgd.pipeline.transport_mpi import reaches_device_memory
for library in (SimpleNamespace(MPIX_Query_cuda_support=lambda: 1), SimpleNamespace(MPIX_Query_cuda_support=lambda: 0),
                SimpleNamespace()):
    ctypes.CDLL = lambda path: library
    print(reaches_device_memory())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "False"]


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Direction("qsgd"), ConfigError, "must be a codec"),
        (lambda: Direction(Rows(TopK(), 5)), ConfigError, "set per_sample=True"),
        (lambda: Direction(feedback="ef22"), ConfigError, "feedback='ef22' is not one of"),
        (lambda: Direction(QSGD(), "ef-mixed"), ConfigError, "parts the values of TopK"),
        (lambda: Direction(TopK(k=1), "ef-mixed"), ConfigError, "k of 2 or more"),
        (lambda: Direction(QSGD(2, norm="l2"), "ef"), ConfigError, "diverges"),
        (lambda: Direction(TopK(), shared_mask=True), ConfigError, "Use a codec that sends them all"),
        (lambda: Direction(per_sample=True, shared_mask=True), ConfigError, "per_sample=False"),
        (lambda: Direction(warmup_epochs=-1), ConfigError, "warmup_epochs=-1"),
        (lambda: Boundary(Direction(shared_mask=True)), ConfigError, "is for gradients"),
        (lambda: Boundary(backward=Direction(QSGD(), "aq-sgd")), ConfigError, "is for activations"),
        (lambda: Settings(verify_every=0), ConfigError, "verify_every=0"),
        (lambda: Settings(memory_limit=-1), ConfigError, "memory_limit=-1"),
        (lambda: SimulatedPipeline([]), ConfigError, "one stage at least"),
        (lambda: SimulatedPipeline(stages(2), micro_batches=0), ConfigError, "micro_batches=0"),
        (lambda: SimulatedPipeline(stages(4), forward=[Direction()] * 2), ConfigError, "2 entries for 3 boundaries"),
        (lambda: SimulatedPipeline(stages(2)).train_step(cross_entropy, gauss(2, 12)), ConfigError, "give inputs="),
        (lambda: split(nn.Sequential(nn.ReLU()), [1]), ConfigError, "every stage needs a layer"),
        (lambda: ends(Direction())[0].encode(torch.ones(3).long()), UnsupportedError, "torch.int64 of shape"),
        (lambda: ends(Direction())[0].encode(torch.tensor(3.0)), UnsupportedError, "first dimension the batch"),
        (lambda: ends(Direction())[0].encode((1, 2)), UnsupportedError, "it returned tuple"),
        (lambda: ends(Direction(QSGD(), "aq-sgd"))[0].encode(gauss(2, 3)), ConfigError, "pass samples="),
        (lambda: ends(Direction())[0].encode(gauss(2, 3), samples=[1]), ConfigError, "1 numbers for a batch of 2"),
        (lambda: ends(Direction())[0].encode(gauss(2, 3), samples=[1, 1]), ConfigError, "twice in one batch"),
        (lambda: list(actions("zigzag", 0, 2, 2)), ConfigError, "schedule='zigzag' is not one of"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
