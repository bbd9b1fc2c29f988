"""Compressors for ``compression=`` of Horovod's torch functions.

``compress`` starts exchanges of its own over Horovod's collectives and hands Horovod a
*carrier*: one element, 1.0, that Horovod reduces in place of the gradient. ``decompress``
waits for the exchange and multiplies the mean by the reduced carrier, which reads 1 under
Average, the number of ranks under Sum, and includes whatever scaling Horovod applies.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_qsgd.codecs import Codec
from hvd_qsgd.compressor import CastBase, CompressorBase, IdentityBase, QSGDBase, TopKBase, class_or_instance
from hvd_qsgd.cost import UNCOMPRESSED, Decision
from hvd_qsgd.errors import UnsupportedError
from hvd_qsgd.exchanges import AUTO, Piece
from hvd_qsgd.fusion import Slice, plan_bundles
from hvd_qsgd.random_words import stream_of
from hvd_qsgd.torch.auto import Advisor, Rehearsal
from hvd_qsgd.torch.callsite import CallSite, find_call_site
from hvd_qsgd.torch.flights import Agreement, Bundle, Flight, empty_on


@dataclass
class Context:
    """What ``decompress`` must know of a tensor whose exchange is under way."""

    site: CallSite
    key: str
    tensor: torch.Tensor
    out: Any
    flights: list[tuple[Slice, Flight]] = field(default_factory=list)
    #: With error feedback: gradient plus residual, which the exchange turns into the new residual.
    corrected: Any = None


@dataclass
class Unchanged:
    """A tensor that needs no exchange; ``dtype`` is what to cast the result to."""

    tensor: torch.Tensor | None
    dtype: torch.dtype | None = None


@dataclass
class Undecided:
    """A tensor of the steps before ``exchange="auto"`` decides; ``context`` is what it has otherwise."""

    site: CallSite
    context: Unchanged | None


@dataclass
class OptimizerState:
    """What a compressor knows of one distributed optimizer."""

    index: int
    bundles: dict[str, list[tuple[Slice, Bundle]]]
    #: Compares the settings of all ranks; None once they were found equal.
    agreement: Agreement | None
    #: Whether gradients came since the last synchronize().
    fresh: bool = False
    #: Of exchange="auto".
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    decision: Decision | None = None


class Compressor(CompressorBase):
    """Horovod's compress/decompress interface around a codec.

    Use it as ``compression=`` of ``hvd.DistributedOptimizer``, ``hvd.allreduce`` or
    ``hvd.grouped_allreduce``; both the class (all defaults) and an instance work.
    The settings are those of :class:`hvd_qsgd.compressor.CompressorBase`; with ``exchange="auto"`` the
    first two steps of an optimizer are not compressed, because they end with the measurement.
    """

    framework = "torch"

    def __init__(self, codec: Codec, **settings: Any) -> None:
        super().__init__(codec, **settings)
        self._optimizers: weakref.WeakKeyDictionary[Any, OptimizerState] = weakref.WeakKeyDictionary()
        self._optimizers_seen = 0
        self._advisor = Advisor(codec)
        self._decisions: dict[tuple[Any, ...], Decision] = {}
        #: Bundles of tensors that came through hvd.allreduce, by name, length, device and process set.
        self._single: dict[tuple[Any, ...], list[tuple[Slice, Bundle]]] = {}

    # -- Horovod's interface ----------------------------------------------------------------

    @class_or_instance
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start the exchange of a gradient; Horovod calls this.

        Returns:
            What Horovod has to reduce (the carrier, or the tensor itself if it is not
            compressed) and the context for :meth:`decompress`.

        Raises:
            UnsupportedError: the caller wants what compression cannot do correctly.
        """
        site = find_call_site(tensor)
        state = self._state_of(site)
        key = site.name if state is None else f"{state.index}/{site.name}"
        if state is not None and self._already_synchronized(site, state):
            return self._carrier(site, tensor), Unchanged(tensor)
        reason = self._bypass_reason(tensor, site.process_set)
        if reason:
            return self._bypass(key, tensor, site, reason)
        if self.exchange == AUTO:
            decision = self._decision(site, state, tensor)
            if decision is None:
                assert state is not None
                state.rehearsal.takes_off(site.name)
                carried, unchanged = self._bypass(key, tensor, site, 'exchange="auto" measures in the first steps')
                return carried, Undecided(site, unchanged)
            if decision.exchange == UNCOMPRESSED:
                return self._bypass(key, tensor, site, f'exchange="auto": {decision}')
        if self.error_feedback and not site.named:
            raise UnsupportedError(
                "hvd.allreduce was called without a name, and error feedback keeps a residual for each name. "
                "Pass name=, or a compressor with error_feedback=False."
            )
        context = self._context(site, key, tensor)
        bundles = self._bundles(site, tensor) if state is None else state.bundles[site.name]
        step = self._next_step(key)
        source = context.corrected if context.corrected is not None else array_of(tensor)
        stream = stream_of(self.seed, bundles[0][1].collectives.rank, key)
        for part, bundle in bundles:
            piece = Piece(
                name=part.name,
                x=source[part.start : part.stop],
                out=context.out[part.start : part.stop],
                stream=stream,
                step=step,
                first=part.start,
                keep_error=context.corrected is not None,
            )
            flight = bundle.flight_for(part)
            context.flights.append((part, flight))
            flight.add(part, piece)
        if not site.named:
            # Horovod names the carrier after the number of collectives that this process has started so far.
            # That is the same on all ranks only when none of ours is still to come.
            for _, flight in context.flights:
                flight.wait()
        return self._carrier(site, tensor), context

    @class_or_instance
    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        """Wait for the exchange and return the reduced gradient; Horovod calls this.

        Raises:
            ExchangeError: the ranks did not mean the same exchange.
        """
        if context is None:
            return tensor
        if isinstance(context, Undecided):
            self._landed(context)
            return self.decompress(tensor, context.context)
        if isinstance(context, Unchanged):
            result = tensor if context.tensor is None else scaled(context.tensor, tensor)
            return result if context.dtype is None else result.to(context.dtype)
        if context.site.optimizer is not None:
            self._settled(self._optimizers[context.site.optimizer])
        ranks = context.flights[0][1].bundle.collectives.ranks
        record = self._record(context.key, context.tensor.numel(), context.tensor.element_size(), ranks)
        for part, flight in context.flights:
            job = flight.wait()
            piece = flight.pieces[part]
            record.exchange, record.bypassed = flight.exchange, ""
            record.payload_bytes += piece.payload_bytes
            record.wire_bytes += job.wire_bytes * piece.payload_bytes / job.payload_bytes
        if context.corrected is not None:
            self._settle(context.key, context.corrected, context.out, job.kernels)
        mean = context.out if isinstance(context.out, torch.Tensor) else torch.from_numpy(context.out)
        if mean.data_ptr() == context.tensor.data_ptr():
            return scaled(context.tensor, tensor)
        return scaled(mean, tensor).to(context.tensor.dtype).view(context.tensor.shape)

    @staticmethod
    def _saved(residual: Any) -> Any:
        return torch.as_tensor(residual).clone()

    @staticmethod
    def _loaded(value: Any) -> Any:
        return array_of(value.clone())

    # -- parts of compress ------------------------------------------------------------------

    def _state_of(self, site: CallSite) -> OptimizerState | None:
        if site.optimizer is None:
            return None
        state = self._optimizers.get(site.optimizer)
        if state is None:
            plan = self._plan(site, self.exchange)
            agreement = Agreement(f"settings.{self._optimizers_seen}", self._settings(plan), site.process_set)
            state = OptimizerState(self._optimizers_seen, plan, agreement)
            self._optimizers_seen += 1
            self._optimizers[site.optimizer] = state
        return state

    def _settled(self, state: OptimizerState) -> None:
        """Gradients come back: by now all ranks have said what their settings are."""
        state.fresh = False
        if state.agreement is not None:
            state.agreement.check()
            state.agreement = None

    def _plan(self, site: CallSite, exchange: str) -> dict[str, list[tuple[Slice, Bundle]]]:
        """Bundles of all gradients that this optimizer will hand in, last layers first."""
        optimizer = site.optimizer
        by_device: dict[torch.device, list[tuple[str, int]]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in reversed(parameters):
            if parameter in optimizer._requires_update and not self._bypass_reason(parameter, site.process_set):
                entry = (optimizer._parameter_names[parameter], parameter.numel())
                by_device.setdefault(parameter.device, []).append(entry)
        plan: dict[str, list[tuple[Slice, Bundle]]] = {}
        for device, lengths in by_device.items():
            self._add_bundles(plan, lengths, device, site.process_set, exchange)
        return plan

    def _bundles(self, site: CallSite, tensor: torch.Tensor) -> list[tuple[Slice, Bundle]]:
        """Bundles of one tensor that travels by itself."""
        key = self._single_key(site, tensor)
        if key not in self._single:
            # Everybody is in the same call here, so the answer can be awaited at once.
            Agreement(f"settings.{site.name}", self._settings([site.name]), site.process_set).check()
            plan: dict[str, list[tuple[Slice, Bundle]]] = {}
            exchange = self._decisions[key].exchange if key in self._decisions else self.exchange
            self._add_bundles(plan, [(site.name, tensor.numel())], tensor.device, site.process_set, exchange)
            self._single[key] = plan[site.name]
        return self._single[key]

    def _add_bundles(
        self,
        plan: dict[str, list[tuple[Slice, Bundle]]],
        lengths: list[tuple[str, int]],
        device: torch.device,
        process_set: Any,
        exchange: str,
    ) -> None:
        for slices in plan_bundles(lengths, self.codec.granularity, self.fusion_elements):
            prefix = f"set{process_set.process_set_id}."
            bundle = Bundle(slices, self.codec, exchange, device, process_set, prefix)
            for part in slices:
                plan.setdefault(part.name, []).append((part, bundle))

    @staticmethod
    def _already_synchronized(site: CallSite, state: OptimizerState) -> bool:
        """Whether the tensor is a result of ``synchronize()`` that ``step()`` hands in again.

        Horovod does this when ``step()`` follows ``synchronize()`` without
        ``skip_synchronize()``. All ranks hold the same bits then; compressing them once more
        would lose accuracy and spoil the residuals.
        """
        if site.synchronizing and site.optimizer._synchronized and not state.fresh:
            return True
        state.fresh = True
        return False

    def _bypass_reason(self, tensor: torch.Tensor, process_set: Any) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return self._reason_to_bypass(
            dtype, tensor.dtype.is_floating_point, tensor.dim(), tensor.numel(), process_set.size()
        )

    # -- exchange="auto" --------------------------------------------------------------------

    def _decision(self, site: CallSite, state: OptimizerState | None, tensor: torch.Tensor) -> Decision | None:
        """What was decided for a tensor; None in an optimizer's first steps."""
        if state is not None:
            return state.decision
        key = self._single_key(site, tensor)
        if key not in self._decisions:
            # Everybody is in the same call here, and can measure at once.
            decision = self._advisor.decide(site.process_set, tensor.device, tensor.numel())
            self._decisions[key] = decision
            self._stats.decisions[site.name] = str(decision)
        return self._decisions[key]

    def _landed(self, undecided: Undecided) -> None:
        """A gradient of an optimizer's first steps has come back; after the last one, decide."""
        state = self._optimizers[undecided.site.optimizer]
        self._settled(state)
        if not state.rehearsal.lands(undecided.site.name):
            return
        slices = [entry for entries in state.bundles.values() for entry in entries]
        bundles = {id(bundle): bundle for _, bundle in slices}
        elements = sum(part.stop - part.start for part, _ in slices)
        device = slices[0][1].device
        state.decision = self._advisor.decide(
            undecided.site.process_set, device, elements, len(bundles), state.rehearsal.backward
        )
        self._stats.decisions[f"optimizer {state.index}"] = str(state.decision)
        if state.decision.exchange != UNCOMPRESSED:
            state.bundles = self._plan(undecided.site, state.decision.exchange)

    @staticmethod
    def _single_key(site: CallSite, tensor: torch.Tensor) -> tuple[Any, ...]:
        return (site.name, tensor.numel(), tensor.device, site.process_set.process_set_id)

    def _bypass(self, key: str, tensor: torch.Tensor, site: CallSite, reason: str) -> tuple[torch.Tensor, Any]:
        self._record_bypassed(key, tensor.numel(), tensor.element_size(), site.process_set.size(), reason)
        if tensor.dtype == torch.bfloat16:
            # Horovod cannot reduce bfloat16.
            return tensor.to(torch.float32), Unchanged(None, torch.bfloat16)
        return tensor, None

    def _context(self, site: CallSite, key: str, tensor: torch.Tensor) -> Context:
        corrected = self._feedback.correct(key, array_of(tensor)) if self.error_feedback else None
        # Horovod overwrites the gradient of a parameter anyway; elsewhere the tensor is the user's.
        in_place = site.optimizer is not None and tensor.dtype == torch.float32 and tensor.is_contiguous()
        in_place = in_place and tensor is site.parameter.grad
        # Memory from NumPy comes in huge pages: touching 100 MB from torch for the first time can take 100 ms.
        out = array_of(tensor) if in_place else empty_on(tensor.device)(tensor.numel(), "float32")
        return Context(site, key, tensor, out, corrected=corrected)

    @staticmethod
    def _carrier(site: CallSite, tensor: torch.Tensor) -> torch.Tensor:
        if site.grouped:
            # Horovod wants the tensors of a group on one device and of one type.
            dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
            return torch.ones(1, dtype=dtype, device=tensor.device)
        # On the CPU, so that reading it does not wait for a device; float64 makes 1/n * n exact in float32.
        return torch.ones(1, dtype=torch.float64)


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor as a flat float32 array for the kernels, sharing its memory where it can."""
    # reshape() alone may give a view with gaps.
    flat = tensor.detach().reshape(-1).contiguous().to(torch.float32)
    return flat.numpy() if flat.device.type == "cpu" else flat


def scaled(mean: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
    """The mean, multiplied in place by the reduced carrier."""
    factor = float(carrier)
    return mean if factor == 1.0 else mean.mul_(factor)


class QSGDCompressor(QSGDBase, Compressor):
    __doc__ = QSGDBase.__doc__


class TopKCompressor(TopKBase, Compressor):
    __doc__ = TopKBase.__doc__


class IdentityCompressor(IdentityBase, Compressor):
    __doc__ = IdentityBase.__doc__


class CastCompressor(CastBase, Compressor):
    __doc__ = CastBase.__doc__
