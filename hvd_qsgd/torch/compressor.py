"""Compressors for ``compression=`` of Horovod's torch functions.

``compress`` starts exchanges of its own over Horovod's collectives and hands Horovod a
*carrier*: one element, 1.0, that Horovod reduces in place of the gradient. ``decompress``
waits for the exchange and multiplies the mean by the reduced carrier, which reads 1 under
Average, the number of ranks under Sum, and includes whatever scaling Horovod applies.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
from typing_extensions import Unpack

from hvd_qsgd.codecs import Codec
from hvd_qsgd.codecs.random_words import stream_of
from hvd_qsgd.collectives.horovod_torch import HorovodCollectives, wrap
from hvd_qsgd.compressors.base import CompressorBase, class_or_instance
from hvd_qsgd.compressors.settings import Settings
from hvd_qsgd.errors import ConfigError, ExchangeError, UnsupportedError
from hvd_qsgd.exchanges import AUTO, Piece
from hvd_qsgd.kernels.torch.untraced import out_of_inference, untraced
from hvd_qsgd.observe.monitor import Monitor
from hvd_qsgd.observe.probe import Probe
from hvd_qsgd.policies import Fixed, Policy, Tensor
from hvd_qsgd.reduction.fusion import Slice, backward_order, plan_bundles
from hvd_qsgd.reduction.memory import NAMED, group_text, plain_name
from hvd_qsgd.torch.callsite import Call, CallSite, find_call_site, steps_now
from hvd_qsgd.torch.discards import Discards, not_applied
from hvd_qsgd.torch.flights import Agreement, Bundle, Flight, empty_on, kernels_on
from hvd_qsgd.torch.preflight import preflight
from hvd_qsgd.torch.streams import bring, hand_back, on_own_stream
from hvd_qsgd.torch.tensors import array_of, carrier_for, flat, put_back, reducible, room_for_mean, scaled
from hvd_qsgd.tuning.auto import Advisor
from hvd_qsgd.tuning.cost import UNCOMPRESSED, Decision
from hvd_qsgd.tuning.warm_up import Rehearsal

#: Exchanges of one tensor that are under way at once, where somebody waits for it. More would give Horovod many to
#: fuse: it hands back what it has fused all at once, and decoding begins when the wire has fallen silent.
IN_FLIGHT = 3

V = TypeVar("V")


@dataclass
class Context:
    """What ``decompress`` must know of a tensor whose exchange is under way."""

    site: CallSite
    described: Tensor
    tensor: torch.Tensor
    #: Receives the mean; may be the tensor's own memory.
    out: Any = None
    in_place: bool = False
    flights: list[tuple[Slice, Flight]] = field(default_factory=list)
    #: With error feedback: gradient plus residual, which the exchange turns into the new residual.
    corrected: Any = None
    #: If what is lost is measured.
    probe: Probe | None = None


@dataclass
class Again:
    """A result of ``synchronize()`` that comes once more."""

    tensor: torch.Tensor


@dataclass
class Copied:
    """A tensor that is left to Horovod as a copy."""

    site: CallSite
    tensor: torch.Tensor


@dataclass
class Refused:
    """A tensor that is left to Horovod although it should have been compressed.

    ``decompress`` raises the error: before that Horovod compares what the ranks hand in, and raises on those whose
    tensors are not refused.
    """

    site: CallSite
    error: UnsupportedError


@dataclass
class Undecided:
    """A tensor of the steps before ``exchange="auto"`` decides; ``context`` is what it has otherwise."""

    site: CallSite
    context: Copied | None


@dataclass
class OptimizerState:
    """What a compressor knows of one distributed optimizer."""

    index: int
    #: Of its parameters, by name: the keys of their memory.
    keys: dict[str, str]
    #: None until they are made, and when they must be made anew.
    bundles: dict[str, list[tuple[Slice, Bundle]]] | None = None
    #: Of each compressed tensor.
    codecs: dict[str, Codec] = field(default_factory=dict)
    #: Compares the settings of all ranks; None once they were found equal.
    agreement: Agreement | None = None
    #: What a program does with gradients that it synchronizes itself.
    discards: Discards = field(default_factory=Discards)
    #: Of exchange="auto".
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    decision: Decision | None = None
    #: The gradients that came last, by name.
    gradients: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)

    def is_again(self, site: CallSite) -> bool:
        """Whether a result of ``synchronize()`` comes once more, and not one that the program has put in its place."""
        last = self.gradients.get(site.name)
        self.gradients[site.name] = weakref.ref(site.parameter.grad)
        return site.again and last is not None and last() is site.parameter.grad


class TorchSettings(Settings, total=False):
    """Settings of every compressor for torch."""

    progress_thread: bool
    """Default: False"""


class Compressor(CompressorBase):
    """Horovod's compress/decompress interface around a codec.

    Use it as ``compression=`` of ``hvd.DistributedOptimizer``, ``hvd.allreduce`` or
    ``hvd.grouped_allreduce``; both the class (all defaults) and an instance work.
    The settings are those of :class:`hvd_qsgd.compressors.base.CompressorBase`; with ``exchange="auto"`` the
    first two steps of an optimizer are not compressed, because they end with the measurement.

    Args:
        codec: see :class:`hvd_qsgd.compressors.base.CompressorBase`.
        progress_thread: let a thread go on with exchanges during the backward pass: the second phase of
            "scatter_gather" and "allreduce" starts when the first has ended, and what has come is decoded. Only for
            programs in which every other Horovod call between ``backward()`` and ``step()`` has a ``name=``: Horovod
            numbers those without, and with a thread the numbers differ between ranks, which then wait forever.
        settings: see :class:`hvd_qsgd.compressors.base.CompressorBase`.

    Raises:
        ConfigError: a value is out of range, or the settings do not go together.
    """

    def __init__(self, codec: Codec | Policy, *, progress_thread: bool = False, **settings: Unpack[Settings]) -> None:
        super().__init__(codec, **settings)
        self.progress_thread = progress_thread
        if self.exchange == AUTO and not (isinstance(self.policy, Fixed) and self.policy.only is not None):
            raise ConfigError(
                f"exchange='auto' decides for one codec, and {self.policy} has several or none. Leave exchange= out."
            )

    def _begin(self, monitor: Monitor | None = None) -> None:
        super()._begin(monitor)
        self._optimizers: weakref.WeakKeyDictionary[Any, OptimizerState] = weakref.WeakKeyDictionary()
        self._optimizers_seen = 0
        self._advisor = Advisor()
        self._decisions: dict[tuple[Any, ...], Decision] = {}
        #: Bundles of tensors that came through hvd.allreduce, by :func:`single_key`.
        self._single: dict[tuple[Any, ...], list[tuple[Slice, Bundle]]] = {}
        #: Why tensors are left to Horovod, by all that this depends on.
        self._reasons: dict[tuple[Any, ...], str] = {}

    # -- Horovod's interface ----------------------------------------------------------------

    @class_or_instance
    @untraced
    @out_of_inference
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start the exchange of a gradient; Horovod calls this.

        Returns:
            What Horovod has to reduce (the carrier, or the tensor itself if it is not
            compressed) and the context for :meth:`decompress`.

        Raises:
            UnsupportedError: the caller wants what compression cannot do correctly.
            ExchangeError: the ranks do not mean the same by an allreduce.
        """
        site = find_call_site(tensor)
        if site.refusal is not None:
            return reducible(tensor), Refused(site, site.refusal)
        if site.call is not None:
            self._ask_others(site, site.call)
        state = self._state_of(site)
        described = self._described(site, tensor, state)
        key = described.key
        if state is not None and state.is_again(site):
            # All ranks hold the same bits. Compressing them once more would lose accuracy and spoil the residuals.
            return carrier_for(site, tensor), Again(tensor)
        if not_applied(site.optimizer):
            self.feedback.settle(key, applied=False)
        measures = self.monitor is not None and self.monitor.starts(key)
        sparse = "" if tensor.layout == torch.strided else "it is sparse"
        reason = sparse or self._bypass_reason(described, tensor.dtype, site.ranks)
        if reason:
            return self._bypass(key, tensor, site, reason)
        if self.exchange == AUTO:
            decision = self._decision(site, state, tensor)
            if decision is None:
                assert state is not None
                state.rehearsal.takes_off(site.name)
                sent, copied = self._bypass(key, tensor, site, 'exchange="auto" measures in the first steps')
                return sent, Undecided(site, copied)
            if decision.exchange == UNCOMPRESSED:
                return self._bypass(key, tensor, site, f'exchange="auto": {decision}')
        if self._feeds(described) and not site.named:
            raise UnsupportedError(
                "hvd.allreduce was called without a name, and error feedback keeps a residual for each name. "
                "Pass name=, or a compressor with error_feedback=False."
            )
        if state is None or state.bundles is None:
            bundles = self._bundles(site, tensor)
        else:
            try:
                bundles = planned(state.bundles, site.name, tensor)
            except UnsupportedError as refusal:
                return reducible(tensor), Refused(site, refusal)
        bring(tensor)
        with on_own_stream(tensor.device):
            context = self._take_off(site, described, tensor, bundles, measures)
        return carrier_for(site, tensor), context

    def _take_off(
        self,
        site: CallSite,
        described: Tensor,
        tensor: torch.Tensor,
        bundles: list[tuple[Slice, Bundle]],
        measures: bool,
    ) -> Context:
        """Hand a gradient to the exchanges of its bundles."""
        key = described.key
        step = self.memory.begin(key)
        context = Context(site, described, tensor)
        if self._feeds(described):
            context.corrected = self.feedback.correct(key, self._gradient(site, tensor), site.ranks)
            source = context.corrected
        elif measures or not kernels_on(bundles[0][1].codec, tensor.device).halves:
            source = array_of(tensor)
        else:
            source = flat(tensor)
        if measures:
            context.probe = Probe(source, own=context.corrected is not None)
            source = context.probe.x
        context.out, context.in_place = room_for_mean(site, tensor, source)
        owner = 0 if bundles[0][1].codec.shared_randomness else bundles[0][1].collectives.rank
        stream = stream_of(self.seed, owner, key)
        memory = self.memory.of_codec(key)
        # The caller waits for the carrier at once, and Horovod reduces it after all that was started before: wait
        # here, and decode what has come while the rest is on its way. Besides, Horovod names the carrier of a call
        # without a name after the number of collectives that this process has started so far, which is the same on
        # all ranks only when none of ours is still to come.
        waits = site.optimizer is None and not (site.named and site.grouped)
        for part, bundle in bundles:
            piece = Piece(
                name=part.name,
                x=source[part.start : part.stop],
                out=context.out[part.start : part.stop],
                stream=stream,
                step=step,
                first=part.start,
                keep_error=context.corrected is not None or measures,
                shape=tuple(tensor.shape),
                memory=memory,
                dtype=name_of(tensor.dtype),
            )
            flight = bundle.flight_for(part)
            context.flights.append((part, flight))
            flight.add(part, piece)
            if waits and len(context.flights) > IN_FLIGHT:
                context.flights[-1 - IN_FLIGHT][1].wait()
        if waits:
            for _, flight in context.flights:
                flight.wait()
        return context

    @class_or_instance
    @untraced
    @out_of_inference
    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        """Wait for the exchange and return the reduced gradient; Horovod calls this.

        Raises:
            UnsupportedError: the caller wants what compression cannot do correctly.
            ExchangeError: the ranks did not mean the same exchange.
        """
        if context is None:
            return tensor
        if isinstance(context, Refused):
            if context.site.optimizer is not None:
                # The step is given up, and can be begun anew.
                context.site.optimizer._handles.clear()
            raise context.error
        if isinstance(context, Undecided):
            self._landed(context)
            return self.decompress(tensor, context.context)
        if isinstance(context, Again):
            return scaled(context.tensor, tensor)
        if isinstance(context, Copied):
            return put_back(context.site, context.tensor, tensor)
        if context.site.optimizer is not None:
            self._settled(self._optimizers[context.site.optimizer])
        # Horovod wrote the carrier of a group, which is on the device, before the current stream goes on.
        bring(context.tensor)
        with on_own_stream(context.tensor.device):
            mean = self._land(context)
            if context.in_place:
                result = scaled(context.tensor, tensor)
            else:
                result = put_back(context.site, context.tensor, scaled(mean, tensor))
        hand_back(result)
        return result

    def _land(self, context: Context) -> torch.Tensor:
        """The mean gradient, flat, of the gradient's type or float32."""
        ranks = context.flights[0][1].bundle.collectives.ranks
        key = context.described.key
        record = self._record(key, context.tensor.numel(), context.tensor.element_size(), ranks)
        for part, flight in context.flights:
            job = flight.wait()
            flight.count(part, record)
        if context.probe is not None:
            context.probe.read(record)
        looked = [flight.finite(part) for part, flight in context.flights]
        finite = None if None in looked else all(looked)
        self._settle(key, context.described, context.corrected, context.out, job.kernels, finite)
        if context.corrected is not None:
            self._applied(context.site, key)
        return context.out if isinstance(context.out, torch.Tensor) else torch.from_numpy(context.out)

    @class_or_instance
    def set_epoch(self, epoch: int, learning_rate: float | None = None) -> None:
        """Start an epoch (0, 1, ...), for policies that change with time; call it on all ranks, between steps.

        Rank 0 decides for all.
        """
        if isinstance(self.policy, Fixed):
            return
        decisions = self.policy.decide(epoch, learning_rate)
        self.policy.apply(hvd.broadcast_object(decisions, root_rank=0, name="hvd_qsgd.policy"))
        self.replan()

    # -- what users ask --------------------------------------------------------------------

    @class_or_instance
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`hvd_qsgd.compressors.base.CompressorBase.load_state_dict`."""
        super().load_state_dict(state)
        self.replan()

    @class_or_instance
    def check_state(self) -> None:
        """Check what must hold between the memories of all ranks; call it on all of them.

        Raises:
            ExchangeError: it does not hold (only EF21 has such an invariant).
        """

        def average(name: str, array: Any) -> Any:
            tensor = wrap(array)
            hand_back(tensor)
            mean = hvd.allreduce(tensor, name=f"hvd_qsgd.check.{name}", op=hvd.Average)
            return mean.numpy() if tensor.device.type == "cpu" else mean

        if not self.feedback.linked:
            return
        # Averages that some ranks do not ask for would be waited for.
        names = sorted(self.feedback.arrays())
        for rank, others in enumerate(hvd.allgather_object(names, name="hvd_qsgd.check")):
            different = sorted(set(names) ^ set(others))
            if different:
                raise ExchangeError(
                    f"The memories of rank {hvd.rank()} and rank {rank} do not fit together: only one of them has "
                    f"{', '.join(different[:3])}. Some rank's state was lost: start again with compressor.reset() on "
                    f"all ranks, or load the states that were saved together."
                )
        self.feedback.check(average)

    def _place(self) -> tuple[int, int]:
        return int(hvd.rank()), int(hvd.size())

    @staticmethod
    def _saved(array: Any) -> Any:
        kept = wrap(array)
        hand_back(kept)
        return kept.clone()

    @staticmethod
    def _loaded(value: Any) -> Any:
        bring(value)
        with on_own_stream(value.device):
            return array_of(value.clone())

    def _unapplied(self) -> list[str]:
        return [
            key
            for optimizer, state in self._optimizers.items()
            if not_applied(optimizer)
            for key in state.keys.values()
        ]

    # -- parts of compress ------------------------------------------------------------------

    def _described(self, site: CallSite, tensor: torch.Tensor, state: OptimizerState | None = None) -> Tensor:
        if state is not None:
            return tensor_of(site.name, tensor, state.keys[site.name])
        return self._named(site.name, site.process_set, tensor)

    def _named(self, name: str, process_set: Any, tensor: torch.Tensor) -> Tensor:
        """A tensor of ``hvd.allreduce``."""
        (key,) = self._claim([(name, NAMED)], group_of(process_set))
        return tensor_of(name, tensor, key)

    def _claim_parameters(self, optimizer: Any) -> dict[str, str]:
        names = {name: parameter for parameter, name in optimizer._parameter_names.items()}
        keys = self._claim(list(names.items()), group_of(optimizer.process_set))
        return dict(zip(names, keys))

    def _applied(self, site: CallSite, key: str) -> None:
        """A mean gradient goes back: if the optimizer steps now, its residual holds and the one before it is freed."""
        if site.optimizer is None:
            return
        if steps_now():
            self.feedback.settle(key, applied=True)
        else:
            self._optimizers[site.optimizer].discards.watch(site, key, self.feedback)

    def _state_of(self, site: CallSite) -> OptimizerState | None:
        if site.optimizer is None:
            return None
        state = self._optimizers.get(site.optimizer)
        if state is None:
            keys = self._claim_parameters(site.optimizer)
            state = self._optimizers[site.optimizer] = OptimizerState(self._optimizers_seen, keys)
            self._optimizers_seen += 1
        if state.bundles is None:
            plan = self._make_bundles(state, site)
            parameters = reduced_parameters(site.optimizer)
            tensors = [said_of(name, parameters[name], repr(of[0][1].codec)) for name, of in plan.items()]
            # Ranks may have made other optimizers before, so no count of them tells which one this is.
            state.agreement = Agreement(min(parameters), self._settings(tensors), tensors, site.process_set)
        return state

    def _make_bundles(self, state: OptimizerState, site: CallSite) -> dict[str, list[tuple[Slice, Bundle]]]:
        exchange = state.decision.exchange if state.decision is not None else self.exchange
        plan = state.bundles = self._plan(site.optimizer, site.process_set, exchange)
        codecs = {name: bundles[0][1].codec for name, bundles in plan.items()}
        for name, codec in codecs.items():
            if state.codecs.get(name, codec) != codec:
                # What one codec learned of a tensor means nothing to another.
                self.memory.of_codecs.pop(state.keys[name], None)
        state.codecs = codecs
        return plan

    def replan(self) -> None:
        """Make the bundles anew before the next gradient, and compare settings again; on all ranks.

        After the policy has changed, or after the ranks have.
        """
        self._single.clear()
        self._reasons.clear()
        # Ranks that have come know nothing of what was measured and decided.
        self._advisor = Advisor()
        self._decisions.clear()
        for state in self._optimizers.values():
            state.bundles = state.decision = None
            state.rehearsal = Rehearsal()

    def _settled(self, state: OptimizerState) -> None:
        """Gradients come back: by now all ranks have said what their settings are."""
        if state.agreement is not None:
            state.agreement.check()
            state.agreement = None

    def _plan(self, optimizer: Any, process_set: Any, exchange: str) -> dict[str, list[tuple[Slice, Bundle]]]:
        """Bundles of all gradients that this optimizer will hand in, last layers first."""
        self.policy.check_names([plain_name(name) for name in optimizer._parameter_names.values()])
        by_kind: dict[tuple[torch.device, Codec], list[tuple[str, int]]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter not in optimizer._parameter_names:
                raise UnsupportedError(
                    f"A parameter of shape {tuple(parameter.shape)} was added to the optimizer after "
                    f"hvd.DistributedOptimizer was made, and Horovod does not reduce its gradients: it would become "
                    f"another one on each rank. Call add_param_group() before, or make the DistributedOptimizer anew."
                )
        parameters = reduced_parameters(optimizer)
        state, ranks = self._optimizers[optimizer], process_set.size()
        for name in backward_order(parameters):
            parameter = parameters[name]
            described = tensor_of(name, parameter, state.keys[name])
            if not self._bypass_reason(described, parameter.dtype, ranks):
                kind = (parameter.device, self._codec(described))
                by_kind.setdefault(kind, []).append((name, parameter.numel()))
        plan: dict[str, list[tuple[Slice, Bundle]]] = {}
        for (device, codec), lengths in by_kind.items():
            self._add_bundles(plan, lengths, codec, device, process_set, exchange)
        return plan

    def _bundles(self, site: CallSite, tensor: torch.Tensor) -> list[tuple[Slice, Bundle]]:
        """Bundles of one tensor that travels by itself."""
        codec = self._codec(self._described(site, tensor))
        key = single_key(site.name, site.process_set, tensor)
        if key not in self._single:
            plan: dict[str, list[tuple[Slice, Bundle]]] = {}
            exchange = self._decisions[key].exchange if key in self._decisions else self.exchange
            # Horovod keeps names of groups apart from others, too.
            prefix = "group." if site.grouped else ""
            lengths = [(site.name, tensor.numel())]
            self._add_bundles(plan, lengths, codec, tensor.device, site.process_set, exchange, prefix)
            self._single = of_living_sets(self._single)
            self._single[key] = plan[site.name]
        return self._single[key]

    def _ask_others(self, site: CallSite, call: Call) -> None:
        """Return when all ranks are known to mean the same by a call, unless this one compresses nothing of it."""
        tensors, leaves_all = [], True
        for index, tensor in enumerate(call.tensors):
            name = call.name_of(index)
            described = self._named(name, site.process_set, tensor)
            decision = self._decisions.get(single_key(name, site.process_set, tensor))
            what = f"is left to Horovod: {self._bypass_reason(described, tensor.dtype, site.ranks)}"
            if decision is not None and decision.exchange == UNCOMPRESSED:
                what = "is not compressed: auto"
            elif not self._bypass_reason(described, tensor.dtype, site.ranks):
                what = f"{self._codec(described)} {decision.exchange if decision is not None else self.exchange}"
                leaves_all = False
            tensors.append(said_of(name, tensor, what))
        if not leaves_all:
            preflight(call, site.process_set, self._settings(tensors), tensors)

    def _add_bundles(
        self,
        plan: dict[str, list[tuple[Slice, Bundle]]],
        lengths: list[tuple[str, int]],
        codec: Codec,
        device: torch.device,
        process_set: Any,
        exchange: str,
        prefix: str = "",
    ) -> None:
        self._use_threads(hvd.local_size(), torch.get_num_threads())
        for slices in plan_bundles(lengths, codec.granularity, self.fusion_elements):
            bundle = Bundle(slices, codec, exchange, device, process_set, prefix, self.progress_thread)
            for part in slices:
                plan.setdefault(part.name, []).append((part, bundle))

    def _codec(self, described: Tensor) -> Codec:
        codec = self.policy.codec(described)
        assert codec is not None, "tensors without a codec are left to Horovod"
        return codec

    def _bypass_reason(self, described: Tensor, dtype: torch.dtype, ranks: int) -> str:
        # Asked for each gradient in each step.
        case = (described, dtype, ranks)
        reason = self._reasons.get(case)
        if reason is None:
            reason = self._reason_to_bypass(described, name_of(dtype), dtype.is_floating_point, ranks)
            self._reasons[case] = reason
        return reason

    # -- exchange="auto" --------------------------------------------------------------------

    def _decision(self, site: CallSite, state: OptimizerState | None, tensor: torch.Tensor) -> Decision | None:
        """What was decided for a tensor; None in an optimizer's first steps."""
        if state is not None:
            return state.decision
        key = single_key(site.name, site.process_set, tensor)
        if key not in self._decisions:
            # Everybody is in the same call here, and can measure at once.
            codec = self._codec(self._described(site, tensor))
            decision = self._advise(codec, site.process_set, tensor.device, tensor.numel())
            self._decisions = of_living_sets(self._decisions)
            self._decisions[key] = decision
            self._stats.decisions[site.name] = str(decision)
        return self._decisions[key]

    def _landed(self, undecided: Undecided) -> None:
        """A gradient of an optimizer's first steps has come back; after the last one, decide."""
        state = self._optimizers[undecided.site.optimizer]
        self._settled(state)
        if not state.rehearsal.lands(undecided.site.name):
            return
        assert state.bundles is not None
        slices = [entry for entries in state.bundles.values() for entry in entries]
        bundles = {id(bundle): bundle for _, bundle in slices}
        elements = sum(part.stop - part.start for part, _ in slices)
        first = slices[0][1]
        state.decision = self._advise(
            first.codec, undecided.site.process_set, first.device, elements, len(bundles), state.rehearsal.backward
        )
        self._stats.decisions[f"optimizer {state.index}"] = str(state.decision)
        if state.decision.exchange != UNCOMPRESSED:
            self._make_bundles(state, undecided.site)

    def _advise(self, codec: Codec, process_set: Any, device: torch.device, elements: int, *plan: Any) -> Decision:
        """What to do with ``elements`` elements; ``plan``: see :meth:`hvd_qsgd.tuning.auto.Advisor.decide`."""
        group = f"set{process_set.process_set_id}"
        collectives = HorovodCollectives(process_set)
        return self._advisor.decide(kernels_on(codec, device), collectives, empty_on(device), group, elements, *plan)

    def _bypass(self, key: str, tensor: torch.Tensor, site: CallSite, reason: str) -> tuple[torch.Tensor, Any]:
        self._record_bypassed(key, tensor.numel(), tensor.element_size(), site.ranks, reason)
        sent = reducible(tensor)
        return sent, None if sent is tensor else Copied(site, tensor)

    def _gradient(self, site: CallSite, tensor: torch.Tensor) -> Any:
        """What feedback starts from."""
        return array_of(tensor)


