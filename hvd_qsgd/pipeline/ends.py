"""The ends that one stage holds: of the boundary before it and of the one after it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from hvd_qsgd.errors import ExchangeError
from hvd_qsgd.kernels.torch.untraced import untraced
from hvd_qsgd.observe.stats import Stats
from hvd_qsgd.pipeline.boundary import WAYS
from hvd_qsgd.pipeline.channel import End, Received, Receiver, Sender, Settings
from hvd_qsgd.pipeline.direction import Direction
from hvd_qsgd.pipeline.transport import CONTROL, Transport

#: Where the other end is, as the difference of ranks.
BEFORE, AFTER = -1, 1


class Ends:
    """Senders and receivers of a stage, by the side they are on and the tag of their messages.

    Args:
        stage: number of this stage.
        directions: for each boundary, of activations and of gradients.
        settings: of all ends.
        transport: what carries the messages.
    """

    def __init__(
        self,
        stage: int,
        directions: Sequence[tuple[Direction, Direction]],
        settings: Settings,
        transport: Transport,
    ) -> None:
        self.transport = transport
        self.by_place: dict[tuple[int, int], End] = {}
        for side, boundary in ((BEFORE, stage - 1), (AFTER, stage)):
            if 0 <= boundary < len(directions):
                kinds: Sequence[type[End]] = (Receiver, Sender) if side == BEFORE else (Sender, Receiver)
                for tag, kind in enumerate(kinds):
                    name = f"boundary{boundary}.{WAYS[tag]}"
                    self.by_place[side, tag] = kind(name, directions[boundary][tag], settings)

    @untraced
    def send(self, side: int, tag: int, x: torch.Tensor, **place: Any) -> torch.Tensor | None:
        """Send a tensor; arguments and the mask that is returned are those of :meth:`Sender.encode`."""
        sender = self.by_place[side, tag]
        assert isinstance(sender, Sender)
        message, mask = sender.encode(x, **place)
        self.transport.send(self._peer(side), tag, message)
        return mask

    @untraced
    def receive(self, side: int, tag: int, device: torch.device, mask: torch.Tensor | None = None) -> Received:
        """Wait for the next tensor; see :meth:`Receiver.decode`."""
        receiver = self.by_place[side, tag]
        assert isinstance(receiver, Receiver)
        return receiver.decode(self.transport.receive(self._peer(side), tag), device, mask)

    def set_epoch(self, epoch: int) -> None:
        for end in self.by_place.values():
            if isinstance(end, Sender):
                end.epoch = epoch

    def verify(self, repair: bool = False) -> None:
        """Compare with the other ends; where they differ, both raise, or with ``repair`` both forget everything."""
        for (side, _), end in self.by_place.items():
            self.transport.send(self._peer(side), CONTROL, end.state_digest())
        for (side, _), end in self.by_place.items():
            if torch.equal(self.transport.receive(self._peer(side), CONTROL), end.state_digest()):
                continue
            if not repair:
                raise ExchangeError(
                    f"{end.name}: the two ends of the boundary remember different things. "
                    f"Load the state of one checkpoint on all stages, or call reset() on all stages."
                )
            warnings.warn(f"{end.name}: the ends remembered different things, and forget them now.", stacklevel=3)
            end.reset()
        self.transport.flush()

    def reset(self) -> None:
        for end in self.by_place.values():
            end.reset()

    def state_dict(self) -> dict[str, Any]:
        return {end.name: end.state_dict() for end in self.by_place.values()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ends of which the state says nothing are reset."""
        for end in self.by_place.values():
            if end.name in state:
                end.load_state_dict(state[end.name])
            else:
                end.reset()

    def stats(self) -> Stats:
        return Stats({end.name: end.stats for end in self.by_place.values() if isinstance(end, Sender)})

    def _peer(self, side: int) -> int:
        return self.transport.rank + side
