"""Checkpoints and elastic jobs: state of all ranks, saved, loaded and carried over to another number of ranks.

Every rank has residuals of its own. A checkpoint of rank 0 alone would lose those of all
others without a word, so save them all: one file a rank (:func:`save`), or gathered in one
object (:func:`gather`).

When the number of ranks has changed, every rank starts from the mean of the saved residuals
(``resize="mean"``): the mean over ranks, which is what the model still has to see, is
preserved. Or all start without (``resize="reset"``).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.elastic.state import StateHandler, get_handler_registry

from hvd_qsgd.checks import WrongFieldError, shown
from hvd_qsgd.codecs.base import check_choice
from hvd_qsgd.collectives.base import Names
from hvd_qsgd.compressors.saved import check_saved
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.torch.compressor import Compressor
from hvd_qsgd.torch.flights import ENGINE

RESIZE = ("error", "mean", "reset")
State = dict[str, Any]


def save(compressor: Compressor, directory: str | Path) -> Path:
    """Write this rank's state to ``directory/rank-R-of-N.safetensors``; call it on all ranks.

    Returns:
        The path of the file, which is complete when it is there.

    Raises:
        ConfigError: the package safetensors is not installed.
    """
    path = _path(directory, hvd.rank(), hvd.size())
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, plain = _split(compressor.state_dict(), "")
    partial = path.with_suffix(".partial")
    _safetensors().save_file(tensors, partial, metadata={"hvd_qsgd": json.dumps(plain)})
    partial.replace(path)
    return path


def load(compressor: Compressor, directory: str | Path, resize: str = "error") -> None:
    """Continue from what :func:`save` wrote; call it on all ranks.

    Args:
        directory: holds the files of all ranks of one run.
        resize: what to do if the number of ranks has changed: "error", "mean" or "reset" (see above).

    Raises:
        ConfigError: files are missing, of several jobs, from other settings, or of another number of ranks.
        ExchangeError: the states of EF21 do not fit together.
    """
    directory = Path(directory)
    present = sorted(directory.glob("rank-*-of-*.safetensors"))
    saved = sorted({int(path.stem.rsplit("-", 1)[1]) for path in present})
    if not saved:
        raise ConfigError(f"There are no files rank-*-of-*.safetensors in {directory}.")
    if len(saved) > 1:
        raise ConfigError(
            f"{directory} holds the states of jobs of {' and '.join(map(str, saved))} ranks, and nothing tells which "
            f"is meant. Remove the others' files, and give each checkpoint a directory of its own."
        )
    (ranks,) = saved
    paths = [_path(directory, rank, ranks) for rank in range(ranks)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ConfigError(f"{directory} lacks {missing[0]} and so the residuals of that rank; save on every rank.")
    states = [read_state(paths[hvd.rank()])] if ranks == hvd.size() else [read_state(path) for path in paths]
    _continue(compressor, states, ranks, resize)


def gather(compressor: Compressor) -> State:
    """The states of all ranks in one object that ``torch.save`` can write; call it on all ranks."""
    return {"ranks": hvd.size(), "states": hvd.allgather_object(compressor.state_dict(), name="hvd_qsgd.gather")}


def scatter(compressor: Compressor, gathered: State, resize: str = "error") -> None:
    """Continue from what :func:`gather` returned; call it on all ranks.

    Raises:
        ConfigError, ExchangeError: see :func:`load`.
    """
    ranks = gathered["ranks"]
    states = gathered["states"]
    _continue(compressor, [states[hvd.rank()]] if ranks == hvd.size() else states, ranks, resize)


def mean_state(compressor: Compressor, states: Sequence[State]) -> State:
    """One state for every rank of a job of another size: the mean of all arrays; numbers are those of the first."""
    merged = copy.deepcopy(states[0])
    means = {}
    for path in merged["arrays"]:
        total = sum(state["arrays"][path].double() for state in states)
        means[path] = (total / len(states)).to(torch.float32)
    merged["arrays"] = compressor.feedback.resized(means)
    return merged


def _continue(compressor: Compressor, states: Sequence[State], ranks: int, resize: str) -> None:
    check_choice("load", "resize", resize, RESIZE)
    if ranks == hvd.size():
        compressor.load_state_dict(states[0])
    elif resize == "mean":
        compressor.load_state_dict(mean_state(compressor, states))
        _say(f"The state of {ranks} ranks goes on with {hvd.size()}: each starts from the mean of the residuals.")
    elif resize == "reset":
        compressor.load_state_dict({**states[0], "arrays": {}, "numbers": {}})
        _say(f"The state of {ranks} ranks goes on with {hvd.size()}: the residuals are dropped.")
    else:
        raise ConfigError(
            f"The state was saved by {ranks} ranks and there are {hvd.size()} now. Load with resize='mean', which "
            f"preserves the mean of the residuals, or resize='reset', which drops them."
        )
    compressor.check_state()


def _say(text: str) -> None:
    """Once for all ranks, at a level that Python shows by itself."""
    if hvd.rank() == 0:
        logging.getLogger("hvd_qsgd").warning(text)


def _path(directory: str | Path, rank: int, ranks: int) -> Path:
    return Path(directory) / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def _safetensors() -> Any:
    try:
        from safetensors import torch as module
    except ModuleNotFoundError:
        raise ConfigError("State files need the package safetensors: pip install safetensors") from None
    return module


def _split(value: Any, path: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors by path, and the rest with the paths in their places."""
    if isinstance(value, torch.Tensor):
        return {path: value.contiguous()}, {"tensor": path}
    if not isinstance(value, dict):
        return {}, {"value": value}
    tensors: dict[str, torch.Tensor] = {}
    plain = {}
    for key, part in value.items():
        found, plain[key] = _split(part, f"{path}/{key}")
        tensors.update(found)
    return tensors, {"mapping": plain}


