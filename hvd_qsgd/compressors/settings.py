"""The settings of every compressor, as type checkers and editors see them, and as ``help()`` shows them.

Their defaults, checks and meaning are those of :class:`hvd_qsgd.compressors.base.CompressorBase` and of the frameworks'
``Compressor``. Here each is named once more with its type, because ``**settings`` of a class must say what it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from typing_extensions import TypedDict

from hvd_qsgd.feedback import Feedback
from hvd_qsgd.observe.monitor import Monitor


class SettingsWithoutFeedback(TypedDict, total=False):
    """Settings of a compressor that makes its error feedback itself."""

    exchange: str
    """Default: 'by_ranks'"""
    min_elements: int
    """Default: 1024"""
    min_dims: int
    """Default: 2"""
    seed: int
    """Default: 0"""
    fusion_elements: int
    """Default: 1048576"""
    monitor: Monitor | None
    """Default: None"""
    threads: int | None
    """Default: None"""


class Settings(SettingsWithoutFeedback, total=False):
    """Settings of every compressor; :class:`hvd_qsgd.compressors.base.CompressorBase` says what they mean."""

    error_feedback: bool | Feedback | None
    """Default: None"""


def show_settings(init: Any, base: type, made: Collection[str] = ()) -> None:
    """Let ``help()`` and ``inspect.signature()`` show every setting that an ``__init__`` takes as ``**settings``.

    Args:
        init: receives its ``__signature__``, in which the settings stand in place of ``**settings``.
        base: the class that they are handed on to, as parameters by keyword only.
        made: settings that ``init`` makes itself.
    """
    signature = inspect.signature(init)
    *own, last = signature.parameters.values()
    if last.kind is not inspect.Parameter.VAR_KEYWORD:
        return
    named = {parameter.name for parameter in own}.union(made)
    handed_on = [p for p in inspect.signature(base).parameters.values() if by_keyword(p) and p.name not in named]
    before = [parameter for parameter in own if not by_keyword(parameter)]
    init.__signature__ = signature.replace(parameters=[*before, *handed_on, *filter(by_keyword, own)])


def by_keyword(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY
