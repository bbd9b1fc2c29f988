"""The package is built as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hvd_qsgd
from hvd_qsgd.codecs import CODECS, Codec
from hvd_qsgd.codecs.exchanged import ExchangedCodec
from hvd_qsgd.exchanges import EXCHANGES, Exchange
from hvd_qsgd.feedback import FEEDBACKS, Feedback

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hvd_qsgd"


def rows() -> list[list[str]]:
    """The parts of the package in each row of the table of folders."""
    heads = re.findall(r"^\| (`hvd_qsgd/.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return [re.findall(r"`(?:hvd_qsgd/)?(\w+)(?:\.py)?`", head) for head in heads]


def parts() -> set[str]:
    """Modules and packages directly inside the package, but for the link to the examples."""
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def imported_by(source: str) -> set[str]:
    """The parts of the package that some Python imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("hvd_qsgd.")}
    return found & parts()


def check_knows_only_what_is_above(part: str, source: str) -> None:
    order = rows()
    row = next(number for number, names in enumerate(order) if part in names)
    known = {name for names in order[: row + 1] for name in names}
    assert imported_by(source) <= known


def test_every_part_is_in_the_table() -> None:
    listed = [name for names in rows() for name in names]
    assert sorted(listed) == sorted(parts() - {"__init__"})


@pytest.mark.parametrize("part", sorted(parts() - {"__init__"}))
def test_a_part_knows_only_those_above_it(part: str) -> None:
    module = PACKAGE / f"{part}.py"
    for path in [module] if module.exists() else (PACKAGE / part).rglob("*.py"):
        check_knows_only_what_is_above(part, path.read_text())


def test_the_check_fails_on_a_part_below() -> None:
    for statement in (
        "import hvd_qsgd.torch",
        "from hvd_qsgd.reduction import progress",
        "def f():\n    from hvd_qsgd.cli import app",
    ):
        check_knows_only_what_is_above("cli", statement)
        with pytest.raises(AssertionError):
            check_knows_only_what_is_above("exchanges", statement)


def in_modules_of(package: str) -> list[Any]:
    """Whatever stands in a module of a package of hvd_qsgd, its registry apart."""
    names = [path.stem for path in (PACKAGE / package).glob("*.py") if path.stem not in ("__init__", "registry")]
    modules = [importlib.import_module(f"hvd_qsgd.{package}.{name}") for name in names]
    return [value for module in modules for value in vars(module).values()]


@pytest.mark.parametrize(
    ("package", "kind", "registry"),
    [("codecs", Codec, CODECS), ("exchanges", Exchange, EXCHANGES), ("feedback", Feedback, FEEDBACKS)],
)
def test_everything_is_registered(package: str, kind: type, registry: dict[str, Any]) -> None:
    found = in_modules_of(package)
    members = [v for v in found if isinstance(v, kind) or (isinstance(v, type) and issubclass(v, kind))]
    # Classes that are only derived from have no name.
    assert {member.name: member for member in members if isinstance(getattr(member, "name", None), str)} == registry


def test_every_codec_is_public_and_has_golden_bytes() -> None:
    assert {codec.__name__ for codec in CODECS.values()} <= set(vars(hvd_qsgd))
    written = {json.loads(path.read_text())["config"]["codec"] for path in (ROOT / "tests" / "golden").glob("*.json")}
    # Of those that do not encode by themselves, there are no payloads.
    assert {name for name, codec in CODECS.items() if not issubclass(codec, ExchangedCodec)} == written
