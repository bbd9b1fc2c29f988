"""What every codec offers.

A codec is a frozen, validated record that turns a float32 vector into bytes and back. It
knows no framework and no Horovod. Its own methods are the NumPy specification; faster
implementations in :mod:`hvd_qsgd.kernels` offer the same three ``*_into`` methods and are
tested to produce the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from hvd_qsgd.codecs.readback import Looks, at_once, together
from hvd_qsgd.errors import ConfigError, PayloadError

#: What decoding does with its output: overwrite it, add to it, or subtract from it.
MODES = ("set", "add", "subtract")


class Kernels(ABC):
    """The hot functions of a codec, over the arrays of one backend.

    ``x`` and ``out`` of a decode are flat, contiguous float32; payloads are flat uint8.
    """

    #: Whose payloads these functions make and read.
    codec: Codec
    #: Whether ``x`` may be float16 or bfloat16, which counts as the float32 values that it stands for, and ``out`` too,
    #: to which the float32 result is rounded once.
    halves: ClassVar[bool] = False

    @abstractmethod
    def encode_into(self, x: Any, out: Any, key: int = 0, first: int = 0) -> int:
        """Encode ``x`` into the start of ``out``.

        Args:
            x: float32 of shape (elements,); stays as it is.
            out: uint8 of shape (bytes,), ``payload_size(elements)`` of them at least.
            key: 64-bit key of the random words (see ``hvd_qsgd.codecs.random_words``).
            first: position of ``x[0]`` in its tensor, a multiple of the codec's granularity. It picks the random
                words, so that a tensor encoded in parts gives the codes of the tensor encoded whole.

        Returns:
            The number of bytes written.

        Raises:
            PayloadError: the payload does not fit into ``out``.
        """

    @abstractmethod
    def decode_into(self, payload: Any, out: Any, mode: str = "set") -> None:
        """Decode a payload of as many elements as ``out`` has.

        Args:
            payload: uint8 of shape (bytes,), without anything behind it.
            out: float32 of shape (elements,).
            mode: "set", "add" or "subtract": what happens to ``out``.

        Raises:
            PayloadError: the payload does not fit the configuration and the length, or is damaged; ``out`` is as it
                was.
        """

    def average_into(self, message: Any, spans: Sequence[tuple[int, int]], out: Any) -> None:
        """Set ``out`` to the mean of the payloads that stand at ``message[start:stop]``.

        The sum runs in the order of ``spans`` and is divided by their number at the end.

        Raises:
            PayloadError: one of them is damaged; ``out`` is as it was.
        """
        at_once(self.prepare_average(message, spans, len(out)))(out)

    # -- the same for exchanges, in two parts: all that the host must see of a device, and then the work ----------

    def prepare_encode(
        self, x: Any, key: int = 0, first: int = 0, keep_error: bool = False
    ) -> Looks[Callable[[Any], int]]:
        """Look at what decides the size of the payload; the rest needs no look.

        Returns:
            What writes the payload into the start of an array and returns its size, as :meth:`encode_into` does, and
            with ``keep_error`` leaves in ``x`` what the payload does not say.
        """
        yield from ()

        def write(out: Any) -> int:
            size = self.encode_into(x, out, key, first)
            if keep_error:
                self.decode_into(out[:size], x, "subtract")
            return size

        return write

    def prepare_decode(self, payload: Any, length: int) -> Looks[Callable[[Any, str], None]]:
        """Look at what tells whether ``payload`` is one of ``length`` elements.

        By default that is its size alone; payloads that can be damaged otherwise are taken apart here.

        Returns:
            What sets, adds or subtracts the decoded values, as :meth:`decode_into` does; it finds no fault any more.
        """
        yield from ()
        self.codec.check_payload(payload, length)
        return functools.partial(self.decode_into, payload)

    def prepare_average(
        self, message: Any, spans: Sequence[tuple[int, int]], length: int
    ) -> Looks[Callable[[Any], None]]:
        """The same for :meth:`average_into`: nothing is written before all payloads are known to be good."""
        decoded = yield from together([self.prepare_decode(message[start:stop], length) for start, stop in spans])

        def average(out: Any) -> None:
            for index, apply in enumerate(decoded):
                apply(out, "add" if index else "set")
            out /= len(decoded)

        return average

    def with_memory(self, memory: dict[str, Any]) -> Kernels:
        """The kernels for one tensor of one rank, for codecs that learn from step to step.

        ``memory`` belongs to the tensor, starts empty, is written to here, and is saved in checkpoints.
        """
        return self

    def all_finite(self, x: Any) -> bool:
        """Whether ``x`` holds neither NaN nor an infinity."""
        # NumPy arrays and torch tensors both compare; NaN is not below infinity either.
        return bool((abs(x) < float("inf")).all())


@dataclasses.dataclass(frozen=True)
class Codec(Kernels):
    """Base of all codecs. Subclasses are frozen dataclasses whose fields are the configuration.

    A codec says what it can do, and knows no exchange: by the attributes below, and by the methods of
    :class:`LaneCodec` or :class:`SumCodec` if its messages can be added up.
    """

    #: Name in the registry and in configurations.
    name: ClassVar[str]
    #: Version of the byte format; new bytes mean a new version.
    version: ClassVar[int] = 1
    #: Whether it encodes a tensor by itself. If not, the codec is the configuration of an exchange made for it.
    encodes: ClassVar[bool] = True
    #: Whether the mean of decoded payloads may be encoded once more, in shards if ``granularity`` allows cuts.
    encodes_means: ClassVar[bool] = True
    #: Whether the size of a payload depends on the values.
    variable_size: ClassVar[bool] = False
    #: Whether the tensors of a fusion buffer are encoded as one.
    whole_buffer: ClassVar[bool] = False
    #: Whether all ranks must draw the same random words.
    shared_randomness: ClassVar[bool] = False

    @property
    def codec(self) -> Codec:  # type: ignore[override]
        """The codec itself: it is its own NumPy kernels."""
        return self

    @property
    def granularity(self) -> int:
        """Elements that share state and cannot be parted: a tensor may be cut at multiples of it.

        0 means that a tensor cannot be cut at all.
        """
        return 1

    @property
    def biased(self) -> bool:
        """Whether the expectation of the decoded value differs from the input."""
        return False

    @property
    def omega(self) -> float:
        """Bound of E||C(x) - x||^2 / ||x||^2 of an unbiased codec whose error can exceed its input; else 0.

        Feedback around a codec diverges from 1 on (see :func:`hvd_qsgd.feedback.check_feedback`).
        """
        return 0.0

    @property
    def one_level(self) -> bool:
        """Whether stochastic rounding knows nothing but zero and the largest value of a bucket.

        Where a mean is rounded a second time, feedback of both errors diverges (see
        :func:`hvd_qsgd.feedback.check_feedback`).
        """
        return False

    @abstractmethod
    def payload_size(self, length: int) -> int:
        """Bytes of the payload of ``length`` elements: exact, or an upper bound if ``variable_size``."""

    @abstractmethod
    def encode_into(self, x: np.ndarray, out: np.ndarray, key: int = 0, first: int = 0) -> int:
        """See :meth:`Kernels.encode_into`."""

    @abstractmethod
    def decode_into(self, payload: np.ndarray, out: np.ndarray, mode: str = "set") -> None:
        """See :meth:`Kernels.decode_into`."""

    def config(self) -> dict[str, Any]:
        """The configuration as a dictionary that survives JSON; see :func:`codec_from_config`."""
        return {"codec": self.name, **dataclasses.asdict(self)}

    def encode(self, x: Any, key: int = 0) -> np.ndarray:
        """Encode any real array: the convenient form of :meth:`encode_into`.

        Args:
            x: array of any shape and any floating dtype; converted to float32 in C order.
                Values that float32 cannot hold count as infinite.
            key: 64-bit key of the random words (see :mod:`hvd_qsgd.codecs.random_words`).

        Returns:
            The payload, uint8 of shape (bytes,).

        Raises:
            ConfigError: ``x`` is not a real floating-point or integer array.
        """
        with np.errstate(over="ignore"):
            array = np.asarray(x)
            if array.dtype.kind in "bcOSUMm" or array.dtype.names:
                raise ConfigError(
                    f"Cannot encode an array of dtype {array.dtype}: only real numbers can be compressed."
                )
            flat = np.ascontiguousarray(array, np.float32).reshape(-1)
        out = np.empty(self.payload_size(flat.size), np.uint8)
        return out[: self.encode_into(flat, out, key)]

    def decode(self, payload: np.ndarray, shape: Any) -> np.ndarray:
        """Decode a payload into a new float32 array of the given shape.

        Raises:
            PayloadError: the payload does not fit the shape or is damaged.
        """
        out = np.empty(shape, np.float32)
        self.decode_into(np.asarray(payload, np.uint8), out.reshape(-1))
        return out

    def check_room(self, out: Any, size: int) -> None:
        """Raise PayloadError unless a payload of ``size`` bytes fits into ``out``."""
        if len(out) < size:
            raise PayloadError(
                f"A {self.name} payload of {size} bytes does not fit into a buffer of {len(out)}. "
                f"Give one of payload_size(length) bytes."
            )

    def check_payload(self, payload: Any, length: int) -> None:
        """Raise PayloadError unless a fixed-size payload has the size that ``length`` elements take."""
        expected = self.payload_size(length)
        if len(payload) != expected:
            raise PayloadError(
                f"A {self.name} payload of {length} elements has {expected} bytes, but {len(payload)} came. "
                f"Decode with the configuration and the shape it was encoded with: {self.config()}"
            )


class LaneKernels(Protocol):
    """What kernels offer if codes on common scales add up in the lanes of int32 words."""

    def agree_into(self, x: Any, out: Any) -> None:
        """int32 words whose maximum over ranks makes the common scales; none is negative."""
        ...

    def to_lanes(self, x: Any, agreed: Any, ranks: int, out: Any, key: int = 0, first: int = 0) -> None:
        """Round ``x`` on the common scales into int32 words that can be added up."""
        ...

    def from_lanes(self, sums: Any, agreed: Any, ranks: int, out: Any, count: int) -> None:
        """The sum of ``ranks`` ranks' words, divided by ``count``, as float32."""
        ...


