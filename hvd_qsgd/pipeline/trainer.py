"""A pipeline over ranks: one stage a rank."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from hvd_qsgd.codecs.base import check_choice
from hvd_qsgd.errors import ConfigError, ExchangeError
from hvd_qsgd.pipeline.base import Base, Directions, Loss, cut, evaluating
from hvd_qsgd.pipeline.boundary import WAYS
from hvd_qsgd.pipeline.channel import End, Receiver, Sender, Settings, check_samples
from hvd_qsgd.pipeline.schedule import FORWARD, SCHEDULES, actions
from hvd_qsgd.pipeline.transport import StageError, Transport
from hvd_qsgd.stats import Stats

#: Tags of messages; the last is for everything that is neither activation nor gradient.
ACTIVATION, GRADIENT, CONTROL = range(3)


class Pipeline(Base):
    """A pipeline over ranks: rank r holds stage ``r % len(stages)`` of replica ``r // len(stages)``.

        with Pipeline(stages, forward=Direction(QSGD(8)), backward=Direction(QSGD(8))) as pipeline:
            optimizer = SGD(pipeline.parameters(), 0.1)
            for inputs, targets in loader:
                optimizer.zero_grad()
                pipeline.train_step(cross_entropy, inputs, targets)
                optimizer.step()

    All ranks make it with the same settings and call the same methods in the same order. An error
    inside the ``with`` block on one rank ends the block on all ranks, with its cause; without an
    error the block ends when it has ended on all ranks.

    Args:
        stages: the parts of the model; this rank keeps its own as ``module`` and forgets the others.
            Make them with the same seed on all ranks if they are initialized at random.
        forward, backward: compression of activations and gradients: one for all boundaries, or a list
            with one for each; default is none.
        micro_batches: parts of a batch that are in different stages at the same time.
        schedule: "1f1b" or "gpipe"; see :func:`hvd_qsgd.pipeline.schedule.actions`.
        transport: default is :class:`MPITransport` over all ranks.
        settings: see :class:`Settings`; its ``replica`` is set here.
        device: of this stage; default is that of its parameters.

    Raises:
        ConfigError: the ranks are no multiple of the stages, or a setting is wrong.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        forward: Directions = None,
        backward: Directions = None,
        micro_batches: int = 4,
        schedule: str = "1f1b",
        transport: Transport | None = None,
        settings: Settings | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(stages, forward, backward, micro_batches)
        check_choice("Pipeline", "schedule", schedule, SCHEDULES)
        if transport is None:
            from hvd_qsgd.pipeline.transport_mpi import MPITransport

            transport = MPITransport()
        count = len(self.stages)
        if transport.ranks % count:
            raise ConfigError(
                f"{transport.ranks} ranks cannot hold pipelines of {count} stages each. "
                f"Start a multiple of {count} ranks."
            )
        self.transport = transport
        self.schedule = schedule
        self.stage = transport.rank % count
        self.replica = transport.rank // count
        self.replicas = transport.ranks // count
        self.module = self.stages[self.stage]
        self.stages = [self.module if number == self.stage else nn.Identity() for number in range(count)]
        settings = settings or Settings()
        settings = Settings(**{**vars(settings), "replica": self.replica})
        first = next(self.module.parameters(), torch.empty(0))
        self.device = torch.device(device) if device is not None else first.device
        self._failed = False
        self._ends: dict[tuple[str, str], End] = {}
        if not self.is_first:
            self._add_ends("before", self.stage - 1, (Receiver, Sender), settings)
        if not self.is_last:
            self._add_ends("after", self.stage, (Sender, Receiver), settings)

    def _add_ends(self, side: str, boundary: int, kinds: Sequence[type[End]], settings: Settings) -> None:
        for way, kind, direction in zip(WAYS, kinds, self.directions[boundary]):
            self._ends[side, way] = kind(f"boundary{boundary}.{way}", direction, settings)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.stages) - 1

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this stage."""
        return list(self.module.parameters())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of this stage, by names that no other stage has."""
        return [(f"stage{self.stage}.{name}", parameter) for name, parameter in self.module.named_parameters()]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0; warm-up ends by it."""
        for end in self._ends.values():
            if isinstance(end, Sender):
                end.epoch = epoch

    # -- steps ----------------------------------------------------------------------------------

    def train_step(
        self,
        loss: Loss,
        inputs: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        samples: Any = None,
        batch_size: int | None = None,
    ) -> float | None:
        with self._telling():
            return self._train_step(loss, inputs, targets, samples, batch_size)

    def predict(self, inputs: torch.Tensor | None = None, batch_size: int | None = None) -> torch.Tensor | None:
        with self._telling(), torch.no_grad(), evaluating(self.module):
            parts = cut(self._batch_size(inputs, None, batch_size), self.micro_batches)
            outputs = [self._forward(part, inputs, None, False)[1] for part in parts]
            self.transport.flush()
            return torch.cat(outputs) if self.is_last else None

    def _train_step(self, loss: Loss, inputs: Any, targets: Any, samples: Any, batch_size: int | None) -> float | None:
        size = self._batch_size(inputs, targets, batch_size)
        if samples is not None:
            samples = check_samples(samples, size)
        parts = cut(size, self.micro_batches)
        if self.is_last and targets is None:
            raise ConfigError("The last stage needs targets=.")
        total = 0.0
        pending: dict[int, tuple[Any, torch.Tensor, Any, Any]] = {}
        for what, number in actions(self.schedule, self.stage, len(self.stages), len(parts)):
            part = parts[number]
            if what == FORWARD:
                pending[number] = self._forward(part, inputs, samples, True)
                continue
            received, output, mask, numbers = pending.pop(number)
            if self.is_last:
                share = (part.stop - part.start) / size
                value = loss(output, targets[part].to(self.device)) * share
                value.backward()
                total += float(value.detach())
            else:
                message = self.transport.receive(self._peer("after"), GRADIENT)
                gradient = self._receiver("after", "backward").decode(message, self.device, mask).tensor
                if output.requires_grad:
                    output.backward(gradient)
            if received is not None:
                self._send_gradient(received, part, numbers)
        self.transport.flush()
        return total if self.is_last else None

    def _forward(self, part: slice, inputs: Any, samples: Any, training: bool) -> tuple[Any, torch.Tensor, Any, Any]:
        """What came in (None on the first stage), the output, the mask of what was sent, the samples."""
        received = None
        if self.is_first:
            if inputs is None:
                raise ConfigError("The first stage needs inputs=.")
            x = inputs[part].to(self.device)
            numbers = samples[part] if samples is not None else None
        else:
            message = self.transport.receive(self._peer("before"), ACTIVATION)
            received = self._receiver("before", "forward").decode(message, self.device)
            numbers = samples[part] if samples is not None else received.header.samples
            x = received.tensor.requires_grad_(training)
        output = self.module(x)
        mask = None
        if not self.is_last:
            message, mask = self._sender("after", "forward").encode(
                output,
                first_row=part.start,
                samples=numbers,
                training=training,
                want_mask=training and self.directions[self.stage][1].shared_mask,
            )
            self.transport.send(self._peer("after"), ACTIVATION, message)
        return received, output, mask, numbers

    def _send_gradient(self, received: Any, part: slice, numbers: Any) -> None:
        x = received.tensor
        gradient = x.grad if x.grad is not None else torch.zeros_like(x)
        sender = self._sender("before", "backward")
        message, _ = sender.encode(gradient, first_row=part.start, samples=numbers, mask=received.mask)
        self.transport.send(self._peer("before"), GRADIENT, message)

    def _sender(self, side: str, way: str) -> Sender:
        end = self._ends[side, way]
        assert isinstance(end, Sender)
        return end

    def _receiver(self, side: str, way: str) -> Receiver:
        end = self._ends[side, way]
        assert isinstance(end, Receiver)
        return end

    def _batch_size(self, inputs: Any, targets: Any, batch_size: int | None) -> int:
        sizes = {len(given) for given in (inputs, targets) if given is not None}
        sizes |= {batch_size} if batch_size is not None else set()
        if len(sizes) != 1 or 0 in sizes:
            raise ConfigError(
                f"inputs, targets and batch_size give the sizes {sorted(sizes)} of a batch: one above 0 is needed. "
                f"Stages that need neither inputs nor targets need batch_size=."
            )
        return sizes.pop()

    # -- state ------------------------------------------------------------------------------------

    def verify(self, repair: bool = False) -> None:
        """Compare what the two ends of every boundary remember. All ranks call it.

        Args:
            repair: where they differ, let both ends forget everything, with a warning, instead of raising.

        Raises:
            ExchangeError: they differ.
        """
        with self._telling():
            for (side, _), end in self._ends.items():
                self.transport.send(self._peer(side), CONTROL, end.state_digest())
            for (side, _), end in self._ends.items():
                other = self.transport.receive(self._peer(side), CONTROL)
                if np.array_equal(other, end.state_digest()):
                    continue
                if not repair:
                    raise ExchangeError(
                        f"{end.name}: the two ends of the boundary remember different things. "
                        f"Load the state of one checkpoint on all stages, or call reset() on all stages."
                    )
                warnings.warn(f"{end.name}: the ends remembered different things, and forget them now.", stacklevel=2)
                end.reset()
            self.transport.flush()

    def reset(self) -> None:
        """Forget all memories of feedback; call it on all ranks."""
        for end in self._ends.values():
            end.reset()

    def state_dict(self) -> dict[str, Any]:
        """Memories of feedback of this rank, which differ from rank to rank: save them on every rank.

        All ranks call it: both ends of a boundary are compared first.
        """
        self.verify()
        return {f"{side}.{way}": end.state_dict() for (side, way), end in self._ends.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. All ranks call it; where the two ends of a boundary do not
        fit together, or one has no state (an empty dictionary), both start anew, with a warning."""
        for (side, way), end in self._ends.items():
            if f"{side}.{way}" in state:
                end.load_state_dict(state[f"{side}.{way}"])
            else:
                end.reset()
        self.verify(repair=True)

    def stats(self) -> Stats:
        """Bytes that this rank has sent, by boundary and direction."""
        senders = [end for end in self._ends.values() if isinstance(end, Sender)]
        return Stats({sender.name: sender.stats for sender in senders})

    def _peer(self, side: str) -> int:
        return self.transport.rank + (1 if side == "after" else -1)

    # -- beginning and end ------------------------------------------------------------------------

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.transport.close()
        else:
            self._tell(error)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """A block whose errors all ranks get to know."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        if self._failed:
            return
        self._failed = True
        cause = str(error)
        if not isinstance(error, StageError):
            where = f"stage {self.stage} of replica {self.replica} (rank {self.transport.rank})"
            cause = f"{where} failed: {''.join(traceback.format_exception_only(type(error), error)).strip()}"
        self.transport.abort(cause)
