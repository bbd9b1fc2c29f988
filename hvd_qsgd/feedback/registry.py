"""All kinds of feedback, one line each: what is imported here is known by its ``name``."""

from hvd_qsgd.feedback.dgc import MomentumCorrection as MomentumCorrection
from hvd_qsgd.feedback.ef21 import EF21 as EF21
from hvd_qsgd.feedback.loco import LoCo as LoCo
from hvd_qsgd.feedback.residual import ErrorFeedback as ErrorFeedback
