"""SIDCo: the threshold of the k largest magnitudes, estimated by fitting a distribution.

Source: Abdelmoniem et al., SIDCo, MLSys 2021 (arXiv 2101.10761), Algorithms 1 and 2, and the
authors' code: a first fit keeps a quarter, further stages fit what exceeds the threshold of
the stage before, and the number of stages follows the achieved number of values. Data without
a variance, like a Cauchy distribution, is beyond the fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

FITS = ("exponential", "pareto", "gamma")
#: Share of the values that the first of several stages keeps.
FIRST_RATIO = 0.25
#: Steps between two changes of the number of stages, and the bounds of k_achieved / k that cause one.
ADAPT_EVERY = 5
TOO_MANY, TOO_FEW = 1.2, 0.8
GAMMA_ITERATIONS = 20


#: Of float32 magnitudes of any backend: mean, variance, and mean of the logarithms of those that are not zero.
Moments = Callable[[Any], tuple[float, float, float]]


def moments(magnitudes: np.ndarray) -> tuple[float, float, float]:
    values = magnitudes.astype(np.float64)
    return float(values.mean()), float(values.var()), float(np.log(values[values > 0]).mean())


def threshold(magnitudes: Any, ratio: float, fit: str, stages: int, moments: Moments = moments) -> float:
    """A magnitude that about ``ratio`` of ``magnitudes`` (float32, no zeros) exceed.

    ``fit`` is of the first stage; later ones, whose data is a tail, use the generalized Pareto
    distribution unless the first is exponential.
    """
    if not len(magnitudes):
        return 0.0
    first = ratio if stages == 1 else max(FIRST_RATIO, ratio)
    found = tail(moments(magnitudes), first, fit)
    if stages == 1 or ratio >= FIRST_RATIO:
        return found
    later = (ratio / FIRST_RATIO) ** (1 / (stages - 1))
    fit = "exponential" if fit == "exponential" else "pareto"
    for _ in range(stages - 1):
        lowest = float(np.float32(found))
        magnitudes = magnitudes[magnitudes > lowest]
        # The excess over the threshold is what has the fitted distribution.
        if len(magnitudes) < 2:
            break
        found += tail(moments(magnitudes - lowest), later, fit)
    return found


def tail(moments: tuple[float, float, float], ratio: float, fit: str) -> float:
    """What a value exceeds with probability ``ratio``, by a distribution fitted to the :data:`Moments` of some."""
    mean, variance, mean_log = moments
    if fit == "exponential" or variance <= 0:
        return -mean * math.log(ratio)
    if fit == "pareto":
        shape = (mean * mean / variance - 1) / 2
        scale = mean * (mean * mean / variance + 1) / 2
        if abs(shape) < 1e-9:
            return -scale * math.log(ratio)
        return scale * (1 - ratio**shape) / shape
    spread = math.log(mean) - mean_log
    if spread <= 0:
        return mean
    shape = (3 - spread + math.sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread)
    # The upper incomplete gamma function is about x^(shape-1) e^-x (1 + (shape-1)/x) for small ratios. Its
    # inverse starts from the paper's expression, which has the first term only.
    found = start = max(-(math.log(ratio) + math.lgamma(shape)), 1.0)
    for _ in range(GAMMA_ITERATIONS):
        found = max(start + (shape - 1) * math.log(found) + math.log1p(max((shape - 1) / found, -0.5)), 1e-3)
    return mean / shape * found


def most_stages(ratio: float) -> int:
    return max(1, math.ceil(math.log(ratio) / math.log(0.5)))


def adapt(memory: dict[str, Any], achieved: float, ratio: float) -> None:
    """Count one step that sent ``achieved`` times the wanted number of values, and follow with the stages."""
    memory["steps"] = memory.get("steps", 0) + 1
    memory["achieved"] = memory.get("achieved", 0.0) + achieved
    if memory["steps"] < ADAPT_EVERY:
        return
    mean = memory["achieved"] / memory["steps"]
    change = (mean < TOO_FEW) - (mean > TOO_MANY)
    memory["stages"] = min(max(memory.get("stages", 1) + change, 1), most_stages(ratio))
    memory["steps"], memory["achieved"] = 0, 0.0
