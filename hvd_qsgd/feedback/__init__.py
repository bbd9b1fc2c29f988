"""Feedback: what is remembered of a tensor from step to step.

One file per kind; ``registry.py`` is the only list of them. A kind has settings, which are its
constructor's arguments, and a memory by tensor name. The memory belongs to one rank. Arrays are
flat float32 of any backend.
"""

from __future__ import annotations

from typing import Any

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback import registry
from hvd_qsgd.feedback.base import Feedback as Feedback
from hvd_qsgd.feedback.guard import check_feedback as check_feedback
from hvd_qsgd.feedback.registry import *  # noqa: F403

FEEDBACKS: dict[str, type[Feedback]] = {
    kind.name: kind for kind in vars(registry).values() if isinstance(kind, type) and issubclass(kind, Feedback)
}


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