def _join(plain: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    """The inverse of :func:`_split`.

    Raises:
        WrongFieldError: it is no outcome of ``_split``.
    """
    ((kind, content),) = plain.items() if isinstance(plain, dict) and len(plain) == 1 else [("", None)]
    if kind == "value":
        return content
    if kind == "mapping" and isinstance(content, dict):
        return {key: _join(part, tensors, f"{place}.{key}" if place else key) for key, part in content.items()}
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "tensor":
        raise WrongFieldError(f"{place} is the tensor {shown(content)}, which the file lacks")
    raise WrongFieldError(f"{place or 'all of it'} is neither a value nor a tensor nor a mapping")


def read_state(path: Path) -> State:
    """What one rank saved to one file.

    Raises:
        ConfigError: the file is damaged or something else, or the package safetensors is not installed.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged, or no file of safetensors: {error}") from None
    if "hvd_qsgd" not in metadata:
        raise ConfigError(f"{path} was not written by hvd_qsgd.torch.state.save.")
    try:
        state: State = _join(json.loads(metadata["hvd_qsgd"]), tensors, "")
        check_saved(state)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, WrongFieldError) else f"its metadata cannot be read as JSON ({error})"
        raise ConfigError(f"{path} holds a damaged state: {reason}. Go back to an earlier one.") from None
    return state


class CompressorStateHandler(StateHandler):
    """For ``hvd.elastic.TorchState(model=..., optimizer=..., compressor=compressor)``.

    Commits and restores the state of each rank. When ranks have come or gone, all ranks go on from
    the mean of the states of those that are left: of a rank that was lost its residual is lost, and
    the mean of the others stands for it. Importing ``hvd_qsgd.torch`` registers it.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__(compressor)
        self.save()

    def save(self) -> None:
        """Keep the state as it is, in memory; Horovod calls this at each commit."""
        self._saved = self.value.state_dict()
        self._ranks = hvd.size()

    def restore(self) -> None:
        """Go back to what was kept; Horovod calls this when the job was interrupted."""
        # Nobody will answer what was under way.
        ENGINE.abandon()
        self.value.load_state_dict(self._saved)

    def sync(self) -> None:
        """Let all ranks go on from one state; Horovod calls this when ranks have come or gone."""
        ENGINE.abandon()
        # Whoever is new has no steps yet, and no state to contribute.
        state = self.value.state_dict()
        mine = (Names.generation, self._ranks, state if state["steps"] else None)
        entries = hvd.allgather_object(mine, name="hvd_qsgd.sync")
        Names.generation = 1 + max(generation for generation, _, _ in entries)
        states = [state for _, _, state in entries if state is not None]
        resized = len(states) != len(entries) or any(ranks != len(entries) for _, ranks, _ in entries)
        # Some ranks may have committed a step in which others were interrupted.
        apart = any(state["steps"] != states[0]["steps"] for state in states)
        if states and (resized or apart):
            self.value.load_state_dict(mean_state(self.value, states))
            _say(f"{len(entries)} ranks go on from the mean of the residuals of the {len(states)} that have some.")
        self.value.replan()
        self.save()


get_handler_registry().append((Compressor, CompressorStateHandler))
