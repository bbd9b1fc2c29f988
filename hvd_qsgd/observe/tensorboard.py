"""Records as scalars in TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.observe.monitor import Record


class TensorBoard:
    """Scalars under "hvd_qsgd/", those of a tensor under "hvd_qsgd_tensors/NAME/".

    Args:
        where: a directory, or the ``SummaryWriter`` that the training has already, of
            ``torch.utils.tensorboard``, ``tensorboardX`` or ``tf.summary``; that one is not closed here.
        tensors: also write ratio, relative error and residual norm of each tensor.

    Raises:
        ConfigError: a directory is given and the package tensorboard is not installed.
    """

    def __init__(self, where: str | Path | Any, tensors: bool = True) -> None:
        self._own = isinstance(where, (str, Path))
        writer: Any = _writer(where) if isinstance(where, (str, Path)) else where
        self._writer: Any = writer if hasattr(writer, "add_scalar") else TensorFlowWriter(writer)
        self._tensors = tensors

    def write(self, record: Record) -> None:
        for name, value in scalars_of(record, self._tensors).items():
            self._writer.add_scalar(name, value, record.step, record.time)
        self._writer.flush()

    def close(self) -> None:
        if self._own:
            self._writer.close()


def scalars_of(record: Record, tensors: bool) -> dict[str, float]:
    """By tag; bytes and seconds are those of a mean step."""
    stats, steps = record.stats, record.steps
    scalars: dict[str, float | None] = {
        "hvd_qsgd/ratio": stats.ratio,
        "hvd_qsgd/wire_bytes": stats.wire_bytes / steps,
        "hvd_qsgd/payload_bytes": stats.payload_bytes / steps,
        "hvd_qsgd/step_seconds": record.seconds / steps,
        "hvd_qsgd/relative_error": stats.relative_error,
        "hvd_qsgd/residual_norm": stats.residual_norm,
    }
    for phase in ("encode", "wait", "decode"):
        scalars[f"hvd_qsgd/{phase}_seconds"] = stats.total(f"{phase}_seconds") / steps
    for name, tensor in stats.tensors.items() if tensors else ():
        if not tensor.bypassed:
            scalars[f"hvd_qsgd_tensors/{name}/ratio"] = tensor.raw_bytes / tensor.payload_bytes
            scalars[f"hvd_qsgd_tensors/{name}/relative_error"] = tensor.relative_error
            scalars[f"hvd_qsgd_tensors/{name}/residual_norm"] = tensor.residual_norm
    return {name: value for name, value in scalars.items() if value is not None}


class TensorFlowWriter:
    """A ``tf.summary.SummaryWriter`` with the methods of those of torch."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.flush, self.close = writer.flush, writer.close

    def add_scalar(self, tag: str, value: float, step: int, time: float) -> None:
        import tensorflow as tf

        summary = tf.compat.v1.Summary(value=[tf.compat.v1.Summary.Value(tag=tag, simple_value=value)])
        with tf.init_scope(), self._writer.as_default():
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step)


def _writer(directory: str | Path) -> Any:
    """A writer of the framework that the program uses."""
    try:
        import tensorboard  # type: ignore[import-untyped]  # noqa: F401

        if "tensorflow" in sys.modules and "torch" not in sys.modules:
            return sys.modules["tensorflow"].summary.create_file_writer(str(directory))
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"TensorBoard({str(directory)!r}) needs torch or TensorFlow, and the package tensorboard ({error.name} is "
            f"missing): pip install tensorboard. Or give it a SummaryWriter of tensorboardX."
        ) from None
    return SummaryWriter(str(directory))
