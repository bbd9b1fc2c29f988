"""GlobalTopK: the largest values of all tensors of a fusion buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hvd_qsgd.codecs.topk import TopK


@dataclass(frozen=True)
class GlobalTopK(TopK):
    """TopK over all tensors that travel together, in place of each by itself.

    Layers with large gradients get a larger share. ``ratio`` and ``k`` count the elements of a
    fusion buffer (``fusion_elements`` of a compressor, about 2 million), not of the whole model;
    a value that is not finite spoils the whole buffer.

    Args:
        ratio, k, values: see :class:`hvd_qsgd.TopK`.

    Raises:
        ConfigError: a value is out of range.
    """

    name: ClassVar[str] = "topk_global"
    whole_buffer: ClassVar[bool] = True
