"""What the compressors of all frameworks share: settings, defaults, statistics, state.

A framework's compressor adds Horovod's ``compress`` and ``decompress``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

from typing_extensions import Concatenate, ParamSpec, Self

from hvd_qsgd.codecs import QSGD, Cast, Codec, Identity, TopK
from hvd_qsgd.codecs.base import Kernels, check_integer
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import BY_RANKS, check_exchange
from hvd_qsgd.feedback import ErrorFeedback, check_feedback
from hvd_qsgd.stats import Stats, TensorStats

P = ParamSpec("P")
R = TypeVar("R")


class class_or_instance(Generic[P, R]):  # noqa: N801  (a decorator)
    """A method that, called on the class, runs on the class's default instance.

    Horovod's own compressors are classes with static methods; ours can be passed the same
    way, ``compression=QSGDCompressor``, or as an instance with settings.
    """

    def __init__(self, function: Callable[Concatenate[Any, P], R]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: CompressorBase | None, owner: type[CompressorBase]) -> Callable[P, R]:
        return self._function.__get__(instance if instance is not None else owner.default())


class CompressorBase:
    """Settings and state around a codec.

    Args:
        codec: what is sent.
        exchange: how it travels: "allgather", "scatter_gather" or "allreduce"; "by_ranks": the first
            for up to three ranks, else the second; "auto": the fastest for this network and machine, by
            a short measurement, or no compression if that would not be faster; see ``stats().decisions``.
        error_feedback: add what was lost to the next gradient; by default on for biased codecs.
        min_elements: tensors with fewer elements go through Horovod's own allreduce.
        min_dims: so do tensors with fewer dimensions (biases, norms).
        seed: of the random rounding; the same seed gives the same run.
        fusion_elements: about how many elements travel in one exchange.

    Raises:
        ConfigError: a value is out of range, or error feedback would diverge around this codec.
    """

    #: Ranks of one job must run the same.
    framework: ClassVar[str]
    _default: ClassVar[CompressorBase | None] = None

    def __init__(
        self,
        codec: Codec,
        *,
        exchange: str = BY_RANKS,
        error_feedback: bool | None = None,
        min_elements: int = 1024,
        min_dims: int = 2,
        seed: int = 0,
        fusion_elements: int = 1 << 20,
    ) -> None:
        name = type(self).__name__
        check_exchange(exchange, codec)
        check_integer(name, "min_elements", min_elements, 0, 2**62)
        check_integer(name, "min_dims", min_dims, 0, 64)
        check_integer(name, "seed", seed, 0, 2**64 - 1)
        check_integer(name, "fusion_elements", fusion_elements, 1, 2**40)
        self.codec = codec
        self.exchange = exchange
        self.error_feedback = codec.biased if error_feedback is None else error_feedback
        if self.error_feedback:
            check_feedback(codec)
        self.min_elements = min_elements
        self.min_dims = min_dims
        self.seed = seed
        self.fusion_elements = fusion_elements
        self._feedback = ErrorFeedback()
        self._stats = Stats()
        self._steps: dict[str, int] = {}

    @classmethod
    def default(cls) -> Self:
        """The instance that stands behind the class when it is used without settings."""
        if "_default" not in cls.__dict__ or cls._default is None:
            cls._default = cls()  # type: ignore[call-arg]
        return cls._default  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.codec}, exchange={self.exchange!r}, error_feedback={self.error_feedback})"

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
        self._feedback.replace({})
        self._steps.clear()

    @class_or_instance
    def state_dict(self) -> dict[str, Any]:
        """Residuals and random steps **of this rank**.

        Every rank has its own residuals: save this on every rank, not on rank 0 alone, and
        load on each rank what that rank saved.
        """
        residuals = {name: self._saved(value) for name, value in self._feedback.residuals.items()}
        return {"version": 1, "config": self.codec.config(), "residuals": residuals, "steps": dict(self._steps)}

    @class_or_instance
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of the same rank.

        Raises:
            ConfigError: it was saved with another codec or version.
        """
        if state.get("version") != 1 or state.get("config") != self.codec.config():
            raise ConfigError(
                f"The state was saved by version {state.get('version')} with {state.get('config')}, and this "
                f"compressor is version 1 with {self.codec.config()}. Use the settings of the saved run."
            )
        self._feedback.replace({name: self._loaded(value) for name, value in state["residuals"].items()})
        self._steps = dict(state["steps"])

    @staticmethod
    def _saved(residual: Any) -> Any:
        """A copy of a residual, as users of the framework keep arrays."""
        return residual.copy()

    @staticmethod
    def _loaded(value: Any) -> Any:
        """The inverse of :meth:`_saved`."""
        return value.copy()

    # -- for the frameworks' compressors -------------------------------------------------------

    def _settings(self, tensors: Iterable[Any]) -> dict[str, Any]:
        """What must be equal on all ranks for their collectives to match."""
        digest = hashlib.blake2b(repr(list(tensors)).encode(), digest_size=8).hexdigest()
        return {
            "framework": self.framework,
            "compressor": repr(self),
            "fusion_elements": self.fusion_elements,
            "min_elements": self.min_elements,
            "min_dims": self.min_dims,
            "tensors": digest,
        }

    def _reason_to_bypass(self, dtype: str, floating: bool, dims: int, elements: int, ranks: int) -> str:
        """Why a tensor is left to Horovod, from what all ranks agree on; empty to compress it."""
        if not floating:
            return f"dtype {dtype} is not a floating-point type"
        if dims < self.min_dims:
            return f"{dims} dimensions are fewer than min_dims={self.min_dims}"
        if elements < max(self.min_elements, 1):
            return f"{elements} elements are fewer than min_elements={self.min_elements}"
        if ranks == 1:
            return "there is one rank only"
        return ""

    def _next_step(self, key: str) -> int:
        step = self._steps[key] = self._steps.get(key, -1) + 1
        return step

    def _record(self, key: str, elements: int, element_size: int, ranks: int) -> TensorStats:
        """Count a tensor in; the caller adds what was sent."""
        record = self._stats.tensors.setdefault(key, TensorStats(elements=elements))
        raw = elements * element_size
        record.exchanges += 1
        record.raw_bytes += raw
        record.uncompressed_wire_bytes += 2 * (ranks - 1) / ranks * raw
        return record

    def _record_bypassed(self, key: str, elements: int, element_size: int, ranks: int, reason: str) -> None:
        record = self._record(key, elements, element_size, ranks)
        record.bypassed = reason
        record.payload_bytes += elements * element_size
        record.wire_bytes = record.uncompressed_wire_bytes

    def _settle(self, key: str, corrected: Any, mean: Any, kernels: Kernels) -> None:
        """Make what the exchange left of ``corrected`` the residual.

        A step whose gradient is not finite will be skipped: what was fed back must not be lost with it.
        """
        settle = self._feedback.keep if kernels.all_finite(mean) else self._feedback.discard
        settle(key, corrected)


