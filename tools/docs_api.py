"""An extension of griffe, which reads the package for the API pages: links in the text of docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Roles of Sphinx become links."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._visit(pkg, pkg)

    def _visit(self, item: griffe.Object, package: griffe.Module) -> None:
        for member in item.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member, package)
        if item.docstring:
            item.docstring.value = ROLE.sub(lambda role: self._link(role[1], package), item.docstring.value)

    @staticmethod
    def _link(name: str, package: griffe.Module) -> str:
        """A link, where the pages show it; names of the package itself are shown where they come from."""
        shown = package.members.get(name.removeprefix(f"{package.name}."))
        identifier = shown.target_path if isinstance(shown, griffe.Alias) else name
        return f'<autoref optional identifier="{identifier}">`{name}`</autoref>'
