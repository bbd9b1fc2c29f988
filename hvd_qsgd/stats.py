"""What was compressed and what was sent."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
    #: "allgather", "scatter_gather" or "allreduce"; empty if bypassed.
    exchange: str = ""
    #: Why the tensor was left to Horovod's own allreduce; empty if it was compressed.
    bypassed: str = ""


@dataclass
class Stats:
    """Totals by tensor name and, as properties, over all tensors."""

    tensors: dict[str, TensorStats] = field(default_factory=dict)
    #: What exchange="auto" decided, by optimizer or tensor, with the times that it predicted.
    decisions: dict[str, str] = field(default_factory=dict)

    def total(self, attribute: str) -> float:
        return sum(getattr(tensor, attribute) for tensor in self.tensors.values())

    @property
    def raw_bytes(self) -> int:
        return int(self.total("raw_bytes"))

    @property
    def payload_bytes(self) -> int:
        return int(self.total("payload_bytes"))

    @property
    def wire_bytes(self) -> float:
        return self.total("wire_bytes")

    @property
    def ratio(self) -> float:
        """How many times fewer bytes were sent than by plain Horovod; 1.0 before anything was sent."""
        return self.total("uncompressed_wire_bytes") / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def bypassed(self) -> dict[str, str]:
        """Tensors left to Horovod's own allreduce, and why."""
        return {name: tensor.bypassed for name, tensor in self.tensors.items() if tensor.bypassed}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, for JSON."""
        totals = {"raw_bytes": self.raw_bytes, "payload_bytes": self.payload_bytes, "wire_bytes": self.wire_bytes}
        tensors = {name: dataclasses.asdict(tensor) for name, tensor in self.tensors.items()}
        return {**totals, "ratio": self.ratio, "decisions": dict(self.decisions), "tensors": tensors}

    def __str__(self) -> str:
        lines = [f"{'tensor':40} {'exchanges':>9} {'raw MB':>9} {'sent MB':>9}  how"]
        for name, tensor in sorted(self.tensors.items()):
            how = tensor.exchange or f"not compressed: {tensor.bypassed}"
            lines.append(
                f"{name:40} {tensor.exchanges:9d} {tensor.raw_bytes / 1e6:9.2f} {tensor.wire_bytes / 1e6:9.2f}  {how}"
            )
        lines += [f"{what}: {decision}" for what, decision in self.decisions.items()]
        lines.append(f"sent {self.wire_bytes / 1e6:.2f} MB, {self.ratio:.1f} times less than uncompressed")
        return "\n".join(lines)
