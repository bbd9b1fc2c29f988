"""Whether all ranks mean the same.

Ranks whose settings differ would wait for collectives that the others never start. So each
rank sends its settings as one line of JSON, in an allgather whose name is the same in all
frameworks, and compares the lines before it hands out the first result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hvd_qsgd.errors import ExchangeError


def settings_message(settings: Mapping[str, Any]) -> np.ndarray:
    """The settings as bytes, uint8 of shape (bytes,); lines of all ranks can be laid end to end."""
    return np.frombuffer((json.dumps(settings) + "\n").encode(), np.uint8).copy()


def check_settings(settings: Mapping[str, Any], gathered: np.ndarray) -> None:
    """Raise ExchangeError, on all ranks, if some rank has other settings than this one.

    Args:
        settings: of this rank.
        gathered: the messages of all ranks in rank order, uint8.
    """
    own = json.loads(json.dumps(settings))
    differences = []
    for rank, line in enumerate(gathered.tobytes().decode(errors="replace").splitlines()):
        other = json.loads(line)
        fields = [name for name in own if other.get(name) != own[name]]
        if fields:
            details = ", ".join(f"{name}={other.get(name)!r}" for name in fields)
            differences.append(f"rank {rank} has {details}")
    if not differences:
        return
    if any("framework=" in difference for difference in differences):
        remedy = "A job cannot mix frameworks: start one job for each."
    else:
        remedy = "All ranks must run the same model with the same compressor settings."
    raise ExchangeError(
        f"The ranks have different settings, or other tensors to compress. This one has {own}, but "
        f"{'; '.join(differences[:4])}{' ...' if len(differences) > 4 else ''}. {remedy}"
    )