class LaneCodec(LaneKernels, Protocol):
    """What the codec of :class:`LaneKernels` offers besides."""

    def agreement_length(self, length: int) -> int:
        """int32 words whose maximum over ranks makes the common scales of ``length`` elements."""
        ...

    def lanes_length(self, length: int, ranks: int) -> int:
        """int32 words that ``length`` elements take where the words of ``ranks`` ranks are added up."""
        ...


class SumKernels(Protocol):
    """What kernels offer if values of all ranks add up as they are, as those at common positions do."""

    def to_sum(self, x: Any, out: Any, key: int, first: int = 0) -> None:
        """Write the words that are added up over ranks; ``key`` is the same on all of them."""
        ...

    def from_sum(self, sums: Any, out: Any, count: int, key: int, first: int = 0) -> None:
        """The sum of the words of ``count`` ranks, divided by ``count``, as float32."""
        ...


class SumCodec(SumKernels, Protocol):
    """What the codec of :class:`SumKernels` offers besides."""

    #: Of the words.
    sum_dtype: ClassVar[str]

    def sum_length(self, length: int) -> int:
        """Words that ``length`` elements take."""
        ...


def adds_in_lanes(codec: Codec) -> bool:
    """Whether a codec is a :class:`LaneCodec`."""
    # Not isinstance: codecs around another one hand its methods on.
    return hasattr(codec, "lanes_length")


def adds_values(codec: Codec) -> bool:
    """Whether a codec is a :class:`SumCodec`."""
    return hasattr(codec, "sum_length")


def combine(out: np.ndarray, values: np.ndarray, mode: str) -> None:
    """Set, add or subtract ``values``: what the ``mode`` of a decode means."""
    if mode == "set":
        out[...] = values
    elif mode == "add":
        out += values
    elif mode == "subtract":
        out -= values
    else:
        raise unknown_mode(mode)


def mode_number(mode: str) -> int:
    """Where a mode stands in :data:`MODES`, for compiled kernels."""
    if mode not in MODES:
        raise unknown_mode(mode)
    return MODES.index(mode)


def unknown_mode(mode: str) -> ConfigError:
    return ConfigError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}.")


def check_choice(codec: str, field: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ConfigError unless the value of a codec's field is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{codec}: {field}={value!r} is not one of {', '.join(map(repr, choices))}.")


def check_integer(codec: str, field: str, value: Any, low: int, high: int) -> int:
    """The value as a plain int, which survives JSON; ConfigError unless it is one from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ConfigError(f"{codec}: {field}={value!r} must be a whole number from {low} to {high}.")
    return int(value)
