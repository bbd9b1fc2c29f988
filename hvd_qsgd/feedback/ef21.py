"""EF21: ranks send the compressed change of an estimate of their gradient.

Source: Richtarik, Sokolov, Fatkhullin, EF21, NeurIPS 2021 (arXiv 2106.05203), Algorithm 2:
c_i = C(x_i - g_i), g_i += c_i, g += mean c_i, and the step is taken along g.
The estimates start at zero, so that the first message is C(x_i).

Invariant: g = mean of g_i over ranks, with the same bits of g on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.feedback.base import Feedback
from hvd_qsgd.feedback.store import Store

#: What rounding may add to the difference of g and mean g_i, relative to their largest value: 1 % was seen a few steps
#: after gradients had become 10^5 times smaller.
TOLERANCE = 3e-2
#: The same relative to the largest value of all tensors: what is left where gradients have become zero.
ROUNDING = 1e-5


@dataclass(eq=False)
class EF21(Feedback):
    """Keeps an estimate ``own`` of this rank's gradient and ``mean``, the mean of those of all ranks.

    With stochastic gradients it needs large batches or momentum in the optimizer (Fatkhullin
    et al., Momentum provably improves error feedback, NeurIPS 2023). Both arrays are kept in
    float32: they are the sums of all messages, and what is lost of them is never sent again.
    """

    name: ClassVar[str] = "ef21"
    linked: ClassVar[bool] = True

    def start(self) -> None:
        self.own = Store()
        self.mean = Store()
        self._pending: dict[str, Any] = {}

    def correct(self, name: str, x: Any, ranks: int = 1) -> Any:
        own = self.own.get_for(name, x)
        # The exchange may write its result over the gradient.
        pending = self._pending[name] = self.own.room(name, x)
        pending[...] = x
        return x + 0 if own is None else x - own

    def keep(self, name: str, error: Any, mean: Any = None) -> None:
        own = self._pending.pop(name)
        own -= error
        self.own.put(name, own)
        if name in self.mean:
            mean += self.mean.get(name)
        copy = self.mean.room(name, mean)
        copy[...] = mean
        self.mean.put(name, copy)

    def discard(self, name: str, error: Any, mean: Any = None) -> None:
        del self._pending[name]
        if name in self.mean:
            mean += self.mean.get(name)

    def resized(self, arrays: dict[str, Any]) -> dict[str, Any]:
        # The mean goes on as it is, also when the estimates of lost ranks, which are in it, are gone.
        means = {path: array for path, array in arrays.items() if path.startswith("mean/")}
        return {**means, **{f"own/{path.removeprefix('mean/')}": array + 0 for path, array in means.items()}}

    def check(self, average: Callable[[str, Any], Any]) -> None:
        found = {}
        for name in sorted(self.own.names()):
            estimate, averaged = self.mean.get(name), average(name, self.own.get(name))
            found[name] = float(abs(estimate - averaged).max()), float(abs(averaged).max())
        overall = max((largest for _, largest in found.values()), default=0.0)
        for name, (error, largest) in found.items():
            if not error <= max(TOLERANCE * largest, ROUNDING * overall):
                raise ExchangeError(
                    f"EF21: the estimate of {name!r} differs by {error:.3g} from the mean of those of all ranks, whose "
                    f"largest value is {largest:.3g}; some ranks' state was lost or is of another step. Start again "
                    f"with compressor.reset() on all ranks, or load the states that were saved together."
                )
