"""Registries that other packages add to: by ``register()``, or by an entry point, without a fork of this package.

An entry point is read from the metadata of installed packages, and its package imported, when its name is first
looked up or when all members of a registry are asked for. What this package has itself is found without either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from hvd_qsgd.errors import ConfigError, SetupError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Members by name: those of this package, those registered by a program, and those of installed packages.

    Names come in this order, and iterating over them imports nothing.

    Args:
        group: of the entry points.
        what: one member, in words, for errors.
        fault: of a name and a would-be member, says what it must be instead, or "".
        members: those of this package.
        taken: more names of this package, which others cannot have.
    """

    def __init__(
        self,
        group: str,
        what: str,
        fault: Callable[[Any, Any], str],
        members: Mapping[str, T],
        taken: Iterable[str] = (),
    ) -> None:
        self.group = group
        self.what = what
        self._fault = fault
        self._members = dict(members)
        self._own = {*members, *taken}
        #: Called when a member has been added: empties what was remembered of the members.
        self.changed: list[Callable[[], None]] = []

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            self._load(name)
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        yield from [*self._members, *(name for name in self._entry_points if name not in self._members)]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def register(self, name: str, member: T) -> None:
        """Add a member; one that is there already under its name changes nothing.

        Raises:
            ConfigError: the name belongs to another one, or it is not a member of the right kind.
        """
        fault = self._fault(name, member)
        if fault:
            raise ConfigError(f"Cannot register {member!r} as a {self.what} {name!r}: {fault}.")
        owner = self._members.get(name, "hvd_qsgd itself" if name in self._own else member)
        if owner is not member:
            raise ConfigError(
                f"Cannot register {member!r} as a {self.what} {name!r}: the name belongs to {owner}. Take another name."
            )
        self._add(name, member)

    def _add(self, name: str, member: T) -> None:
        self._members[name] = member
        for forget in self.changed:
            forget()

    def _load(self, name: str) -> None:
        """Import the entry point of a name, if there is one."""
        found = self._entry_points.get(name)
        if found is None:
            return
        package, entry = found
        try:
            member = entry.load()
        except Exception as error:
            raise SetupError(
                f"The package {package} cannot be loaded for its {self.what} {name!r} ({entry.value}): "
                f"{type(error).__name__}: {error}. Repair the package or uninstall it."
            ) from error
        fault = self._fault(name, member)
        if not fault and self._members.get(name, member) is not member:
            fault = f"it has registered {self._members[name]!r} under this name itself"
        if fault:
            raise SetupError(
                f"The package {package} offers {member!r} ({entry.value}) as a {self.what} {name!r}: {fault}. Repair "
                f"the package or uninstall it."
            )
        self._add(name, member)

    @functools.cached_property
    def _entry_points(self) -> dict[str, tuple[str, Any]]:
        """Packages and entry points by name, which have not been imported.

        Raises:
            SetupError: two packages, or a package and this one, use one name.
        """
        found: dict[str, tuple[str, Any]] = {}
        for package, entry in _all_entry_points():
            if entry.group != self.group:
                continue
            if entry.name in found or entry.name in self._own:
                owner = found[entry.name][0] if entry.name in found else "hvd_qsgd itself"
                raise SetupError(
                    f"The package {package} offers a {self.what} {entry.name!r} ({entry.value}), but the name belongs "
                    f"to {owner}. Uninstall one of them."
                )
            found[entry.name] = (package, entry)
        return found


def class_fault(base: type, member: Any) -> str:
    """Say what is wrong with a class that should derive from ``base``, or ""."""
    if not isinstance(member, type) or not issubclass(member, base):
        return f"it must be a class that derives from {base.__module__}.{base.__qualname__}"
    missing = sorted(getattr(member, "__abstractmethods__", ()))
    return f"it must have {', '.join(missing)}" if missing else ""


def name_fault(name: Any, member: Any) -> str:
    """Say what is wrong with the name of a member that bears one itself, or ""."""
    own = getattr(member, "name", None)
    if isinstance(own, str) and own.isidentifier() and own == name:
        return ""
    return f"its own name is {own!r}, and must be this one, of letters, digits and underscores"


@functools.cache
def _all_entry_points() -> list[tuple[str, Any]]:
    """What installed packages offer to this one, each with the name and version of its package."""
    # Takes longer than all other imports of this package together.
    from importlib import metadata

    found: dict[str, list[tuple[str, Any]]] = {}
    for package in metadata.distributions():
        entries = [entry for entry in package.entry_points if entry.group.startswith("hvd_qsgd.")]
        # A package that is installed twice is imported from where it comes first.
        if entries:
            name = package.metadata["Name"]
            found.setdefault(name, [(f"{name} {package.version}", entry) for entry in entries])
    return [one for of_package in found.values() for one in of_package]
