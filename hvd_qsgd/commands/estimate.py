"""Will compression help? Predicted step times, from a model's size, the network and this machine's codecs.

The model is that of ``exchange="auto"`` (:mod:`hvd_qsgd.tuning.cost`), on a network that is described, not measured.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvd_qsgd.codecs import QSGD, Codec, TopK
from hvd_qsgd.commands.job import check_launched
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import exchanges_for
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.reduction.fusion import BUNDLE_ELEMENTS
from hvd_qsgd.reduction.progress import run_exchange
from hvd_qsgd.text import shortened
from hvd_qsgd.tuning.cost import COLLECTIVES, MARGIN, UNCOMPRESSED, Costs, decide, measure_codec, measure_costs

CODECS: dict[str, Codec] = {
    "QSGD, 8 bits": QSGD(8),
    "QSGD, 4 bits": QSGD(),
    "QSGD, 2 bits, buckets of 128": QSGD(2, 128),
    "TopK, 1 %": TopK(0.01),
}
#: Bit/s between which the break-even bandwidth is looked for.
SLOWEST, FASTEST = 1e6, 1e12
#: Seconds for an element to encode, decode and send through lanes, of each codec.
Speeds = dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Situation:
    """What a step is made of.

    Args:
        parameters: number of gradient elements.
        ranks: of the job.
        bandwidth: bit/s that a rank can send.
        latency: seconds for a collective of a few bytes.
        compute: seconds of a step without any communication.
        backward: the part of ``compute`` behind which transfers can hide.
        slowness: how many times longer a byte takes than the bandwidth says, by collective; 1 where none is given.

    Raises:
        ConfigError: a value is out of range.
    """

    parameters: int
    ranks: int
    bandwidth: float
    latency: float = 1e-3
    compute: float = 0.0
    backward: float = 0.0
    slowness: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parameters < 1 or self.ranks < 2:
            raise ConfigError(
                f"parameters={self.parameters} and ranks={self.ranks}: there must be at least 1 parameter and 2 ranks."
            )
        if not self.bandwidth > 0 or not self.latency >= 0 or not 0 <= self.backward <= self.compute:
            raise ConfigError(
                f"bandwidth={self.bandwidth:g} bit/s must be above 0, latency={self.latency:g} s at least 0, and the "
                f"backward pass ({self.backward:g} s) a part of the step ({self.compute:g} s)."
            )

    @property
    def bundles(self) -> int:
        return -(-self.parameters // BUNDLE_ELEMENTS)


@dataclass(frozen=True)
class Prediction:
    """One way to send gradients: the step in seconds, and how many times faster it is than uncompressed."""

    method: str
    exchange: str
    seconds: float
    speedup: float
    #: Bit/s up to which the method pays; 0 if it never does, infinite if it does everywhere looked at.
    break_even: float

    @property
    def pays(self) -> bool:
        return self.speedup > 1 / (1 - MARGIN)


def measure_codecs() -> Speeds:
    """Seconds for an element to encode, decode and send through lanes, of each codec, on this machine's CPU."""
    return {name: measure_codec(kernels_for(codec, "numba"), np.empty) for name, codec in CODECS.items()}


def measure_job(parameters: int, compute: float = 0.0, backward: float = 0.0) -> tuple[int, Situation, Speeds]:
    """This process's rank, and what was measured between the ranks of its job; call it on all of them.

    The bandwidth is that of an allreduce of some MB, and codecs are as fast as on the slowest rank, with all ranks
    encoding at once. The other arguments are those of :class:`Situation`.

    Raises:
        SetupError: this process was not started by a launcher.
    """
    check_launched("hvd-qsgd estimate --measure")
    import horovod.torch as hvd

    from hvd_qsgd.collectives.horovod_torch import HorovodCollectives

    hvd.init()
    collectives = HorovodCollectives()
    measured = {
        name: run_exchange(
            measure_costs(kernels_for(codec, "numba"), collectives.ranks, np.empty, f"estimate.{name}"), collectives
        )
        for name, codec in CODECS.items()
    }
    byte = {name: statistics.median(costs.byte[name] for costs in measured.values()) for name in COLLECTIVES}
    latency = statistics.median(costs.start for costs in measured.values())
    slowness = {name: seconds / byte["allreduce"] for name, seconds in byte.items()}
    ranks = collectives.ranks
    situation = Situation(parameters, ranks, 8 / byte["allreduce"], latency, compute, backward, slowness)
    return collectives.rank, situation, {name: (c.encode, c.decode, c.lanes) for name, c in measured.items()}


