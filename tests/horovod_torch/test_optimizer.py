"""hvd.DistributedOptimizer with compression=: every reduced gradient against the references in rank_checks.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from expectations import assert_equal, assert_within_a_level, reference_allgather, reference_allreduce
from rank_checks import (
    LR,
    apply_gradients,
    assert_same_on_all_ranks,
    backward,
    check_gradients,
    digest,
    dyadic,
    gather,
    make_gradients,
    make_optimizer,
    make_parameters,
    reduce_gradients,
    train,
)

from hvd_qsgd import QSGD, Cast, Codec, Identity, TopK
from hvd_qsgd.errors import UnsupportedError
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.torch import (
    CastCompressor,
    Compressor,
    DGCCompressor,
    IdentityCompressor,
    QSGDCompressor,
    TopKCompressor,
)

#: Biases and what is small are not compressed.
SHAPES = {"conv.weight": (8, 4, 7, 9), "conv.bias": (8,), "head.weight": (50, 61), "head.bias": (50,), "tiny": (9, 9)}
BYPASSED = {"conv.bias", "head.bias", "tiny"}


def check_training(compression: Any, codec: Codec, **checks: Any) -> None:
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compression)
    for step in range(2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, raw)
        check_gradients(parameters, raw, codec, step, **checks)
        apply_gradients(optimizer)
        assert_same_on_all_ranks(parameters.values())


@pytest.mark.parametrize(
    ("compressor", "codec"),
    [
        *((QSGDCompressor(bits, exchange="allgather"), QSGD(bits)) for bits in range(2, 9)),
        (QSGDCompressor(norm="l2", bucket_size=64, exchange="allgather"), QSGD(norm="l2", bucket_size=64)),
        (TopKCompressor(error_feedback=False), TopK()),
        (TopKCompressor(k=50, values="float16", error_feedback=False), TopK(k=50, values="float16")),
        (IdentityCompressor(exchange="allgather"), Identity()),
        (CastCompressor(exchange="allgather"), Cast()),
        (CastCompressor("bfloat16", exchange="allgather"), Cast("bfloat16")),
    ],
    ids=repr,
)
def test_codecs(compressor: Compressor, codec: Codec) -> None:
    check_training(compressor, codec)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_allreduce_exchange(bits: int) -> None:
    check_training(QSGDCompressor(bits, exchange="allreduce"), QSGD(bits), reference=reference_allreduce)


@pytest.mark.parametrize("exchange", ["scatter_gather", "by_ranks"])
def test_scatter_gather_exchange(exchange: str) -> None:
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, QSGDCompressor(8, exchange=exchange))
    for step in range(2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, raw)
        for name in sorted(SHAPES.keys() - BYPASSED):
            assert_within_a_level(QSGD(8), parameters[name].grad, gather(raw[name]), roundings=2)
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        apply_gradients(optimizer)


@pytest.mark.parametrize("kind", [QSGDCompressor, TopKCompressor, IdentityCompressor, CastCompressor])
def test_a_class_trains_like_an_instance(kind: type[Compressor]) -> None:
    results = []
    for compression in (kind, kind()):
        if compression is kind:
            kind._default = None  # Other tests have used it.
        parameters = make_parameters(SHAPES)
        train(make_optimizer(parameters, compression), parameters, range(3))
        assert_same_on_all_ranks(parameters.values())
        results.append(digest(parameters.values()))
    assert_equal(*results)


def test_step_applies_the_reduced_gradient() -> None:
    parameters, untouched = make_parameters(SHAPES), make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"))
    raw = make_gradients(parameters)
    backward(parameters, raw)
    optimizer.step()
    check_gradients(parameters, raw, QSGD(), 0)
    for name, parameter in parameters.items():
        assert_equal(parameter, untouched[name] - LR * parameter.grad)


def test_optimizers_of_layers_each_with_a_compressor_of_its_own() -> None:
    layers = [make_parameters({f"{i}.weight": (40, 50), f"{i}.bias": (50,)}) for i in range(3)]
    optimizers = [make_optimizer(parameters, QSGDCompressor(exchange="allgather")) for parameters in layers]
    for step in range(2):
        raw = [make_gradients(parameters, step) for parameters in layers]
        for optimizer, parameters, gradients in zip(optimizers, layers, raw):
            optimizer.zero_grad()
            backward(parameters, gradients)
        # Whoever is last in the backward pass may step first, and ranks need not do the same.
        for i in [2, 0, 1] if hvd.rank() == 0 else [0, 1, 2]:
            optimizers[i].step()
        for parameters, gradients in zip(layers, raw):
            check_gradients(parameters, gradients, QSGD(), step)


@pytest.mark.parametrize("exchange", exchanges_for(QSGD()))
def test_ranks_may_list_their_parameters_in_any_order(exchange: str) -> None:
    """As where a model's parameters are sorted into groups by way of a set."""
    parameters = make_parameters({f"{i}.weight": (20 + i, 60) for i in range(12)})
    own = dict(list(parameters.items())[:: 1 if hvd.rank() == 0 else -1])
    compressor = QSGDCompressor(8, exchange=exchange, fusion_elements=3000, min_elements=1300)
    optimizer = make_optimizer(own, compressor)
    for step in range(2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, own, {name: raw[name] for name in own})
        for name, parameter in parameters.items():
            assert_within_a_level(QSGD(8), parameter.grad, gather(raw[name]), roundings=2)
        assert_same_on_all_ranks([parameter.grad for parameter in parameters.values()])
        apply_gradients(optimizer)


