"""Which codecs feedback cannot go around."""

from __future__ import annotations

from hvd_qsgd.codecs.base import Codec
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import AUTO, choose_exchange
from hvd_qsgd.feedback.base import Feedback

MANY_RANKS = 2**20


def check_feedback(codec: Codec, feedback: Feedback | None = None, exchange: str = "allgather") -> None:
    """Refuse feedback around a codec with which residuals grow without bound.

    A residual shrinks only if the codec's relative error is below 1. For stochastic rounding
    with L2 norm that error is bounded by min(d/s^2, sqrt(d)/s) (QSGD, Lemma 3.1), and at 4
    bits and buckets of 512 residuals were seen to grow 80000-fold in 200 steps.

    With maximum norm an error is at most one level, M/s of the bucket's largest value M, which
    bounds residuals for s >= 2. Where a mean of n ranks is rounded once more, its owner is fed
    back n times that error as well, a share of 1/n of the next mean: M becomes up to 2 M/s, and
    with s = 1 residuals were seen to grow 100-fold in 60 steps, on 4 to 16 ranks.

    Args:
        feedback: its kind; None for one that feeds whole errors back.
        exchange: as given to a compressor.

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
    damped = feedback is not None and feedback.damped
    if codec.one_level and not damped and choose_exchange(exchange, codec, MANY_RANKS) in ("scatter_gather", AUTO):
        raise ConfigError(
            f"Error feedback around {codec} diverges with exchange={exchange!r}, which rounds means a second time: its "
            f'errors are as large as the largest values. Use rounding="nearest", 3 bits, exchange="allgather" or '
            f'"allreduce", LoCo() as feedback, or error_feedback=False: the codec is unbiased and does not need it.'
        )