def count_parameters(path: str) -> int:
    """The number of trainable values of a torch module or Keras model, given as "package.module:name".

    The name stands for the model, or for a class or function that makes it without arguments.

    Raises:
        ConfigError: it cannot be imported or made, or is no model.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"--model {path!r} must be package.module:name, such as torchvision.models:resnet50.")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        model = found if _is_model(found) else found()
        is_model, parts = _is_model(model), _parts(model)
        lazy = any(hasattr(part, "materialize") for part in parts)
        counts = [] if lazy else [math.prod(part.shape) for part in parts]
    except (Exception, SystemExit) as error:  # whatever code that is not ours may raise
        raise ConfigError(f"--model {path!r} cannot be imported or made: {last_line(error)}") from None
    if lazy:
        raise ConfigError(
            f"--model {path!r} has layers whose parameters have no shape before the first batch, as LazyLinear. Name a "
            f"function that makes the model, runs it once on a batch, and returns it."
        )
    if not is_model:
        raise ConfigError(
            f"--model {path!r} is of the type {type(model).__name__}, and neither a torch module nor a Keras model."
        )
    if not counts:
        raise ConfigError(
            f"--model {path!r} has no parameters to train. Either they are frozen, or it is a Keras model that must be "
            f"built first: give it an input shape."
        )
    return sum(counts)


def last_line(error: BaseException) -> str:
    """The type of an error and the last line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {shortened(lines[-1].strip(), 300)}" if lines else type(error).__name__


def _is_model(value: Any) -> bool:
    """Whether it looks like a torch module or a Keras model, and not like a class of them."""
    named = callable(getattr(value, "parameters", None)) or hasattr(type(value), "trainable_variables")
    return named and not isinstance(value, type)


def _parts(model: Any) -> list[Any]:
    """Trainable parameters of a torch module, or variables of a Keras model; none of anything else."""
    if not _is_model(model):
        return []
    if callable(getattr(model, "parameters", None)):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(model.trainable_variables)


def predict(situation: Situation, speeds: Speeds) -> list[Prediction]:
    """Uncompressed, half precision and every codec at its best exchange, in this order."""
    base = situation.compute + _uncompressed(situation, 1.0)
    half = situation.compute + _uncompressed(situation, 0.5)
    predictions = [
        Prediction("Horovod, uncompressed", "", base, 1.0, 0.0),
        Prediction("hvd.Compression.fp16", "", half, base / half, float("inf")),
    ]
    for name, codec in CODECS.items():
        predicted = _decide(situation, codec, speeds[name]).predicted
        exchange = min(exchanges_for(codec), key=lambda e: predicted[e])
        seconds = situation.compute + predicted[exchange]
        predictions.append(
            Prediction(name, exchange, seconds, base / seconds, _break_even(situation, codec, speeds[name]))
        )
    return predictions


def costs(situation: Situation, speeds: tuple[float, float, float]) -> Costs:
    """The cost model of a situation."""
    byte = {name: situation.slowness.get(name, 1.0) * 8 / situation.bandwidth for name in COLLECTIVES}
    return Costs(situation.latency, 0.0, byte, *speeds)


def _decide(situation: Situation, codec: Codec, speeds: tuple[float, float, float]) -> Any:
    return decide(
        costs(situation, speeds),
        codec,
        situation.parameters,
        situation.ranks,
        situation.bundles,
        situation.backward,
    )


def _uncompressed(situation: Situation, share: float) -> float:
    """Exposed seconds of Horovod's own allreduce of a share of the bytes."""
    elements = int(situation.parameters * share)
    model = costs(situation, (0.0, 0.0, 0.0))
    return model.predict(UNCOMPRESSED, QSGD(), elements, situation.ranks, hidden=situation.backward)


def _break_even(situation: Situation, codec: Codec, speeds: tuple[float, float, float]) -> float:
    """The bandwidth above which the codec is not worth it, within 1 %."""

    def pays(bandwidth: float) -> bool:
        there = Situation(**{**vars(situation), "bandwidth": bandwidth})
        predicted = _decide(there, codec, speeds).predicted
        best = min(predicted[exchange] for exchange in exchanges_for(codec))
        without = situation.compute + predicted[UNCOMPRESSED]
        return situation.compute + best < (1 - MARGIN) * without

    low, high = SLOWEST, FASTEST
    if not pays(low):
        return 0.0
    if pays(high):
        return float("inf")
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
