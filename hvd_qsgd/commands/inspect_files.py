"""What is in a file: state of a compressor, checkpoint, records of a monitor, or a payload."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hvd_qsgd.checks import WrongFieldError
from hvd_qsgd.codecs import codec_from_config
from hvd_qsgd.compressors.saved import check_saved
from hvd_qsgd.errors import ConfigError

#: Keys by which the state of a compressor is recognized inside a checkpoint.
STATE_KEYS = {"version", "config", "arrays", "steps"}


@dataclass
class Inspection:
    """What was found: a kind of file, facts about the whole, and a row for each part, all with the same keys."""

    kind: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect_file(path: Path, config: str | None = None, elements: int | None = None) -> Inspection:
    """Look into a file; ``config`` and ``elements`` are needed for a payload, which does not carry them.

    Raises:
        ConfigError: it is nothing that this package writes, or a package that reads it is not installed.
        PayloadError: a payload is damaged, or of another configuration or length.
    """
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    if config is not None or elements is not None:
        return _payload(path, config, elements)
    if path.suffix == ".safetensors":
        return _state_file(path)
    if path.suffix == ".jsonl":
        return _records(path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return _checkpoint(path)
    raise ConfigError(
        f"{path} ends with {path.suffix!r}; known are .safetensors (of hvd_qsgd.torch.state.save), .pt, .pth and .ckpt "
        f"(of torch.save) and .jsonl (of JsonLines). For a payload give --config and --elements."
    )


def _payload(path: Path, config: str | None, elements: int | None) -> Inspection:
    if config is None or elements is None:
        raise ConfigError(
            "A payload carries neither its codec nor its length: give both, such as "
            """--config '{"codec": "qsgd", "bits": 4}' --elements 5183."""
        )
    text = Path(config).read_text(errors="replace") if not config.lstrip().startswith("{") else config
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config is no JSON ({error}): {text[:80]!r}") from None
    # Golden files keep it under this name.
    fields = fields.get("config", fields) if isinstance(fields, dict) else None
    if not isinstance(fields, dict):
        raise ConfigError(f'--config must be an object such as {{"codec": "qsgd"}}, and it is {text[:80]!r}.')
    codec = codec_from_config(fields)
    if elements < 0:
        raise ConfigError(f"--elements {elements} must not be negative.")
    payload = np.fromfile(path, np.uint8)
    try:
        # NumPy has errors of its own for sizes that no memory has.
        values = codec.decode(payload, min(elements, 2**50))
    except MemoryError:
        raise ConfigError(f"--elements {elements} are more values than memory can hold.") from None
    finite = values[np.isfinite(values)]
    facts = {
        "codec": repr(codec),
        "bytes": len(payload),
        "elements": elements,
        "bits a value": 8 * len(payload) / max(elements, 1),
        "times smaller than float32": 4 * elements / max(len(payload), 1),
        "zeros": int((values == 0).sum()),
        "not finite": int(elements - len(finite)),
        "smallest": float(finite.min()) if len(finite) else None,
        "largest": float(finite.max()) if len(finite) else None,
        "norm": float(np.linalg.norm(finite)),
    }
    return Inspection("payload", facts)


def _state_file(path: Path) -> Inspection:
    from hvd_qsgd.errors import SetupError

    try:
        from hvd_qsgd.torch.state import read_state
    except ModuleNotFoundError as error:
        raise SetupError(
            f"State files need torch and Horovod, and {error.name} is missing; see hvd-qsgd doctor."
        ) from None
    return Inspection("state of one rank", *_state(read_state(path)))


def _checkpoint(path: Path) -> Inspection:
    try:
        import torch
    except ModuleNotFoundError:
        raise ConfigError(f"{path} may be a checkpoint, which needs torch to read: pip install torch") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what it cannot or will not read
        raise ConfigError(
            f"torch cannot read {path} as a checkpoint of tensors and plain values ({type(error).__name__}). "
            f"If it is a payload, give --config and --elements."
        ) from None
    found = list(_states(content))
    if not found:
        raise ConfigError(
            f"{path} holds no state of a compressor. hvd_qsgd.torch.state.gather(compressor) gives one to torch.save."
        )
    facts: dict[str, Any] = {"states": len(found)}
    rows = []
    for place, state in found:
        try:
            check_saved(state)
        except WrongFieldError as error:
            raise ConfigError(f"{path} holds a damaged state at {place}: {error}. Go back to an earlier one.") from None
        of_state, parts = _state(state)
        facts |= of_state
        rows += [{"where": place, **part} for part in parts]
    return Inspection("checkpoint", facts, rows)


def _states(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every state of a compressor inside dictionaries and lists, with its place."""
    # Neither called for each level nor twice for one object: a file may nest them as it likes.
    left, seen = [("", content)], set()
    while left:
        place, value = left.pop()
        if isinstance(value, dict) and set(value) >= STATE_KEYS:
            yield place or "(all)", value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            parts = list(value.items() if isinstance(value, dict) else enumerate(value))
            left += [(f"{place}/{key}" if place else str(key), part) for key, part in reversed(parts)]


def _state(state: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    facts = {"version": state["version"], "config": json.dumps(state["config"])}
    rows = [
        {"array": name, "elements": array.numel(), "norm": float(array.double().norm())}
        for name, array in state["arrays"].items()
    ]
    steps = state["steps"]
    facts["tensors"] = len(steps)
    facts["steps"] = "none" if not steps else f"{min(steps.values()) + 1} to {max(steps.values()) + 1}"
    return facts, rows


def _records(path: Path) -> Inspection:
    from hvd_qsgd.observe.reading import read_records
    from hvd_qsgd.observe.report import total_of

    records = read_records(path)
    total = total_of(records)
    facts = {
        "compressor": total["compressor"],
        "rank": f"{total['rank']} of {total['ranks']}",
        "records": len(records),
        "steps": total["step"],
        "sent, bytes": round(total["wire_bytes"]),
        "times fewer bytes": total["uncompressed_wire_bytes"] / total["wire_bytes"] if total["wire_bytes"] else None,
    }
    names = dict.fromkeys(name for record in records for name in record["tensors"])
    rows = []
    for name in names:
        tensor = total_of(records, name)
        how = tensor["exchange"] or f"not compressed: {tensor['bypassed']}"
        sent = round(tensor["wire_bytes"])
        rows.append({"tensor": name, "elements": tensor["elements"], "sent, bytes": sent, "how": how})
    return Inspection("records of a monitor", facts, rows)
