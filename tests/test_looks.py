"""What the host must see of a device: of all tensors of an exchange together, and before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import pytest
from checkers import check_same_bits, flip_bit, gauss, guarded, hard_arrays, make_jobs, run_torch_exchange

from hvd_qsgd import Codec, EliasQSGD, GlobalTopK, IntSGD, PayloadError, RowTopK, ThresholdTopK, TopK
from hvd_qsgd.codecs.readback import Looks, at_once, together
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.exchanges import Job, Piece, exchanges_for, start_exchange
from hvd_qsgd.exchanges.base import AllGather, Steps, ToHost, read_heads
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.reduction.progress import Engine

torch = pytest.importorskip("torch")

CODECS: list[Codec] = [
    TopK(0.1),
    TopK(0.1, values="float16"),
    TopK(1),
    TopK(k=10**6),
    GlobalTopK(0.1),
    ThresholdTopK(0.1),
    ThresholdTopK(0.1, method="sample"),
    RowTopK(0.1, 64),
    EliasQSGD(),
]


# -- together ---------------------------------------------------------------------------------------


def sums(*arrays: Any) -> Looks[float]:
    """Looks at one array after the other."""
    total = 0.0
    for array in arrays:
        (seen,) = yield [array]
        total += float(seen.sum())
    return total


def test_what_several_look_at_they_look_at_together() -> None:
    looks = together([sums(np.ones(1), np.ones(2)), sums(), sums(np.ones(3))])
    first = next(looks)
    assert [len(array) for array in first] == [1, 3]
    assert [len(array) for array in looks.send(first)] == [2]
    with pytest.raises(StopIteration) as stop:
        looks.send([np.ones(2)])
    assert stop.value.value == [3.0, 0.0, 3.0]
    assert at_once(together([sums(torch.ones(4)), sums(np.ones(5))])) == [4.0, 5.0]


# -- exchanges of tensors ---------------------------------------------------------------------------


def torch_jobs(codec: Codec, inputs: Sequence[Sequence[np.ndarray]], keep_error: bool = False) -> list[Job]:
    """As ``make_jobs``, over torch tensors."""
    jobs = make_jobs(codec, inputs, keep_error=keep_error)
    for job in jobs:
        job.kernels = kernels_for(codec, "torch")
        job.empty = lambda length, dtype: torch.empty(length, dtype=getattr(torch, dtype))
        for piece in job.pieces:
            piece.x, piece.out = torch.from_numpy(piece.x), torch.from_numpy(piece.out)
    return jobs


def hard_inputs(ranks: int) -> list[list[np.ndarray]]:
    """Every rank has something else that is hard in each piece: zeros, few values, NaN, infinities, no elements."""
    arrays = [np.ascontiguousarray(x[:1500], np.float32) for x in hard_arrays().values()]
    return [[np.resize(arrays[(i + 5 * r) % len(arrays)], len(x)) for i, x in enumerate(arrays)] for r in range(ranks)]


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize(
    ("exchange", "codec"), [(exchange, codec) for codec in CODECS for exchange in exchanges_for(codec)], ids=str
)
def test_tensors_end_with_the_bits_of_numpy(exchange: str, codec: Codec, keep_error: bool) -> None:
    inputs = hard_inputs(3)
    if codec.whole_buffer:
        # One value that is not finite spoils them all.
        inputs = [[np.nan_to_num(x, posinf=0, neginf=0) for x in arrays] for arrays in inputs]
    specified, jobs = make_jobs(codec, inputs, keep_error=keep_error), torch_jobs(codec, inputs, keep_error)
    with np.errstate(over="ignore", invalid="ignore"):
        simulate([start_exchange(exchange, job) for job in specified])
        run_torch_exchange(exchange, jobs)
    for job, other in zip(jobs, specified):
        assert (job.wire_bytes, job.payload_bytes) == (other.wire_bytes, other.payload_bytes)
        for piece, expected in zip(job.pieces, other.pieces):
            check_same_bits(piece.out.numpy(), expected.out)
            check_same_bits(piece.x.numpy(), expected.x)
            assert piece.memory == expected.memory


def number_of_looks(exchange: str, codec: Codec, pieces: int, ranks: int, steps: int = 1) -> int:
    """How often the host looks in the last of some steps."""
    memories: list[dict[str, Any]] = [{} for _ in range(pieces * ranks)]
    looks = [0]

    def counted(exchange_steps: Steps) -> Generator[Any, Any, None]:
        outcome = None
        while True:
            try:
                request = exchange_steps.send(outcome)
            except StopIteration:
                return
            looks[0] += isinstance(request, ToHost)
            outcome = yield request

    for step in range(steps):
        inputs = [[gauss(3000 + i, 100 * step + 10 * r + i) for i in range(pieces)] for r in range(ranks)]
        jobs = torch_jobs(codec, inputs, keep_error=True)
        for number, piece in enumerate(piece for job in jobs for piece in job.pieces):
            piece.memory = memories[number]
        looks[0] = 0
        run_torch_exchange(exchange, jobs, counted)
    return looks[0] // ranks


@pytest.mark.parametrize(
    ("exchange", "codec", "looks"),
    [
        ("allgather", TopK(0.1), 5),
        ("allgather", GlobalTopK(0.1), 6),
        ("allgather", RowTopK(0.1, 64), 2),
        ("allgather", EliasQSGD(), 4),
        ("scatter_gather", RowTopK(0.1, 64), 3),
        ("scatter_gather", EliasQSGD(), 7),
        ("intsgd", IntSGD(), 5),
    ],
    ids=str,
)
def test_looks_do_not_grow_with_the_number_of_tensors_or_ranks(exchange: str, codec: Codec, looks: int) -> None:
    """With error feedback: what decides sizes, sizes, headers, whether positions are good, whether means are finite."""
    found = {number_of_looks(exchange, codec, *size, steps=2) for size in ((1, 2), (6, 2), (2, 4))}
    assert found == {looks}


@pytest.mark.parametrize(("method", "most"), [("reuse", 8), ("sample", 18)])
def test_looks_of_a_search_by_threshold_are_bounded(method: str, most: int) -> None:
    codec = ThresholdTopK(0.1, method=method)
    for steps in (1, 2):
        assert number_of_looks("allgather", codec, 9, 2, steps) <= most


# -- nothing is written before it is known to be good ---------------------------------------------------


def damaged(codec: Codec, x: np.ndarray) -> Generator[np.ndarray, None, None]:
    """Payloads that must be refused, by what each look is for."""
    payload = codec.encode(x)
    yield flip_bit(payload, 1)  # the form
    yield payload[:-1]
    # Marks of positions, of which one is missing and one too many.
    set_bits = np.flatnonzero(np.unpackbits(payload[-8:], bitorder="little"))
    yield flip_bit(payload, 8 * (len(payload) - 8) + int(set_bits[0]))


@pytest.mark.parametrize("bad", range(3))
def test_a_bad_payload_of_any_tensor_leaves_all_as_they_were(bad: int) -> None:
    codec, x = TopK(0.1), gauss(1000)
    kernels: Any = kernels_for(codec, "torch")
    good, wrong = torch.from_numpy(codec.encode(x)), torch.from_numpy(list(damaged(codec, x))[bad])
    message = torch.cat([good, good, wrong])
    spans = [(0, len(good)), (len(good), 2 * len(good)), (2 * len(good), len(message))]
    whole, out = guarded(np.ones(1000, np.float32))
    before = whole.copy()
    kernels.average_into(message, spans[:2], torch.from_numpy(out))
    assert (whole != before).any()
    whole[:] = before
    with pytest.raises(PayloadError):
        kernels.average_into(message, spans, torch.from_numpy(out))
    check_same_bits(whole, before)
    with pytest.raises(PayloadError):
        at_once(together([kernels.prepare_decode(good, 1000), kernels.prepare_average(message, spans, 1000)]))


@pytest.mark.parametrize("codec", [TopK(0.1), RowTopK(0.1, 64)], ids=str)
def test_an_exchange_with_a_bad_payload_writes_no_result(codec: Codec) -> None:
    """Of none of its tensors, though the damage is in the last; and the receiving rank names it."""
    inputs = [[gauss(1000, 10 * rank + i) for i in range(3)] for rank in range(2)]
    jobs = torch_jobs(codec, inputs)

    def damage(steps: Steps) -> Generator[Any, Any, None]:
        request = next(steps)
        while True:
            outcome = yield request
            if isinstance(request, AllGather):
                # Of two positions of the last payload.
                outcome[-3:] = 0
            try:
                request = steps.send(outcome)
            except StopIteration:
                return

    with pytest.raises(PayloadError, match=r"not ascending or too large|marks"):
        run_torch_exchange("allgather", jobs, damage)
    for job in jobs:
        for piece in job.pieces:
            assert (piece.out == -77).all()


@pytest.mark.parametrize("place", [0, 4, "second rank", "cut"])
def test_heads_that_lie_are_an_error_on_a_device_too(place: Any) -> None:
    inputs = [[gauss(300 + i, 10 * rank + i) for i in range(2)] for rank in range(3)]

    def damage(steps: Steps) -> Generator[Any, Any, None]:
        request = next(steps)
        while True:
            outcome = yield request
            if isinstance(request, AllGather):
                if place == "cut":
                    outcome = outcome[: len(outcome) // 3 + 5]
                else:
                    outcome[len(outcome) // 3 if place == "second rank" else place] ^= 64
            try:
                request = steps.send(outcome)
            except StopIteration:
                return

    with pytest.raises(ExchangeError, match=r"rank [012] sent something else|bytes came where"):
        run_torch_exchange("allgather", torch_jobs(TopK(0.1), inputs), damage)


@pytest.mark.parametrize("sizes", [(4, 0, 9), (2**32 - 1, 5, 0)])
def test_heads_are_followed_on_a_device_as_on_the_host(sizes: tuple[int, ...]) -> None:
    messages = np.random.default_rng(0).integers(0, 256, 200, np.uint8)
    messages[:16] = np.array([7, *sizes], "<u4").view(np.uint8)
    on_device = read_heads(torch.from_numpy(messages), [16, 8], "heads")
    request = next(on_device)
    assert isinstance(request, ToHost)
    (found,) = ended(lambda: on_device.send(request.array.numpy()))
    (expected,) = ended(lambda: next(read_heads(messages, [16, 8], "heads")))
    assert found[0] == expected[0] == [7, *sizes]
    # Behind the end there is nothing to find.
    assert found[1] == expected[1] or sizes[0] > 200


def ended(resume: Callable[[], Any]) -> tuple[Any, ...]:
    with pytest.raises(StopIteration) as stop:
        resume()
    return (stop.value.value,)


# -- when collectives start ---------------------------------------------------------------------------


class SlowLooks:
    """Collectives of one rank, which notes what is started; a look takes a few questions."""

    rank, ranks = 0, 1

    def __init__(self) -> None:
        self.started: list[str] = []

    def start(self, request: Any) -> Any:
        self.started.append(request.name)
        questions = iter([False] * 3 * isinstance(request, ToHost))

        class Handle:
            def done(self) -> bool:
                return next(questions, True)

            def result(self) -> Any:
                return request.array.numpy() if isinstance(request, ToHost) else request.array

        return Handle()


def test_a_collective_behind_a_look_starts_with_the_next_exchange() -> None:
    """Not when the look has come, which is another moment on each rank."""
    engine, collectives, tasks = Engine(), SlowLooks(), []
    for number in range(3):
        x = torch.from_numpy(gauss(500, number))
        piece = Piece("x", x, torch.empty(500))
        empty = lambda length, dtype: torch.empty(length, dtype=getattr(torch, dtype))  # noqa: E731
        job = Job(f"{number}", [piece], kernels_for(TopK(0.1), "torch"), 0, 1, empty)
        tasks.append(engine.submit(start_exchange("allgather", job), collectives))
        gathers = [name for name in collectives.started if name.endswith("allgather")]
        assert gathers == [f"{before}.allgather" for before in range(number)]
        assert collectives.started[-1] == f"{number}.look"
    for task in tasks:
        engine.wait(task)
    assert all(task.encode_seconds > 0 and task.decode_seconds > 0 for task in tasks)
