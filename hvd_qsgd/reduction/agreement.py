"""Whether all ranks mean the same.

Ranks whose settings differ would wait for collectives that the others never start. So each
rank sends its settings as one line of JSON, in an allgather whose name is the same in all
frameworks, and compares the lines before it hands out the first result. Where this would be
too much for each call, two words tell whether the settings differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hvd_qsgd.errors import ExchangeError

LARGEST = 0x7FFFFFFF
#: Entries of a list that an error shows.
SHOWN = 3


def settings_message(settings: Mapping[str, Any]) -> np.ndarray:
    """The settings as bytes, uint8 of shape (bytes,); lines of all ranks can be laid end to end."""
    return np.frombuffer((json.dumps(settings) + "\n").encode(), np.uint8).copy()


def check_words(settings: Mapping[str, Any]) -> list[int]:
    """Two words, below 2^31, that are still the same after a maximum over ranks only if all ranks have these settings.

    The second is what the first one, a hash, lacks to the largest word. Zeros, which a rank that has joined
    contributes, change neither.
    """
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).digest()
    word = int.from_bytes(digest, "little") >> 1
    return [word, LARGEST - word]


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
        details = [_difference(name, own[name], other.get(name)) for name in own if other.get(name) != own[name]]
        if details:
            differences.append(f"rank {rank} has {', '.join(details)}")
    if not differences:
        return
    shown = {name: value for name, value in own.items() if not isinstance(value, list)}
    raise ExchangeError(
        f"The ranks have different settings, or other tensors to compress. This one has {shown}, but "
        f"{'; '.join(differences[:4])}{' ...' if len(differences) > 4 else ''}. All ranks must run the "
        f"same model with the same compressor settings."
    )


def _difference(name: str, own: Any, other: Any) -> str:
    """What another rank has; of lists what is not on both."""
    if not (isinstance(own, list) and isinstance(other, list)):
        return f"{name}={other!r}"
    theirs, ours = [e for e in other if e not in own], [e for e in own if e not in other]
    return f"{name}={_first(theirs)} where this one has {_first(ours)}"


def _first(entries: list[Any]) -> str:
    return f"{entries[:SHOWN]}{f' and {len(entries) - SHOWN} more' if len(entries) > SHOWN else ''}"