def test_a_rank_may_have_frozen_layers_that_others_lack() -> None:
    parameters = make_parameters({"head": (40, 50)})
    if hvd.rank() == 0:
        parameters = {"backbone": torch.nn.Parameter(torch.ones(60, 70), requires_grad=False), **parameters}
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"))
    head = {"head": parameters["head"]}
    raw = make_gradients(head)
    reduce_gradients(optimizer, head, raw)
    check_gradients(head, raw, QSGD(), 0)


LISTS = [["conv.weight", "conv.bias", "tiny"], ["head.bias", "head.weight"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"op": hvd.Average},
        {"op": hvd.Sum},
        {"gradient_predivide_factor": 2.0},
        {"gradient_predivide_factor": 3.0},
        {"groups": 1},
        {"groups": 2},
        {"groups": LISTS},
        {"groups": LISTS[:1]},
        {"groups": 2, "op": hvd.Sum},
        {"groups": 1, "gradient_predivide_factor": 3.0},
    ],
    ids=str,
)
def test_operations_factors_and_groups(settings: dict[str, Any]) -> None:
    parameters = make_parameters(SHAPES)
    factor = hvd.size() if settings.get("op") == hvd.Sum else 1.0
    if isinstance(settings.get("groups"), list):
        settings = {**settings, "groups": [[parameters[name] for name in group] for group in settings["groups"]]}
    if settings.get("gradient_predivide_factor") == 3.0:
        # Horovod's own thirds are not exact; only compressed gradients are.
        parameters = {name: p for name, p in parameters.items() if name not in BYPASSED}
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"), **settings)
    for step in range(2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, raw)
        check_gradients(parameters, raw, QSGD(), step, factor=factor)
        apply_gradients(optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [None, 1])
def test_dtypes(dtype: torch.dtype, groups: int | None) -> None:
    parameters = make_parameters(SHAPES, dtype)
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"), groups=groups)
    for step in range(2):
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, raw)
        check_gradients(parameters, raw, QSGD(), step)
        apply_gradients(optimizer)


@pytest.mark.parametrize("groups", [None, 2])
def test_several_backward_passes_per_step(groups: int | None) -> None:
    parameters = make_parameters(SHAPES)
    settings = {"backward_passes_per_step": 3, "groups": groups}
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"), **settings)
    # In the second step and the last, step() comes early.
    for step, passes in enumerate([3, 1, 3, 2]):
        optimizer.zero_grad()
        raws = [make_gradients(parameters, 10 * step + i) for i in range(passes)]
        for raw in raws:
            backward(parameters, raw)
        optimizer.synchronize()
        check_gradients(parameters, {name: sum(raw[name] for raw in raws) for name in SHAPES}, QSGD(), step)
        apply_gradients(optimizer)


