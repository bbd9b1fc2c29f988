"""A pipeline over ranks: one stage a rank."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hvd_qsgd.codecs.base import check_choice
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.stats import Stats
from hvd_qsgd.pipeline.base import Base, Directions, Loss, cut, evaluating
from hvd_qsgd.pipeline.channel import Settings, check_samples
from hvd_qsgd.pipeline.ends import AFTER, BEFORE, Ends
from hvd_qsgd.pipeline.schedule import FORWARD, SCHEDULES, actions
from hvd_qsgd.pipeline.transport import ACTIVATION, GRADIENT, StageError, Transport


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
        self.device = transport.device = torch.device(device) if device is not None else first.device
        self._failed = False
        self.ends = Ends(self.stage, self.directions, settings, transport)

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
        self.ends.set_epoch(epoch)

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
                gradient = self.ends.receive(AFTER, GRADIENT, self.device, mask).tensor
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
            received = self.ends.receive(BEFORE, ACTIVATION, self.device)
            numbers = samples[part] if samples is not None else received.header.samples
            x = received.tensor.requires_grad_(training)
        output = self.module(x)
        mask = None
        if not self.is_last:
            mask = self.ends.send(
                AFTER,
                ACTIVATION,
                output,
                first_row=part.start,
                samples=numbers,
                training=training,
                want_mask=training and self.directions[self.stage][1].shared_mask,
            )
        return received, output, mask, numbers

    def _send_gradient(self, received: Any, part: slice, numbers: Any) -> None:
        x = received.tensor
        gradient = x.grad if x.grad is not None else torch.zeros_like(x)
        self.ends.send(BEFORE, GRADIENT, gradient, first_row=part.start, samples=numbers, mask=received.mask)

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

    def verify(self) -> None:
        """Compare what the two ends of every boundary remember. All ranks call it.

        Raises:
            ExchangeError: they differ.
        """
        with self._telling():
            self.ends.verify()

    def reset(self) -> None:
        """Forget all memories of feedback; call it on all ranks."""
        self.ends.reset()

    def state_dict(self) -> dict[str, Any]:
        """Memories of feedback of this rank, which differ from rank to rank: save them on every rank.

        All ranks call it: both ends of a boundary are compared first.
        """
        self.verify()
        return self.ends.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. All ranks call it; where the two ends of a boundary do not
        fit together, or one has no state (an empty dictionary), both start anew, with a warning."""
        with self._telling():
            self.ends.load_state_dict(state)
            self.ends.verify(repair=True)

    def stats(self) -> Stats:
        """Bytes that this rank has sent, by boundary and direction."""
        return self.ends.stats()

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
