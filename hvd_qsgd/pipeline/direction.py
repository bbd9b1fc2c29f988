"""How one direction of a boundary is compressed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hvd_qsgd.codecs import Codec, Identity, Rows, TopK
from hvd_qsgd.codecs.base import check_choice, check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback import check_feedback

FEEDBACKS = ("none", "ef", "ef-mixed", "ef21", "aq-sgd")


@dataclass(frozen=True)
class Direction:
    """Compression of the activations, or of the gradients, that cross one boundary.

    Args:
        codec: what the values are encoded with; :class:`hvd_qsgd.Identity` sends them as they are.
        feedback: how the codec's error is made up for (arXiv 2401.07788, section on error compensation):

            - "none";
            - "ef": what was lost is added to the next message;
            - "ef-mixed": half of TopK's values come from the message, half from what was lost before;
            - "ef21": both ends keep what was received last, and the change since then is sent;
            - "aq-sgd" (arXiv 2206.01299, activations only): as "ef21", with a memory for every sample.

            Memories of "ef", "ef-mixed" and "ef21" belong to the position in the batch, not to a sample.
        per_sample: encode every sample by itself (:class:`hvd_qsgd.Rows`).
        shared_mask: gradients only: send a gradient where the activation was sent and not zero, without
            positions; the rest of the gradient is zero. The codec then encodes what is sent.
        warmup_epochs: epochs at the start that are sent uncompressed (see ``set_epoch`` of a pipeline).
        at_inference: whether to compress outside of training, too; always without feedback.

    Raises:
        ConfigError: settings that exclude each other.
    """

    codec: Codec = field(default_factory=Identity)
    feedback: str = "none"
    per_sample: bool = False
    shared_mask: bool = False
    warmup_epochs: int = 0
    at_inference: bool = True

    def __post_init__(self) -> None:
        check_choice("Direction", "feedback", self.feedback, FEEDBACKS)
        check_integer("Direction", "warmup_epochs", self.warmup_epochs, 0, 2**31)
        if not isinstance(self.codec, Codec) or isinstance(self.codec, Rows):
            raise ConfigError(
                f"Direction: codec={self.codec!r} must be a codec such as QSGD(8). "
                f"To encode every sample by itself, set per_sample=True."
            )
        if self.feedback != "none":
            check_feedback(self.codec)
        if self.feedback == "ef-mixed":
            if not isinstance(self.codec, TopK):
                raise ConfigError(f'Direction: feedback="ef-mixed" parts the values of TopK, not of {self.codec}.')
            half_of(self.codec)
        if self.shared_mask and (self.per_sample or isinstance(self.codec, TopK)):
            raise ConfigError(
                "Direction: with shared_mask=True the mask of the activation picks the values of every sample. "
                "Use a codec that sends them all, such as Identity() or QSGD(8), and per_sample=False."
            )

    @property
    def compresses(self) -> bool:
        """Whether anything but the plain values is ever sent."""
        return self.shared_mask or not isinstance(self.codec, Identity)

    def codec_for(self, features: int) -> Codec:
        """The codec of a batch whose samples have so many elements."""
        return Rows(self.codec, max(features, 1)) if self.per_sample else self.codec

    def halved(self) -> Direction:
        """The same with a TopK codec that keeps half as many values."""
        assert isinstance(self.codec, TopK)
        return dataclasses.replace(self, codec=half_of(self.codec))

    def config(self) -> dict[str, Any]:
        """All settings, for JSON and for the fingerprint that both ends compare."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**fields, "codec": self.codec.config(), "version": self.codec.version}


def half_of(codec: TopK) -> TopK:
    if codec.k is None:
        return TopK((codec.ratio or 0) / 2, values=codec.values)
    if codec.k < 2:
        raise ConfigError('Direction: feedback="ef-mixed" parts the values of TopK in two, so it needs k of 2 or more.')
    return TopK(k=codec.k // 2, values=codec.values)


def check_pair(forward: Direction, backward: Direction) -> None:
    """Refuse settings that mean nothing in their direction."""
    if forward.shared_mask:
        raise ConfigError("forward: shared_mask=True is for gradients, which follow the mask of the activations.")
    if backward.feedback == "aq-sgd":
        raise ConfigError(
            'backward: feedback="aq-sgd" is for activations: its memory is what the network said of the sample before. '
            'Send gradients with feedback="none", as its authors do.'
        )