def test_parameters_without_names() -> None:
    parameter = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1), compression=QSGDCompressor(exchange="allgather")
    )
    named = {"allreduce.noname.0.0": parameter}
    raw = make_gradients(named)
    reduce_gradients(optimizer, named, raw)
    check_gradients(named, raw, QSGD(), 0)


# -- gradients that do not come, or come in other forms -------------------------------------


@pytest.mark.parametrize("exchange", ["allgather", "by_ranks"])
def test_parameters_that_only_some_ranks_use(exchange: str) -> None:
    shapes = {f"branch{i}": (40, 50) for i in range(6)}
    parameters = make_parameters(shapes)
    # 2100 elements: one tensor a bundle, so that bundles come in different orders.
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange=exchange, fusion_elements=2100))
    for step in range(3):
        raw = make_gradients(parameters, step)
        used = {name for i, name in enumerate(shapes) if (i + step + hvd.rank()) % 3 == 0}
        reduce_gradients(optimizer, parameters, {name: raw[name] for name in used})
        expected = {name: raw[name] * (name in used) for name in shapes}
        if exchange == "allgather":
            check_gradients(parameters, expected, QSGD(), step)
        for name in shapes:
            assert_within_a_level(QSGD(), parameters[name].grad, gather(expected[name]), roundings=2)
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        apply_gradients(optimizer)


@pytest.mark.parametrize("as_dense", [True, False])
def test_sparse_gradients(as_dense: bool) -> None:
    parameters = make_parameters({"embedding": (200, 16), "after": (30, 40), "before": (30, 40)})
    compressor = QSGDCompressor(exchange="allgather")
    optimizer = make_optimizer(parameters, compressor, sparse_as_dense=as_dense)
    for step in range(3):
        optimizer.zero_grad()
        raw = make_gradients({name: parameters[name] for name in ("before", "after")}, step)
        rows = torch.tensor([3, hvd.rank(), 7, 3, 199])
        weights = dyadic((5, 16), seed=step)
        loss = (F.embedding(rows, parameters["embedding"], sparse=True) * weights).sum()
        (loss + sum((parameters[name] * raw[name]).sum() for name in raw)).backward()
        optimizer.synchronize()
        raw["embedding"] = torch.zeros(200, 16).index_add(0, rows, weights)
        assert parameters["embedding"].grad.is_sparse
        check_gradients(parameters, raw, QSGD(), step, bypassed=set() if as_dense else {"embedding"})
        apply_gradients(optimizer)
    assert ("embedding" in compressor.stats().tensors) == as_dense


@pytest.mark.parametrize("exchange", ["allgather", "allreduce"])
def test_memory_formats(exchange: str) -> None:
    parameters = {
        "transposed": torch.nn.Parameter(torch.zeros(60, 50).t()),
        "channels_last": torch.nn.Parameter(torch.zeros(8, 6, 7, 9).to(memory_format=torch.channels_last)),
        "plain": torch.nn.Parameter(torch.zeros(40, 50)),
    }
    compressor = QSGDCompressor(exchange=exchange)
    optimizer = make_optimizer(parameters, compressor)
    reference = {"allgather": reference_allgather, "allreduce": reference_allreduce}[exchange]
    for step in range(2):
        raw = make_gradients(parameters, step)
        optimizer.zero_grad()
        backward(parameters, raw)
        assert not parameters["transposed"].grad.is_contiguous()
        optimizer.synchronize()
        check_gradients(parameters, raw, QSGD(), step, reference=reference)
        apply_gradients(optimizer)
    # Gradients that no backward pass made, in memory that is not even dense.
    raw = make_gradients(parameters, 2)
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros(*parameter.shape, 2)[..., 0].copy_(raw[name])
    optimizer.synchronize()
    check_gradients(parameters, raw, QSGD(), 2, reference=reference)