class QSGDBase(CompressorBase):
    """Quantization with unbiased rounding, 8 times fewer bytes at the default 4 bits.

    Args:
        bits, bucket_size, norm, rounding: see :class:`hvd_qsgd.QSGD`.
        settings: see :class:`Compressor`.
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int = 512,
        norm: str = "max",
        rounding: str = "stochastic",
        **settings: Any,
    ) -> None:
        super().__init__(QSGD(bits, bucket_size, norm, rounding), **settings)


class TopKBase(CompressorBase):
    """The largest values only, with error feedback.

    Args:
        ratio, k, values: see :class:`hvd_qsgd.TopK`.
        settings: see :class:`Compressor`.
    """

    def __init__(
        self, ratio: float | None = 0.01, k: int | None = None, values: str = "float32", **settings: Any
    ) -> None:
        super().__init__(TopK(ratio, k, values), **settings)


class IdentityBase(CompressorBase):
    """Sends float32 through the same path as the others, for comparison."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Identity(), **settings)


class CastBase(CompressorBase):
    """Sends float16 or bfloat16 and adds up in float32.

    Args:
        dtype: see :class:`hvd_qsgd.Cast`.
        settings: see :class:`Compressor`.
    """

    def __init__(self, dtype: str = "float16", **settings: Any) -> None:
        super().__init__(Cast(dtype), **settings)
