"""Feedback: what is remembered of a tensor from step to step. One file per kind; the registry below is the only list.

A kind has settings, which are its constructor's arguments, and a memory by tensor name. The
memory belongs to one rank. Arrays are flat float32 of any backend.
"""

from __future__ import annotations

from typing import Any

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback.base import Feedback
from hvd_qsgd.feedback.dgc import MomentumCorrection
from hvd_qsgd.feedback.ef21 import EF21
from hvd_qsgd.feedback.guard import check_feedback
from hvd_qsgd.feedback.loco import LoCo
from hvd_qsgd.feedback.residual import ErrorFeedback

FEEDBACKS: dict[str, type[Feedback]] = {kind.name: kind for kind in (ErrorFeedback, EF21, LoCo, MomentumCorrection)}

__all__ = [
    "EF21",
    "FEEDBACKS",
    "ErrorFeedback",
    "Feedback",
    "LoCo",
    "MomentumCorrection",
    "check_feedback",
    "feedback_from_config",
]


def feedback_from_config(config: dict[str, Any]) -> Feedback:
    """A kind of feedback with empty memory, from :meth:`Feedback.config`.

    Raises:
        ConfigError: an unknown kind or setting, or a value out of range.
    """
    settings = dict(config)
    name = settings.pop("feedback", None)
    if not isinstance(name, str) or name not in FEEDBACKS:
        raise ConfigError(f"Unknown feedback {name!r}; known are {', '.join(sorted(FEEDBACKS))}.")
    try:
        return FEEDBACKS[name](**settings)
    except TypeError as error:
        raise ConfigError(f"Configuration {config} does not fit the feedback {name!r}: {error}.") from error