def gradients_of_users(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Memory that belongs to the user, for gradients of all kinds of shapes and strides."""
    flat = torch.zeros(8000, dtype=dtype)
    return {
        "part": flat[:2000].view(40, 50),
        "transposed": flat[2000:4000].view(40, 50).t(),
        "small part": flat[4000:4100].view(10, 10),
        "bias": flat[4100:4150],
        "scalar": flat[4150],
        "gaps": torch.zeros(40, 50, 2, dtype=dtype)[..., 0],
        "bias with gaps": torch.zeros(50, 2, dtype=dtype)[:, 0],
        "channels_last": torch.zeros(8, 6, 7, 9, dtype=dtype).to(memory_format=torch.channels_last),
        "small channels_last": torch.zeros(2, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize(
    ("dtype", "make", "settings"),
    [
        *((dtype, IdentityCompressor, {}) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
        (torch.bfloat16, IdentityCompressor, {"groups": 2}),
        (torch.float16, lambda: IdentityCompressor(min_elements=0, min_dims=0, error_feedback=True), {"op": hvd.Sum}),
        (torch.bfloat16, lambda: IdentityCompressor(exchange="auto"), {}),
        (torch.float32, lambda: DGCCompressor(1.0, momentum=0.0, warm_up=()), {}),
    ],
    ids=["float32", "float64", "float16", "bfloat16", "groups", "sum of all", "auto", "dgc"],
)
def test_results_are_in_the_memory_of_the_gradients(dtype: torch.dtype, make: Any, settings: dict[str, Any]) -> None:
    """As Horovod's own are: what users keep there may be cleared, scaled or clipped as a whole."""
    memory = gradients_of_users(dtype)
    parameters = {name: torch.nn.Parameter(torch.zeros_like(gradient)) for name, gradient in memory.items()}
    optimizer = make_optimizer(parameters, make(), **settings)
    for name, gradient in memory.items():
        # Horovod changes what this object shows, not the other one.
        parameters[name].grad = gradient.view(gradient.shape)
    for step in range(4):
        raw = make_gradients(parameters, step)
        for name, gradient in memory.items():
            gradient.copy_(raw[name])
        if step != 2:
            optimizer.synchronize()
        optimizer.step()  # Twice without skip_synchronize(): what comes again is left there as well.
        # Then Horovod's sums are sums of sums.
        times = hvd.size() ** (1 if step == 2 else 2) if settings.get("op") == hvd.Sum else 1
        for name, gradient in memory.items():
            assert_equal(gradient, (torch.stack(gather(raw[name])).mean(0) * times).to(dtype))
            grad = parameters[name].grad
            assert (grad.data_ptr(), grad.stride()) == (gradient.data_ptr(), gradient.stride()), name
        assert_same_on_all_ranks(memory.values())


def test_a_gradient_whose_elements_share_memory_gets_memory_of_its_own() -> None:
    parameter = torch.nn.Parameter(torch.zeros(40, 50))
    parameter.grad = torch.full((1,), float(hvd.rank())).expand(40, 50)
    make_optimizer({"expanded": parameter}, IdentityCompressor()).synchronize()
    assert_equal(parameter.grad, torch.full((40, 50), (hvd.size() - 1) / 2))


def test_layers_that_are_frozen_and_unfrozen() -> None:
    parameters = make_parameters({"backbone": (40, 50), "head": (30, 40)})
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"))
    for step, trained in enumerate([("backbone", "head"), ("head",), ("head",), ("backbone", "head")]):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        before = parameters["backbone"].detach().clone()
        raw = make_gradients(parameters, step)
        reduce_gradients(optimizer, parameters, {name: raw[name] for name in trained})
        expected = {name: raw[name] * (name in trained) for name in raw}
        check_gradients(parameters, expected, QSGD(), step)
        apply_gradients(optimizer)
        assert torch.equal(parameters["backbone"], before) == ("backbone" not in trained)


def test_what_is_frozen_when_the_optimizer_is_made_is_left_alone() -> None:
    parameters = make_parameters({"backbone": (40, 50), "head": (30, 40)})
    parameters["backbone"].requires_grad_(False)
    compressor = QSGDCompressor(exchange="allgather")
    optimizer = make_optimizer(parameters, compressor)
    head = {"head": parameters["head"]}
    raw = make_gradients(head)
    reduce_gradients(optimizer, head, raw)
    check_gradients(head, raw, QSGD(), 0)
    assert parameters["backbone"].grad is None
    assert set(compressor.stats().tensors) == {"head"}


@pytest.mark.parametrize(("before", "after"), [((40, 50), (60, 50)), ((5, 5), (50, 50))])
def test_a_parameter_whose_shape_has_changed(before: tuple[int, int], after: tuple[int, int]) -> None:
    # What is started before the refusal stays with Horovod, so each case has a name of its own.
    name = f"grows.from.{before}"
    parameters = make_parameters({name: before})
    compressor = QSGDCompressor(exchange="allgather")
    optimizer = make_optimizer(parameters, compressor)
    train(optimizer, parameters, [0])
    parameters[name].data = torch.zeros(after)
    raw = make_gradients(parameters, 1)
    parameters[name].grad = raw[name].clone()
    with pytest.raises(UnsupportedError, match=r"call compressor\.replan\(\) on all ranks"):
        optimizer.synchronize()
    compressor.replan()
    optimizer.synchronize()
    assert_within_a_level(QSGD(), parameters[name].grad, gather(raw[name]))
    assert_same_on_all_ranks([parameters[name].grad])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda compressor: pickle.loads(pickle.dumps(compressor))])
