"""Which codecs feedback cannot go around."""

from __future__ import annotations

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError


def check_feedback(codec: Codec) -> None:
    """Refuse feedback around a codec with which residuals grow without bound.

    A residual shrinks only if the codec's relative error is below 1. For stochastic rounding
    with L2 norm that error is bounded by min(d/s^2, sqrt(d)/s) (QSGD, Lemma 3.1), and at 4
    bits and buckets of 512 residuals were seen to grow 80000-fold in 200 steps.

    Raises:
        ConfigError: naming the remedies.
    """
    if codec.omega >= 1:
        raise ConfigError(
            f"Error feedback around {codec} diverges: its relative error, bounded by min(d/s^2, sqrt(d)/s) or the like "
            f"= {codec.omega:.2f} is not below 1. Scale it down by 1 / (1 + {codec.omega:.2f}) with scaled=True "
            f'(hvd_qsgd.Scaled), use its biased form (rounding="nearest", unbiased=False), or error_feedback=False: '
            f"the codec is unbiased and does not need it."
        )
