"""In which order a stage works on its micro-batches.

GPipe: Huang et al., NeurIPS 2019 (arXiv 1811.06965). 1F1B: Narayanan et al., PipeDream, SOSP 2019
(arXiv 1806.03377), in the form with a flush after every batch (arXiv 2006.09503).
"""

from __future__ import annotations

from collections.abc import Iterator

from hvd_qsgd.codecs.base import check_choice

SCHEDULES = ("1f1b", "gpipe")
FORWARD, BACKWARD = "forward", "backward"


def actions(schedule: str, stage: int, stages: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """What a stage does, as (FORWARD or BACKWARD, number of the micro-batch).

    Both schedules take the same time; "1f1b" keeps the activations of at most ``stages - stage``
    micro-batches, "gpipe" those of all. Gradients come in the order of the micro-batches, so sums are the same.
    """
    check_choice("Pipeline", "schedule", schedule, SCHEDULES)
    ahead = micro_batches if schedule == "gpipe" else min(stages - stage, micro_batches)
    for number in range(ahead):
        yield FORWARD, number
    for number in range(micro_batches):
        yield BACKWARD, number
        if ahead + number < micro_batches:
            yield FORWARD, ahead + number
