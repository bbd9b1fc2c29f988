"""A hook of mkdocs: pages of the navigation that do not exist are left out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    config.nav = existing(config.nav, Path(config.docs_dir))
    return config


def existing(entries: list[Any], docs: Path) -> list[Any]:
    """The entries, strings or sections of them, whose files are there."""
    kept: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, inner),) = entry.items()
            inner = existing(inner, docs)
            kept += [{title: inner}] if inner else []
        elif (docs / entry).exists():
            kept.append(entry)
    return kept
