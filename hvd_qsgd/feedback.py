"""Error feedback: what compression lost of a gradient is added to the next one.

Source: Seide et al., 1-bit SGD, Interspeech 2014; Karimireddy et al., Error feedback fixes
SignSGD, ICML 2019 (arXiv 1901.09847), Algorithm 2. Residuals are kept for gradients, not
for steps, so a change of the learning rate applies to them as well.

Invariant: input + old residual = own decoded payload + new residual.
"""

from __future__ import annotations

from typing import Any

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError


class ErrorFeedback:
    """Residuals of this rank, flat float32 arrays of any backend, by tensor name."""

    def __init__(self) -> None:
        self.residuals: dict[str, Any] = {}
        #: The memory of the residuals before, for the sums to come.
        self._spare: dict[str, Any] = {}

    def correct(self, name: str, x: Any) -> Any:
        """``x`` plus the residual of that name; to be given back to :meth:`keep` or :meth:`discard`."""
        residual = self.residuals.get(name)
        if residual is None:
            return x + 0
        if len(residual) != len(x):
            raise ConfigError(
                f"Error feedback holds a residual of {len(residual)} elements for {name!r}, but a gradient of {len(x)} "
                f"elements came. If the model changed, forget the old residuals with compressor.reset()."
            )
        corrected = self._spare.pop(name, None)
        if corrected is None:
            return x + residual
        corrected[...] = residual
        corrected += x
        return corrected

    def keep(self, name: str, error: Any) -> None:
        """Make ``error``, which was made by :meth:`correct`, the residual of that name."""
        if name in self.residuals:
            self._spare[name] = self.residuals[name]
        self.residuals[name] = error

    def discard(self, name: str, error: Any) -> None:
        """Leave the residual as it was."""
        self._spare[name] = error

    def replace(self, residuals: dict[str, Any]) -> None:
        """Start from these residuals."""
        self.residuals = residuals
        self._spare.clear()


def check_feedback(codec: Codec) -> None:
    """Refuse error feedback around a codec with which residuals grow without bound.

    A residual shrinks only if the codec's relative error is below 1. For stochastic rounding
    with L2 norm that error is bounded by min(d/s^2, sqrt(d)/s) (QSGD, Lemma 3.1), and at 4
    bits and buckets of 512 residuals were seen to grow 80000-fold in 200 steps.

    Raises:
        ConfigError: naming the two remedies.
    """
    if getattr(codec, "norm", None) != "l2" or getattr(codec, "rounding", None) != "stochastic":
        return
    bound = codec.variance_bound()  # type: ignore[attr-defined]
    if bound >= 1:
        raise ConfigError(
            f"Error feedback around {codec} diverges: min(d/s^2, sqrt(d)/s) = {bound:.2f} is not below 1. "
            f'Use rounding="nearest", or error_feedback=False: stochastic rounding is unbiased and does not need it.'
        )
