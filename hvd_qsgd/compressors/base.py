"""What the compressors of all frameworks share: settings, defaults, statistics, state.

A framework's compressor adds Horovod's ``compress`` and ``decompress``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Generic, TypeVar

from typing_extensions import Concatenate, ParamSpec, Self

from hvd_qsgd.codecs import Codec
from hvd_qsgd.codecs.base import Kernels, check_integer
from hvd_qsgd.compressors.settings import show_settings
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import BY_RANKS, check_exchange
from hvd_qsgd.exchanges.base import ring_bytes
from hvd_qsgd.feedback import ErrorFeedback, Feedback, MomentumCorrection, check_feedback
from hvd_qsgd.kernels.threads import owned_cores, use_threads
from hvd_qsgd.observe.monitor import Monitor
from hvd_qsgd.observe.stats import Stats, TensorStats
from hvd_qsgd.policies import Fixed, Policy, Tensor
from hvd_qsgd.reduction.fusion import BUNDLE_ELEMENTS
from hvd_qsgd.reduction.memory import TensorMemory

P = ParamSpec("P")
R = TypeVar("R")

#: Of :meth:`CompressorBase.state_dict`.
STATE_VERSION = 5


class class_or_instance(Generic[P, R]):  # noqa: N801  (a decorator)
    """A method that, called on the class, runs on the class's default instance.

    Horovod's own compressors are classes with static methods; ours can be passed the same
    way, ``compression=QSGDCompressor``, or as an instance with settings.
    """

    def __init__(self, function: Callable[Concatenate[Any, P], R]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: CompressorBase | None, owner: type[CompressorBase]) -> Callable[P, R]:
        if instance is not None:
            return self._function.__get__(instance)

        # Made when it is called: help() looks at methods of classes that have no default instance, too.
        @functools.wraps(self._function)
        def on_default(*arguments: P.args, **settings: P.kwargs) -> R:
            return self._function(owner.default(), *arguments, **settings)

        return on_default


class CompressorBase:
    """Settings and state around a codec.

    Args:
        codec: what is sent, or a policy that says so for each tensor (see :mod:`hvd_qsgd.policies`).
        exchange: how it travels: "allgather", "scatter_gather" or "allreduce"; "by_ranks": the first
            for up to three ranks, else the second; "auto": the fastest for this network and machine, by
            a short measurement, or no compression if that would not be faster; see ``stats().decisions``.
        error_feedback: add what was lost to the next gradient; by default on for biased codecs.
            True means ``hvd_qsgd.feedback.ErrorFeedback()``; other kinds are given as an object, whose settings
            are taken and whose memory is not.
        min_elements: tensors with fewer elements go through Horovod's own allreduce.
        min_dims: so do tensors with fewer dimensions (biases, norms).
        seed: of the random rounding; the same seed gives the same run.
        fusion_elements: about how many elements travel in one exchange.
        monitor: is told what happens; see :class:`hvd_qsgd.observe.Monitor`.
        threads: that encode and decode a long tensor on the CPU, where the kernels can (QSGD); by default the cores of
            this machine divided by its ranks, and no more than the framework uses. One number for the whole process.

    Raises:
        ConfigError: a value is out of range, or error feedback would diverge around this codec.
    """

    _default: ClassVar[CompressorBase | None] = None
    #: Whether the optimizer's momentum is applied here.
    _moves_momentum: ClassVar[bool] = False
    #: Settings that ``__init__`` makes itself.
    _made: ClassVar[Collection[str]] = ()

    def __init__(
        self,
        codec: Codec | Policy,
        *,
        exchange: str = BY_RANKS,
        error_feedback: bool | Feedback | None = None,
        min_elements: int = 1024,
        min_dims: int = 2,
        seed: int = 0,
        fusion_elements: int = BUNDLE_ELEMENTS,
        monitor: Monitor | None = None,
        threads: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.policy = codec if isinstance(codec, Policy) else Fixed(codec)
        codecs = self.policy.every_codec()
        for codec in codecs:
            check_exchange(exchange, codec)
        check_integer(name, "min_elements", min_elements, 0, 2**62)
        check_integer(name, "min_dims", min_dims, 0, 64)
        check_integer(name, "seed", seed, 0, 2**64 - 1)
        check_integer(name, "fusion_elements", fusion_elements, 1, 2**40)
        if threads is not None:
            check_integer(name, "threads", threads, 1, 1024)
        self.exchange = exchange
        #: None: for tensors that may get a biased codec.
        self.error_feedback = None if error_feedback is None else bool(error_feedback)
        if isinstance(error_feedback, MomentumCorrection) and not self._moves_momentum:
            raise ConfigError(
                f"{name}: {error_feedback} takes the place of the optimizer's momentum, which only DGCCompressor does "
                f"completely. Use DGCCompressor, or another kind of feedback."
            )
        self.feedback = error_feedback.fresh() if isinstance(error_feedback, Feedback) else ErrorFeedback()
        if self.error_feedback:
            for codec in codecs:
                check_feedback(codec, self.feedback, exchange)
        self.min_elements = min_elements
        self.min_dims = min_dims
        self.seed = seed
        self.fusion_elements = fusion_elements
        self.threads = threads
        self.memory = TensorMemory(self.feedback, self.policy)
        self._stats = Stats()
        self._begin(monitor)
        if monitor is not None:
            monitor.watch(self, self._place)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # help() does not look for it in the bases.
        cls.__doc__ = inspect.getdoc(cls)
        if "__init__" in vars(cls):
            base = next(base for base in cls.__mro__[1:] if issubclass(base, CompressorBase))
            show_settings(vars(cls)["__init__"], base, cls._made)

    @classmethod
    def default(cls) -> Self:
        """The instance that stands behind the class when it is used without settings."""
        if "_default" not in cls.__dict__ or cls._default is None:
            cls._default = cls()  # type: ignore[call-arg]
        return cls._default  # type: ignore[return-value]

    def _begin(self, monitor: Monitor | None = None) -> None:
        """Make what belongs to this process, and to the optimizers and graphs in it; copies get their own."""
        self.monitor = monitor

    def __getstate__(self) -> dict[str, Any]:
        """Settings and memory, for copies and other processes. No monitor watches a copy."""
        blank = object.__new__(type(self))
        blank._begin()
        return {name: value for name, value in vars(self).items() if name not in vars(blank)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()
        vars(self).update(state)

    def __repr__(self) -> str:
        biased = [codec.biased for codec in self.policy.every_codec()]
        if self.error_feedback or (self.error_feedback is None and all(biased)):
            feedback = str(self.feedback)
        else:
            feedback = f"{self.feedback} for biased codecs" if self.error_feedback is None and any(biased) else "False"
        what = self.policy.only if isinstance(self.policy, Fixed) else self.policy
        return f"{type(self).__name__}({what}, exchange={self.exchange!r}, error_feedback={feedback})"

    # -- what users ask --------------------------------------------------------------------

    @class_or_instance
    def stats(self) -> Stats:
        """What this rank compressed and sent, by tensor and in total."""
        return self._stats

    @class_or_instance
    def reset(self) -> None:
        """Forget statistics, residuals and random steps."""
        self._forget()

    def _forget(self) -> None:
        self._stats = Stats()
        self.memory.clear()

    @class_or_instance
    def discard_last(self) -> None:
        """Say that the gradients that were exchanged last are not applied; call it on all ranks.

        Residuals become what they were before. For gradients of ``hvd.allreduce`` and of TensorFlow's tapes, where
        nobody else can tell; gradients of a torch optimizer that does not step are found out.
        """
        self.memory.discard_last()

    @class_or_instance
    def state_dict(self) -> dict[str, Any]:
        """Memory and random steps **of this rank**.

        Every rank has its own: save this on every rank, not on rank 0 alone, and load on each
        rank what that rank saved. For torch, :mod:`hvd_qsgd.torch.state` does it.
        """
        memory = self.memory.state_dict(self._saved, self._unapplied())
        return {"version": STATE_VERSION, "config": self._saved_config(), **memory}

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
        self.memory.load_state_dict(state, self._loaded)

    def _unapplied(self) -> Collection[str]:
        """Keys of the tensors whose last mean has not been applied to their parameters."""
        return ()

    def _claim(self, tensors: list[tuple[str, Any]], group: str = "") -> list[str]:
        """See :meth:`TensorMemory.claim`.

        Who passes the class again and again starts a training each time; who passes an instance goes on.
        """
        return self.memory.claim(tensors, group, inherit=type(self).__dict__.get("_default") is not self)

    def _saved_config(self) -> dict[str, Any]:
        feedback = {"feedback": None} if self.error_feedback is False else self.feedback.config()
        return {**self.policy.config(), "error_feedback": feedback}

    @staticmethod
    def _saved(array: Any) -> Any:
        """A copy of an array, as users of the framework keep arrays."""
        return array.copy()

    @staticmethod
    def _loaded(value: Any) -> Any:
        """The inverse of :meth:`_saved`."""
        return value.copy()

    # -- for the frameworks' compressors -------------------------------------------------------

    def _settings(self, tensors: Iterable[Any]) -> dict[str, Any]:
        """What must be equal on all ranks for their collectives to match."""
        digest = hashlib.blake2b(repr(list(tensors)).encode(), digest_size=8).hexdigest()
        return {
            "compressor": repr(self),
            "fusion_elements": self.fusion_elements,
            "min_elements": self.min_elements,
            "min_dims": self.min_dims,
            "tensors": digest,
        }

    def _feeds(self, tensor: Tensor) -> bool:
        """Whether the tensor has feedback: from the start, if it may ever get a biased codec."""
        if self.error_feedback is not None:
            return self.error_feedback
        choices = self.policy.choices(tensor)
        if not any(codec.biased for codec in choices):
            return False
        for codec in choices:
            check_feedback(codec, self.feedback, self.exchange)
        return True

    def _reason_to_bypass(self, tensor: Tensor, dtype: str, floating: bool, ranks: int) -> str:
        """Why a tensor is left to Horovod, from what all ranks agree on; empty to compress it."""
        if not floating:
            return f"dtype {dtype} is not a floating-point type"
        if len(tensor.shape) < self.min_dims:
            return f"{len(tensor.shape)} dimensions are fewer than min_dims={self.min_dims}"
        if tensor.elements < max(self.min_elements, 1):
            return f"{tensor.elements} elements are fewer than min_elements={self.min_elements}"
        if ranks == 1:
            return "there is one rank only"
        if self.policy.codec(tensor) is None:
            return "the policy gives it no codec"
        return ""

    def _use_threads(self, local_ranks: int, most: int) -> None:
        """Let kernels use the threads that the user wants, or the cores of a rank of this machine, up to ``most``."""
        use_threads(self.threads or min(owned_cores(local_ranks), most))

    def _place(self) -> tuple[int, int]:
        """Rank of this process and number of ranks, for the monitor."""
        raise NotImplementedError

    def _record(self, key: str, elements: int, element_size: int, ranks: int) -> TensorStats:
        """Count a tensor in; the caller adds what was sent."""
        record = self._stats.tensors.get(key)
        if record is None:
            record = self._stats.tensors[key] = TensorStats(elements=elements)
        raw = elements * element_size
        record.exchanges += 1
        record.raw_bytes += raw
        record.uncompressed_wire_bytes += ring_bytes(raw, ranks)
        return record

    def _record_bypassed(self, key: str, elements: int, element_size: int, ranks: int, reason: str) -> None:
        record = self._record(key, elements, element_size, ranks)
        record.exchange, record.codec, record.bypassed = "", "", reason
        raw = elements * element_size
        record.payload_bytes += raw
        record.wire_bytes += ring_bytes(raw, ranks)

    def _settle(
        self, key: str, tensor: Tensor, corrected: Any, mean: Any, kernels: Kernels, finite: bool | None = None
    ) -> None:
        """After an exchange: make what it left of ``corrected`` the memory, and show the mean to the policy.

        A step whose gradient is not finite will be skipped: what was fed back must not be lost with it.
        ``finite`` says whether the mean is, if that is known.
        """
        if corrected is None and not self.policy.observes:
            return
        if finite is None:
            finite = kernels.all_finite(mean)
        if corrected is not None:
            settle = self.feedback.keep if finite else self.feedback.discard
            settle(key, corrected, mean)
        if self.policy.observes and finite:
            self.policy.observe(tensor, mean)
