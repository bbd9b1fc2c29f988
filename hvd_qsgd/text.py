"""Text that comes from elsewhere, such as the names of parameters and what stands in files, as it may be shown."""

from __future__ import annotations


def plain(text: str) -> str:
    """The text with escapes such as ``\\x1b`` for what does not print.

    Terminals obey control characters, and some others hide text or turn its order.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = 80) -> str:
    """The text, or its beginning and three dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