def test_copies_go_on_like_the_original(copied: Callable[[Any], Any]) -> None:
    """As where a launcher sends a compressor to its ranks."""
    original, resumed = TopKCompressor(0.1), TopKCompressor(0.1)
    parameters = make_parameters(SHAPES)
    train(make_optimizer(parameters, original), parameters, range(2))
    resumed.load_state_dict(original.state_dict())
    ends = []
    for compressor in (resumed, copied(original), copied(original)):
        weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        train(make_optimizer(weights, compressor), weights, range(2, 4))
        ends.append(digest([*weights.values(), *compressor.state_dict()["arrays"].values()]))
    assert_equal(ends[1], ends[0])
    assert_equal(ends[2], ends[0])


@pytest.mark.parametrize("as_class", [False, True])
def test_two_optimizers_share_a_compressor(as_class: bool) -> None:
    # Two networks with equal names, as in adversarial training.
    TopKCompressor._default = None
    compression: Any = TopKCompressor if as_class else TopKCompressor()
    networks = [make_parameters({"weight": (40, 50), "bias": (50,)}) for _ in range(2)]
    optimizers = [make_optimizer(network, compression) for network in networks]
    for step in range(3):
        for i, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            train(optimizer, network, [2 * step + i])
    # As good as each by itself.
    for i, network in enumerate(networks):
        alone = make_parameters({"weight": (40, 50), "bias": (50,)})
        train(make_optimizer(alone, TopKCompressor()), alone, [2 * step + i for step in range(3)])
        assert_equal(digest(network.values()), digest(alone.values()))
    assert set(compression.state_dict()["arrays"]) == {"residual/weight", "residual/weight (2)"}


def test_a_network_with_real_layers() -> None:
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3),
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(128, 20), torch.nn.LayerNorm(20),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, QSGDCompressor(exchange="allgather"))
    inputs = dyadic((4, 3, 16, 16)).to(memory_format=torch.channels_last)
    targets = torch.tensor([1, 5, 7, hvd.rank()])
    weights = {name for name, p in parameters.items() if p.dim() >= 2}
    assert all(parameters[name].numel() >= 1024 for name in weights)
    for step in range(2):
        optimizer.zero_grad()
        # Asked for like this, gradients do not reach Horovod's hooks.
        raw = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(parameters.values()))
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.synchronize()
        for (name, parameter), gradient in zip(parameters.items(), raw, strict=True):
            if name in weights:
                assert_equal(parameter.grad, reference_allgather(QSGD(), gather(gradient), f"{name}", step))
        assert_same_on_all_ranks([p.grad for p in parameters.values()])
        apply_gradients(optimizer)


@pytest.mark.parametrize("settings", [{}, {"exchange": "scatter_gather"}, {"exchange": "allreduce"}], ids=str)
def test_a_seed_repeats_a_run(settings: dict[str, Any]) -> None:
    runs = []
    for seed in (1, 1, 2):
        parameters = make_parameters(SHAPES)
        train(make_optimizer(parameters, QSGDCompressor(seed=seed, **settings)), parameters, range(3))
        runs.append(digest(parameters.values()))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
