"""What was compressed and what was sent."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from hvd_qsgd.text import plain


@dataclass
class TensorStats:
    """Totals of one tensor on this rank since the start or the last reset, in bytes."""

    elements: int = 0
    exchanges: int = 0
    #: The gradient in its own dtype.
    raw_bytes: int = 0
    #: What the codec made of it.
    payload_bytes: int = 0
    #: What this rank sent, with collectives run as rings; not what is counted at a network interface.
    wire_bytes: float = 0.0
    #: What plain Horovod would have sent, counted the same way.
    uncompressed_wire_bytes: float = 0.0
    #: Seconds that the training thread computed until an exchange's first collective left, waited with nothing
    #: to do, and computed from then on: decoding, and whatever comes between two collectives. Tensors that travel
    #: together share them by size.
    encode_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    #: "allgather", "scatter_gather" or "allreduce"; empty if bypassed.
    exchange: str = ""
    #: What encoded the tensor; empty if bypassed.
    codec: str = ""
    #: Why the tensor was left to Horovod's own allreduce; empty if it was compressed.
    bypassed: str = ""
    #: Euclidean norms in the exchange that a monitor measured last: of what this rank encoded, and of what was lost
    #: of it: the new residual, if there is feedback. None if none was measured.
    input_norm: float | None = None
    lost_norm: float | None = None
    residual_norm: float | None = None
    #: The number of that exchange.
    measured: int = 0

    @property
    def relative_error(self) -> float | None:
        """What was lost, relative to what was encoded; None where nothing was measured, or only zeros."""
        return _quotient(self.lost_norm, self.input_norm)

    def since(self, before: TensorStats) -> TensorStats:
        """What has been added since a copy was made."""
        changed: dict[str, Any] = {name: getattr(self, name) - getattr(before, name) for name in COUNTERS}
        if self.measured <= before.exchanges:
            changed.update(dict.fromkeys(NORMS))
        return dataclasses.replace(self, **changed)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, for JSON."""
        return {**dataclasses.asdict(self), "relative_error": self.relative_error}


COUNTERS = (
    "exchanges",
    "raw_bytes",
    "payload_bytes",
    "wire_bytes",
    "uncompressed_wire_bytes",
    "encode_seconds",
    "wait_seconds",
    "decode_seconds",
)
NORMS = ("input_norm", "lost_norm", "residual_norm")


@dataclass
class Stats:
    """Totals by tensor name and, as properties, over all tensors."""

    tensors: dict[str, TensorStats] = field(default_factory=dict)
    #: What exchange="auto" decided, by optimizer or tensor, with the times that it predicted.
    decisions: dict[str, str] = field(default_factory=dict)

    def total(self, attribute: str) -> float:
        """The sum of a number over all tensors."""
        return sum(getattr(tensor, attribute) for tensor in self.tensors.values())

    @property
    def raw_bytes(self) -> int:
        """Of the gradients, in their own dtypes."""
        return int(self.total("raw_bytes"))

    @property
    def payload_bytes(self) -> int:
        """Of what the codecs made of them."""
        return int(self.total("payload_bytes"))

    @property
    def wire_bytes(self) -> float:
        """That this rank sent, with collectives run as rings."""
        return self.total("wire_bytes")

    @property
    def ratio(self) -> float:
        """How many times fewer bytes were sent than by plain Horovod; 1.0 before anything was sent."""
        return self.total("uncompressed_wire_bytes") / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def relative_error(self) -> float | None:
        """Of all measured tensors together."""
        return _quotient(self.norm("lost_norm"), self.norm("input_norm"))

    @property
    def residual_norm(self) -> float | None:
        """Of all measured tensors with feedback together."""
        return self.norm("residual_norm")

    def norm(self, attribute: str) -> float | None:
        """Of all tensors together; None if none was measured."""
        norms = [value for tensor in self.tensors.values() if (value := getattr(tensor, attribute)) is not None]
        return math.hypot(*norms) if norms else None

    def copy(self) -> Stats:
        """As it is now; statistics go on counting."""
        tensors = {name: dataclasses.replace(tensor) for name, tensor in self.tensors.items()}
        return Stats(tensors, dict(self.decisions))

    def since(self, before: Stats) -> Stats:
        """What has been added since a copy was made, of the tensors that took part."""
        new = {name: tensor.since(before.tensors.get(name, TensorStats())) for name, tensor in self.tensors.items()}
        return Stats({name: tensor for name, tensor in new.items() if tensor.exchanges}, dict(self.decisions))

    @property
    def bypassed(self) -> dict[str, str]:
        """Tensors left to Horovod's own allreduce, and why."""
        return {name: tensor.bypassed for name, tensor in self.tensors.items() if tensor.bypassed}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, for JSON."""
        totals = {name: self.total(name) for name in COUNTERS if name != "exchanges"}
        ratios = {"ratio": self.ratio, "relative_error": self.relative_error, "residual_norm": self.residual_norm}
        tensors = {name: tensor.as_dict() for name, tensor in self.tensors.items()}
        return {**totals, **ratios, "decisions": dict(self.decisions), "tensors": tensors}

    def __str__(self) -> str:
        lines = [f"{'tensor':40} {'exchanges':>9} {'raw MB':>9} {'sent MB':>9}  how"]
        for name, tensor in sorted(self.tensors.items()):
            how = tensor.exchange or f"not compressed: {tensor.bypassed}"
            lines.append(
                f"{plain(name):40} {tensor.exchanges:9d} {tensor.raw_bytes / 1e6:9.2f} {tensor.wire_bytes / 1e6:9.2f}  "
                f"{plain(how)}"
            )
        lines += [f"{plain(what)}: {plain(decision)}" for what, decision in self.decisions.items()]
        lines.append(f"sent {self.wire_bytes / 1e6:.2f} MB, {self.ratio:.1f} times less than uncompressed")
        return "\n".join(lines)


def _quotient(part: float | None, whole: float | None) -> float | None:
    quotient = part / whole if part is not None and whole else math.nan
    return quotient if math.isfinite(quotient) else None