def tensor_of(name: str, tensor: torch.Tensor, key: str) -> Tensor:
    """What a policy knows of a tensor."""
    return Tensor(plain_name(name), tuple(tensor.shape), key)


def group_of(process_set: Any) -> str:
    """The ranks of a process set as :meth:`TensorMemory.claim` takes them."""
    return group_text(None if process_set.process_set_id == 0 else process_set.ranks)


def said_of(name: str, tensor: torch.Tensor, what: str) -> str:
    """What all ranks must say of a tensor, to be told where they do not."""
    return f"{name} {tuple(tensor.shape)} {name_of(tensor.dtype)} on {tensor.device.type}: {what}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reduced_parameters(optimizer: Any) -> dict[str, torch.Tensor]:
    """The parameters whose gradients Horovod reduces, by name."""
    return {name: p for p, name in optimizer._parameter_names.items() if p in optimizer._requires_update}


def single_key(name: str, process_set: Any, tensor: torch.Tensor) -> tuple[Any, ...]:
    """Of what is kept of a tensor of ``hvd.allreduce``.

    The set itself, not its id: Horovod gives the id of one that was removed to the next.
    """
    return (process_set, name, tuple(tensor.shape), tensor.dtype, tensor.device)


def of_living_sets(kept: dict[tuple[Any, ...], V]) -> dict[tuple[Any, ...], V]:
    """What is kept under a :func:`single_key`, without that of process sets that were removed."""
    return {key: value for key, value in kept.items() if key[0].process_set_id is not None}


def planned(plan: dict[str, list[tuple[Slice, Bundle]]], name: str, tensor: torch.Tensor) -> list[tuple[Slice, Bundle]]:
    """The bundles of a tensor.

    Raises:
        UnsupportedError: they were made for another length.
    """
    bundles = plan.get(name, [])
    length = bundles[-1][0].stop if bundles else 0
    if length != tensor.numel():
        raise UnsupportedError(
            f"A gradient of {tensor.numel()} elements came for {name!r}, of which {length} were to be compressed when "
            f"the exchanges were planned. After the shape of a parameter has changed, call compressor.replan() on all "
            f"ranks."
        )
    return bundles
