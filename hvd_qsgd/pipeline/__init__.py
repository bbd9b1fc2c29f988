"""Pipelines of stages that send compressed activations forward and compressed gradients back.

    from hvd_qsgd import QSGD
    from hvd_qsgd.pipeline import Direction, Pipeline
    pipeline = Pipeline(stages, forward=Direction(QSGD(8)), backward=Direction(QSGD(8)))

Every rank makes the same call; it keeps the stage that is its own.
"""

from hvd_qsgd.pipeline.base import split
from hvd_qsgd.pipeline.boundary import Boundary
from hvd_qsgd.pipeline.channel import Receiver, Sender, Settings
from hvd_qsgd.pipeline.direction import Direction
from hvd_qsgd.pipeline.row_store import RowStore
from hvd_qsgd.pipeline.simulated import SimulatedPipeline
from hvd_qsgd.pipeline.trainer import Pipeline
from hvd_qsgd.pipeline.transport import StageError, Transport

__all__ = [
    "Boundary",
    "Direction",
    "Pipeline",
    "Receiver",
    "RowStore",
    "Sender",
    "Settings",
    "SimulatedPipeline",
    "StageError",
    "Transport",
    "split",
]
