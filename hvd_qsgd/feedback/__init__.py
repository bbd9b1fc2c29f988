"""Feedback: what is remembered of a tensor from step to step.

One file per kind; ``registry.py`` is the only list of those of this package. Others come from packages with
entry points in the group ``hvd_qsgd.feedback``, or from :func:`register`. A kind has settings, which are its
constructor's arguments, and a memory by tensor name. The memory belongs to one rank. Arrays are
flat float32 of any backend.
"""

from __future__ import annotations

from typing import Any, TypeVar

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback import registry
from hvd_qsgd.feedback.base import Feedback as Feedback
from hvd_qsgd.feedback.guard import check_feedback as check_feedback
from hvd_qsgd.feedback.registry import *  # noqa: F403
from hvd_qsgd.plugins import Registry, class_fault, name_fault

AnyKind = TypeVar("AnyKind", bound="type[Feedback]")


def _fault(name: Any, kind: Any) -> str:
    return class_fault(Feedback, kind) or name_fault(name, kind)


FEEDBACKS: Registry[type[Feedback]] = Registry(
    "hvd_qsgd.feedback",
    "feedback",
    _fault,
    {kind.name: kind for kind in vars(registry).values() if isinstance(kind, type) and issubclass(kind, Feedback)},
)


def register(kind: AnyKind) -> AnyKind:
    """Make a kind of feedback of yours known by its ``name``, in configurations; also a decorator of the class.

    Raises:
        ConfigError: the name belongs to another kind, or it does not derive from :class:`Feedback`.
    """
    FEEDBACKS.register(getattr(kind, "name", ""), kind)
    return kind


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
