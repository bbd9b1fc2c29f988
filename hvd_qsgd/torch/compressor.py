"""Compressors for ``compression=`` of Horovod's torch functions.

``compress`` starts exchanges of its own over Horovod's collectives and hands Horovod a
*carrier*: one element, 1.0, that Horovod reduces in place of the gradient. ``decompress``
waits for the exchange and multiplies the mean by the reduced carrier, which reads 1 under
Average, the number of ranks under Sum, and includes whatever scaling Horovod applies.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import horovod.torch as hvd
import torch
from typing_extensions import Concatenate, ParamSpec

from hvd_qsgd.codecs import QSGD, Cast, Codec, Identity, Scaled, TopK
from hvd_qsgd.codecs.base import check_integer
from hvd_qsgd.cost import UNCOMPRESSED, Decision
from hvd_qsgd.errors import ConfigError, UnsupportedError
from hvd_qsgd.exchanges import AUTO, BY_RANKS, Piece, check_exchange
from hvd_qsgd.feedback import ErrorFeedback, Feedback, MomentumCorrection, check_feedback
from hvd_qsgd.fusion import Slice, plan_bundles
from hvd_qsgd.policies import Fixed, Policy, Tensor
from hvd_qsgd.random_words import stream_of
from hvd_qsgd.stats import Stats, TensorStats
from hvd_qsgd.torch.auto import Advisor, Rehearsal
from hvd_qsgd.torch.callsite import CallSite, find_call_site
from hvd_qsgd.torch.flights import Agreement, Bundle, Flight, empty_on

P = ParamSpec("P")
R = TypeVar("R")

#: Of :meth:`Compressor.state_dict`.
STATE_VERSION = 2


class class_or_instance(Generic[P, R]):  # noqa: N801  (a decorator)
    """A method that, called on the class, runs on the class's default instance.

    Horovod's own compressors are classes with static methods; ours can be passed the same
    way, ``compression=QSGDCompressor``, or as an instance with settings.
    """

    def __init__(self, function: Callable[Concatenate[Any, P], R]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Compressor | None, owner: type[Compressor]) -> Callable[P, R]:
        return self._function.__get__(instance if instance is not None else owner.default())


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
    context: Any


@dataclass
class OptimizerState:
    """What a compressor knows of one distributed optimizer."""

    index: int
    #: None until they are made, and when they must be made anew.
    bundles: dict[str, list[tuple[Slice, Bundle]]] | None = None
    #: Of each compressed tensor.
    codecs: dict[str, Codec] = field(default_factory=dict)
    #: Compares the settings of all ranks; None once they were found equal.
    agreement: Agreement | None = None
    #: Whether gradients came since the last synchronize().
    fresh: bool = False
    #: Of exchange="auto".
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    decision: Decision | None = None


class Compressor:
    """Horovod's compress/decompress interface around a codec.

    Use it as ``compression=`` of ``hvd.DistributedOptimizer``, ``hvd.allreduce`` or
    ``hvd.grouped_allreduce``; both the class (all defaults) and an instance work.

    Args:
        codec: what is sent, or a policy that says so for each tensor (see :mod:`hvd_qsgd.policies`).
        exchange: how it travels: "allgather", "scatter_gather" or "allreduce"; "by_ranks": the first
            for up to three ranks, else the second, or the only one that suits the codec; "auto": the
            fastest for this network and machine, by a short measurement in the first two steps (which
            are not compressed), or no compression if that would not be faster; see ``stats().decisions``.
            It decides for one codec, not for a policy.
        error_feedback: add what was lost to the next gradient; by default on for biased codecs.
            True means ``hvd_qsgd.feedback.ErrorFeedback()``; other kinds are given as an object, whose settings
            are taken and whose memory is not.
        min_elements: tensors with fewer elements go through Horovod's own allreduce.
        min_dims: so do tensors with fewer dimensions (biases, norms).
        seed: of the random rounding; the same seed gives the same run.
        fusion_elements: about how many elements travel in one exchange.

    Raises:
        ConfigError: a value is out of range, or error feedback would diverge around this codec.
    """

    _default: ClassVar[Compressor | None] = None
    #: Whether the optimizer's momentum is applied here.
    _moves_momentum: ClassVar[bool] = False

    def __init__(
        self,
        codec: Codec | Policy,
        *,
        exchange: str = BY_RANKS,
        error_feedback: bool | Feedback | None = None,
        min_elements: int = 1024,
        min_dims: int = 2,
        seed: int = 0,
        fusion_elements: int = 1 << 20,
    ) -> None:
        name = type(self).__name__
        self.policy = codec if isinstance(codec, Policy) else Fixed(codec)
        codecs = self.policy.every_codec()
        for codec in codecs:
            check_exchange(exchange, codec)
        if exchange == AUTO and not isinstance(self.policy, Fixed):
            raise ConfigError(
                f'exchange="auto" decides for one codec, and {self.policy} may give several. Leave exchange="by_ranks".'
            )
        check_integer(name, "min_elements", min_elements, 0, 2**62)
        check_integer(name, "min_dims", min_dims, 0, 64)
        check_integer(name, "seed", seed, 0, 2**64 - 1)
        check_integer(name, "fusion_elements", fusion_elements, 1, 2**40)
        self.exchange = exchange
        #: None: for tensors that may get a biased codec.
        self.error_feedback = None if error_feedback is None else bool(error_feedback)
        if self.error_feedback:
            for codec in codecs:
                check_feedback(codec)
        if isinstance(error_feedback, MomentumCorrection) and not self._moves_momentum:
            raise ConfigError(
                f"{name}: {error_feedback} takes the place of the optimizer's momentum, which only DGCCompressor does "
                f"completely. Use DGCCompressor, or another kind of feedback."
            )
        self.feedback = error_feedback.fresh() if isinstance(error_feedback, Feedback) else ErrorFeedback()
        self.min_elements = min_elements
        self.min_dims = min_dims
        self.seed = seed
        self.fusion_elements = fusion_elements
        self._stats = Stats()
        self._steps: dict[str, int] = {}
        #: What codecs remember of each tensor.
        self._memory: dict[str, dict[str, Any]] = {}
        self._optimizers: weakref.WeakKeyDictionary[Any, OptimizerState] = weakref.WeakKeyDictionary()
        self._optimizers_seen = 0
        self._advisor = Advisor(codecs[0]) if exchange == AUTO else None
        self._decisions: dict[tuple[Any, ...], Decision] = {}
        #: Bundles of tensors that came through hvd.allreduce, by name, length, device and process set.
        self._single: dict[tuple[Any, ...], list[tuple[Slice, Bundle]]] = {}

    @classmethod
    def default(cls) -> Compressor:
        """The instance that stands behind the class when it is used without settings."""
        if "_default" not in cls.__dict__ or cls._default is None:
            cls._default = cls()  # type: ignore[call-arg]
        return cls._default

    def __repr__(self) -> str:
        feedback = False if self.error_feedback is False else self.feedback
        what = self.policy.only if isinstance(self.policy, Fixed) else self.policy
        return f"{type(self).__name__}({what}, exchange={self.exchange!r}, error_feedback={feedback})"

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
        reason = self._bypass_reason(site.name, tensor, site.process_set)
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
        if self._feeds(site.name, tensor) and not site.named:
            raise UnsupportedError(
                "hvd.allreduce was called without a name, and error feedback keeps a residual for each name. "
                "Pass name=, or a compressor with error_feedback=False."
            )
        context = self._context(site, key, tensor)
        bundles = self._bundles(site, tensor) if state is None or state.bundles is None else state.bundles[site.name]
        step = self._steps[key] = self._steps.get(key, -1) + 1
        source = context.corrected if context.corrected is not None else array_of(tensor)
        owner = 0 if bundles[0][1].codec.shared_randomness else bundles[0][1].collectives.rank
        stream = stream_of(self.seed, owner, key)
        memory = self._memory.setdefault(key, {})
        for part, bundle in bundles:
            piece = Piece(
                name=part.name,
                x=source[part.start : part.stop],
                out=context.out[part.start : part.stop],
                stream=stream,
                step=step,
                first=part.start,
                keep_error=context.corrected is not None,
                shape=tuple(tensor.shape),
                memory=memory,
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
        record = self._record(context.key, context.tensor, context.flights[0][1].bundle.collectives.ranks)
        for part, flight in context.flights:
            job = flight.wait()
            piece = flight.pieces[part]
            record.exchange, record.bypassed = flight.exchange, ""
            record.payload_bytes += piece.payload_bytes
            record.wire_bytes += job.wire_bytes * piece.payload_bytes / job.payload_bytes
        if context.corrected is not None or self.policy.observes:
            # A step whose gradient is not finite will be skipped: what was fed back must not be lost with it.
            finite = job.kernels.all_finite(context.out)
            if context.corrected is not None:
                settle = self.feedback.keep if finite else self.feedback.discard
                settle(context.key, context.corrected, context.out)
            if self.policy.observes and finite:
                self.policy.observe(tensor_of(context.site.name, context.tensor), context.out)
        mean = context.out if isinstance(context.out, torch.Tensor) else torch.from_numpy(context.out)
        if mean.data_ptr() == context.tensor.data_ptr():
            return scaled(context.tensor, tensor)
        return scaled(mean, tensor).to(context.tensor.dtype).view(context.tensor.shape)

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
    def stats(self) -> Stats:
        """What this rank compressed and sent, by tensor and in total."""
        return self._stats

    @class_or_instance
    def reset(self) -> None:
        """Forget statistics, residuals and random steps."""
        self._stats = Stats()
        self.feedback.start()
        self._steps.clear()
        self._memory.clear()

    @class_or_instance
    def state_dict(self) -> dict[str, Any]:
        """Memory and random steps **of this rank**.

        Every rank has its own: save this on every rank, not on rank 0 alone, and load on each
        rank what that rank saved; or use the helpers of :mod:`hvd_qsgd.torch.state`.
        """
        arrays = {path: torch.as_tensor(array).clone() for path, array in self.feedback.arrays().items()}
        return {
            "version": STATE_VERSION,
            "config": self._saved_config(),
            "arrays": arrays,
            "numbers": self.feedback.numbers(),
            "steps": dict(self._steps),
            "memory": {key: {name: saved(v) for name, v in part.items()} for key, part in self._memory.items()},
            "policy": copy.deepcopy(self.policy.state()),
        }

    @class_or_instance
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of the same rank.

        Raises:
            ConfigError: it was saved with another codec, feedback or version.
        """
        config = self._saved_config()
        if state.get("version") != STATE_VERSION or state.get("config") != config:
            raise ConfigError(
                f"The state was saved by version {state.get('version')} with {state.get('config')}, and this "
                f"compressor is version {STATE_VERSION} with {config}. Use the settings of the saved run."
            )
        self.feedback.load({path: array_of(array.clone()) for path, array in state["arrays"].items()}, state["numbers"])
        self._steps = dict(state["steps"])
        self._memory = copy.deepcopy(state["memory"])
        self.policy.load(state["policy"])
        self.replan()

    @class_or_instance
    def check_state(self) -> None:
        """Check what must hold between the memories of all ranks; call it on all of them.

        Raises:
            ExchangeError: it does not hold (only EF21 has such an invariant).
        """

        def average(name: str, array: Any) -> Any:
            tensor = torch.as_tensor(array)
            mean = hvd.allreduce(tensor, name=f"hvd_qsgd.check.{name}", op=hvd.Average)
            return mean.numpy() if tensor.device.type == "cpu" else mean

        self.feedback.check(average)

    def _saved_config(self) -> dict[str, Any]:
        feedback = {"feedback": None} if self.error_feedback is False else self.feedback.config()
        return {**self.policy.config(), "error_feedback": feedback}

    # -- parts of compress ------------------------------------------------------------------

    def _state_of(self, site: CallSite) -> OptimizerState | None:
        if site.optimizer is None:
            return None
        state = self._optimizers.get(site.optimizer)
        if state is None:
            state = self._optimizers[site.optimizer] = OptimizerState(self._optimizers_seen)
            self._optimizers_seen += 1
        if state.bundles is None:
            state.bundles = self._plan(site.optimizer, site.process_set, self.exchange)
            codecs = {name: bundles[0][1].codec for name, bundles in state.bundles.items()}
            for name, codec in codecs.items():
                if state.codecs.get(name, codec) != codec:
                    # What one codec learned of a tensor means nothing to another.
                    self._memory.pop(f"{state.index}/{name}", None)
            state.codecs = codecs
            state.agreement = Agreement(f"settings.{state.index}", self._settings(state.bundles), site.process_set)
        return state

    def replan(self) -> None:
        """Make the bundles anew before the next gradient, and compare settings again; on all ranks.

        After the policy has changed, or after the ranks have.
        """
        self._single.clear()
        self._decisions.clear()
        for state in self._optimizers.values():
            state.bundles = state.decision = None
            state.rehearsal = Rehearsal()

    def _settled(self, state: OptimizerState) -> None:
        """Gradients come back: by now all ranks have said what their settings are."""
        state.fresh = False
        if state.agreement is not None:
            state.agreement.check(self)
            state.agreement = None

    def _plan(self, optimizer: Any, process_set: Any, exchange: str) -> dict[str, list[tuple[Slice, Bundle]]]:
        """Bundles of all gradients that this optimizer will hand in, last layers first."""
        self.policy.check_names(optimizer._parameter_names.values())
        by_kind: dict[tuple[torch.device, Codec], list[tuple[str, int]]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in reversed(parameters):
            name = optimizer._parameter_names[parameter]
            if parameter in optimizer._requires_update and not self._bypass_reason(name, parameter, process_set):
                by_kind.setdefault((parameter.device, self._codec(name, parameter)), []).append(
                    (name, parameter.numel())
                )
        plan: dict[str, list[tuple[Slice, Bundle]]] = {}
        for (device, codec), lengths in by_kind.items():
            self._add_bundles(plan, lengths, codec, device, process_set, exchange)
        return plan

    def _bundles(self, site: CallSite, tensor: torch.Tensor) -> list[tuple[Slice, Bundle]]:
        """Bundles of one tensor that travels by itself."""
        key = self._single_key(site, tensor)
        if key not in self._single:
            # Everybody is in the same call here, so the answer can be awaited at once.
            plan: dict[str, list[tuple[Slice, Bundle]]] = {}
            codec = self._codec(site.name, tensor)
            exchange = self._decisions[key].exchange if key in self._decisions else self.exchange
            self._add_bundles(plan, [(site.name, tensor.numel())], codec, tensor.device, site.process_set, exchange)
            Agreement(f"settings.{site.name}", self._settings(plan), site.process_set).check(self)
            self._single[key] = plan[site.name]
        return self._single[key]

    def _settings(self, plan: dict[str, list[tuple[Slice, Bundle]]]) -> list[Any]:
        """What must be equal on all ranks for their collectives to match."""
        codecs = [(name, bundles[0][1].codec) for name, bundles in plan.items()]
        return [repr(self), self.fusion_elements, self.min_elements, self.min_dims, *codecs]

    def _add_bundles(
        self,
        plan: dict[str, list[tuple[Slice, Bundle]]],
        lengths: list[tuple[str, int]],
        codec: Codec,
        device: torch.device,
        process_set: Any,
        exchange: str,
    ) -> None:
        for slices in plan_bundles(lengths, codec.granularity, self.fusion_elements):
            prefix = f"set{process_set.process_set_id}."
            bundle = Bundle(slices, codec, exchange, device, process_set, prefix)
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

    def _codec(self, name: str, tensor: torch.Tensor) -> Codec:
        codec = self.policy.codec(tensor_of(name, tensor))
        assert codec is not None, "tensors without a codec are left to Horovod"
        return codec

    def _feeds(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the tensor has feedback: from the start, if it may ever get a biased codec."""
        if self.error_feedback is not None:
            return self.error_feedback
        choices = self.policy.choices(tensor_of(name, tensor))
        if not any(codec.biased for codec in choices):
            return False
        for codec in choices:
            check_feedback(codec)
        return True

    def _bypass_reason(self, name: str, tensor: torch.Tensor, process_set: Any) -> str:
        """Why a tensor is left to Horovod, from what all ranks agree on; empty to compress it."""
        if not tensor.dtype.is_floating_point:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} is not a floating-point type"
        if tensor.dim() < self.min_dims:
            return f"{tensor.dim()} dimensions are fewer than min_dims={self.min_dims}"
        if tensor.numel() < max(self.min_elements, 1):
            return f"{tensor.numel()} elements are fewer than min_elements={self.min_elements}"
        if process_set.size() == 1:
            return "there is one rank only"
        if self.policy.codec(tensor_of(name, tensor)) is None:
            return "the policy gives it no codec"
        return ""

    # -- exchange="auto" --------------------------------------------------------------------

    def _decision(self, site: CallSite, state: OptimizerState | None, tensor: torch.Tensor) -> Decision | None:
        """What was decided for a tensor; None in an optimizer's first steps."""
        if state is not None:
            return state.decision
        key = self._single_key(site, tensor)
        if key not in self._decisions:
            # Everybody is in the same call here, and can measure at once.
            assert self._advisor is not None
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
        assert self._advisor is not None and state.bundles is not None
        slices = [entry for entries in state.bundles.values() for entry in entries]
        bundles = {id(bundle): bundle for _, bundle in slices}
        elements = sum(part.stop - part.start for part, _ in slices)
        device = slices[0][1].device
        state.decision = self._advisor.decide(
            undecided.site.process_set, device, elements, len(bundles), state.rehearsal.backward
        )
        self._stats.decisions[f"optimizer {state.index}"] = str(state.decision)
        if state.decision.exchange != UNCOMPRESSED:
            site = undecided.site
            state.bundles = self._plan(site.optimizer, site.process_set, state.decision.exchange)

    @staticmethod
    def _single_key(site: CallSite, tensor: torch.Tensor) -> tuple[Any, ...]:
        return (site.name, tensor.numel(), tensor.device, site.process_set.process_set_id)

    def _bypass(self, key: str, tensor: torch.Tensor, site: CallSite, reason: str) -> tuple[torch.Tensor, Any]:
        record = self._record(key, tensor, site.process_set.size())
        record.bypassed = reason
        record.payload_bytes += tensor.numel() * tensor.element_size()
        record.wire_bytes = record.uncompressed_wire_bytes
        if tensor.dtype == torch.bfloat16:
            # Horovod cannot reduce bfloat16.
            return tensor.to(torch.float32), Unchanged(None, torch.bfloat16)
        return tensor, None

    def _record(self, key: str, tensor: torch.Tensor, ranks: int) -> TensorStats:
        record = self._stats.tensors.setdefault(key, TensorStats(elements=tensor.numel()))
        raw = tensor.numel() * tensor.element_size()
        record.exchanges += 1
        record.raw_bytes += raw
        record.uncompressed_wire_bytes += 2 * (ranks - 1) / ranks * raw
        return record

    def _context(self, site: CallSite, key: str, tensor: torch.Tensor) -> Context:
        corrected = None
        if self._feeds(site.name, tensor):
            corrected = self.feedback.correct(key, self._gradient(site, tensor), site.process_set.size())
        # Horovod overwrites the gradient of a parameter anyway; elsewhere the tensor is the user's.
        in_place = site.optimizer is not None and tensor.dtype == torch.float32 and tensor.is_contiguous()
        in_place = in_place and tensor is site.parameter.grad
        # Memory from NumPy comes in huge pages: touching 100 MB from torch for the first time can take 100 ms.
        out = array_of(tensor) if in_place else empty_on(tensor.device)(tensor.numel(), "float32")
        return Context(site, key, tensor, out, corrected=corrected)

    def _gradient(self, site: CallSite, tensor: torch.Tensor) -> Any:
        """What feedback starts from."""
        return array_of(tensor)

    @staticmethod
    def _carrier(site: CallSite, tensor: torch.Tensor) -> torch.Tensor:
        if site.grouped:
            # Horovod wants the tensors of a group on one device and of one type.
            dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
            return torch.ones(1, dtype=dtype, device=tensor.device)
        # On the CPU, so that reading it does not wait for a device; float64 makes 1/n * n exact in float32.
        return torch.ones(1, dtype=torch.float64)


def tensor_of(name: str, tensor: torch.Tensor) -> Tensor:
    """What a policy knows of a tensor."""
    return Tensor(name, tuple(tensor.shape))


def saved(value: Any) -> Any:
    """A number as it is, and an array of any backend as a tensor of its own."""
    return value if isinstance(value, (int, float)) else torch.as_tensor(value).clone()


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor as a flat float32 array for the kernels, sharing its memory where it can."""
    # reshape() alone may give a view with gaps.
    flat = tensor.detach().reshape(-1).contiguous().to(torch.float32)
    return flat.numpy() if flat.device.type == "cpu" else flat


def scaled(mean: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
    """The mean, multiplied in place by the reduced carrier."""
    factor = float(carrier)
    return mean if factor == 1.0 else mean.mul_(factor)


class QSGDCompressor(Compressor):
    """Quantization with unbiased rounding, 8 times fewer bytes at the default 4 bits.

    Args:
        bits, bucket_size, norm, rounding: see :class:`hvd_qsgd.QSGD`.
        scaled: shrink stochastic rounding with L2 norm for error feedback; see :class:`hvd_qsgd.Scaled`.
        settings: see :class:`Compressor`.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int = 512,
        norm: str = "max",
        rounding: str = "stochastic",
        scaled: bool = False,
        **settings: Any,
    ) -> None:
        codec = QSGD(bits, bucket_size, norm, rounding)
        super().__init__(Scaled(codec) if scaled else codec, **settings)


class TopKCompressor(Compressor):
    """The largest values only, with error feedback.

    Args:
        ratio, k, values: see :class:`hvd_qsgd.TopK`.
        settings: see :class:`Compressor`.
    """

    def __init__(
        self, ratio: float | None = 0.01, k: int | None = None, values: str = "float32", **settings: Any
    ) -> None:
        super().__init__(TopK(ratio, k, values), **settings)


class IdentityCompressor(Compressor):
    """Sends float32 through the same path as the others, for comparison."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Identity(), **settings)


class CastCompressor(Compressor):
    """Sends float16 or bfloat16 and adds up in float32.

    Args:
        dtype: see :class:`hvd_qsgd.Cast`.
        settings: see :class:`Compressor`.
    """

    def __init__(self, dtype: str = "float16", **settings: Any) -> None:
        super().__init__(Cast(dtype), **settings)
