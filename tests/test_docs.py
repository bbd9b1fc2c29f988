"""README and docs: the site builds, commands and snippets work, every error is in troubleshooting, doctests run."""

from __future__ import annotations

import ast
import configparser
import doctest
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import typing
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, environment, launch
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from hvd_qsgd.cli import app

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/README.md")]
)

# -- the site -----------------------------------------------------------------------------------------


def build_site(config: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(directory)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: Path) -> None:
    built = build_site(ROOT / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stderr
    for page in ROOT.glob("docs/*.md"):
        assert (tmp_path / "site" / page.with_suffix(".html").name).stat().st_size > 5000
    shown = {page.name: page.read_text() for page in (tmp_path / "site").glob("*.html")}
    api = "".join(text for name, text in shown.items() if name.startswith("api"))
    names = ("CompressorBase", "QSGDCompressor", "DistributedOptimizer", "EF21", "Rules", "Monitor", "PayloadError")
    for name in (*names, "SimulatedPipeline", "train_step", "MPITransport"):
        assert f"{name}</" in api, f"{name} is not in the API"
    # What is made for each framework has no text of its own.
    found = re.search(r'id="hvd_qsgd.torch.QSGDCompressor".*?id="hvd_qsgd.torch.TopKCompressor"', api, re.DOTALL)
    assert found and "bucket_size" in found[0] and "unbiased rounding" in found[0]
    assert ":class:" not in api
    for name, text in shown.items():
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="https?:[^"]*"', text), name


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n[nowhere](missing.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\n")
    assert "missing.md" in build_site(tmp_path / "mkdocs.yml", tmp_path / "site").stderr
    assert build_site(tmp_path / "mkdocs.yml", tmp_path / "site").returncode != 0


def test_pages_that_are_not_written_are_left_out(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        docs_nav = importlib.import_module("docs_nav")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    (tmp_path / "a.md").touch()
    assert docs_nav.existing(["a.md", "b.md", {"More": ["c.md", "a.md"]}, {"None": ["d.md"]}], tmp_path) == [
        "a.md",
        {"More": ["a.md"]},
    ]


# -- errors -------------------------------------------------------------------------------------------

ERRORS = {"ConfigError", "ExchangeError", "PayloadError", "SetupError", "StageError", "UnsupportedError"}


def leading_words(message: ast.expr) -> str | None:
    """The first words of a message that are always the same, six at most; None if nothing is."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    texts = [""]
    for part in parts:
        if isinstance(part, ast.Constant):
            texts[-1] += str(part.value)
        else:
            texts.append("")
    texts = [" ".join(text.split()) for text in texts]
    telling = [text for text in texts if len(re.findall(r"[A-Za-z]{2,}", text)) >= 3]
    return " ".join((telling or [max(texts, key=len)])[0].split()[:6]) or None


def messages() -> dict[str, str]:
    """Leading words of every error of the package, and where it is made."""
    found = {}
    for file in sorted((ROOT / "hvd_qsgd").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] in ERRORS:
                words = leading_words(node.args[0])
                if words:
                    found[words] = f"{file.relative_to(ROOT)}:{node.lineno}"
    return found


def test_leading_words() -> None:
    for text, expected in {
        'f"{name} has no bucket of that size, so {x}"': "has no bucket of that size,",
        'f"QSGD: bits={bits} no"': "QSGD: bits=",
        "message": None,
    }.items():
        assert leading_words(ast.parse(text, mode="eval").body) == expected


def test_every_error_is_in_troubleshooting() -> None:
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    # The page shows an example of what the message has in place of these.
    page = page.replace("Horovod 0.28.1 does not", "Horovod does not").replace("{", "")
    known = messages()
    assert len(known) > 100
    missing = {words: place for words, place in known.items() if words not in page}
    assert not missing, f"Add their first words, and what to do, to docs/troubleshooting.md: {missing}"


def test_troubleshooting_has_no_error_that_is_gone() -> None:
    rows = re.findall(r"^\| (?!message|---)(.+?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    known = messages()
    stale = [row for row in rows if not any(words in row or row in words for words in known)]
    assert len(rows) > 100 and not stale, stale


# -- doctests -----------------------------------------------------------------------------------------


def test_doctests() -> None:
    ran = 0
    for file in sorted((ROOT / "hvd_qsgd").rglob("*.py")):
        if ">>> " in file.read_text():
            parts = file.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
            result = doctest.testmod(module, extraglobs={"np": np})
            assert result.attempted > 0, f"{file} has examples that doctest does not find"
            assert result.failed == 0, f"{result.failed} examples fail: python -m doctest {file}"
            ran += result.attempted
    assert ran >= 15


# -- commands -----------------------------------------------------------------------------------------

PROGRAMS = {"docker", "export", "horovodrun", "hvd-qsgd", "ip", "kubectl", "make", "mpirun", "pip", "python", "sbatch"}
PROGRAMS |= {"source", "srun"}
#: Programs of the reader, who is shown how to start them.
YOUR_OWN = {"train.py", "your_script.py"}


def commands_of(text: str) -> list[str]:
    """Lines of blocks, and spans of code, that start like a command."""
    text = re.sub(r"^```python\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).splitlines() + re.findall(r"^    +(\S.*)$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    candidates = [command for line in joined + spans for command in line.split("  #")[0].split(" && ")]
    return [
        command.strip()
        for command in candidates
        if command.split() and command.split()[0] in PROGRAMS and " " in command
    ]


def all_commands() -> list[str]:
    return sorted({command for page in PAGES for command in commands_of(page.read_text())})


def options_of(script: Path) -> set[str]:
    return set(re.findall(r'"(--[a-z][a-z-]*)"', script.read_text())) | {"--help"}


def check_script(words: list[str]) -> None:
    """That a script is there, and knows its options."""
    if words[0] in YOUR_OWN:
        return
    script = ROOT / words[0]
    assert script.exists(), f"{script} does not exist"
    own = words[: words.index("--")] if "--" in words else words
    unknown = {word for word in own[1:] if word.startswith("--")} - options_of(script)
    assert not unknown, f"{script} has no {unknown}"


def split_launcher(words: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's options, and the program that it starts, with its arguments."""
    at = next((i for i, word in enumerate(words) if word in ("python", "hvd-qsgd")), len(words))
    return words[1:at], words[at:]


@pytest.fixture(scope="module")
def launcher_help() -> str:
    command = ["horovodrun", "--help"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout


def test_commands_are_found() -> None:
    text = "    make test ARGS='-k x'\n\nSay `python a.py --b\n1` or\n\n"
    text += "```bash\nmake setup\npip install a && hvd-qsgd doctor\n```\n"
    assert commands_of(text) == [
        "make setup",
        "pip install a",
        "hvd-qsgd doctor",
        "make test ARGS='-k x'",
        "python a.py --b 1",
    ]
    programs = {command.split()[0] for command in all_commands()}
    assert len(all_commands()) > 50 and programs >= {"make", "python", "horovodrun", "hvd-qsgd", "docker", "sbatch"}


@pytest.mark.parametrize("command", all_commands())
def test_command(command: str, launcher_help: str) -> None:
    check_command(shlex.split(command.replace("...", "")), launcher_help)


def check_command(words: list[str], launcher_help: str) -> None:
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in arguments)
    elif program == "python":
        if arguments[0] == "-m":
            importlib.import_module(arguments[1])
        else:
            check_script(arguments)
    elif program in ("horovodrun", "mpirun", "srun"):
        options, script = split_launcher(words)
        if program == "horovodrun":
            names = [word.split("=")[0] for word in options if re.match(r"--?[a-zA-Z]", word)]
            assert all(re.search(rf"(^|[\s,\[]){re.escape(name)}\b", launcher_help) for name in names), names
        if script:
            check_command(script, launcher_help)
    elif program == "hvd-qsgd":
        known = CliRunner().invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200"})
        assert known.exit_code == 0, known.output
        assert all(word in known.output for word in arguments if word.startswith("-")), known.output
    elif program == "pip":
        check_pip(arguments)
    elif program in ("docker", "kubectl", "sbatch"):
        files = [word for word in arguments if re.match(r"(deploy/|examples/|Dockerfile|\.$)", word)]
        assert all((ROOT / file).exists() for file in files), files
        assert files or program != "sbatch" or YOUR_OWN & set(arguments)
    else:
        assert program in ("export", "source", "ip")


def check_pip(arguments: list[str]) -> None:
    """Extras exist, and versions are those that the project is tested with."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pinned = "".join(file.read_text() for file in (ROOT / "requirements").glob("*.txt"))
    for word in arguments[1:]:
        extras = re.search(r"\[(.*)\]", word)
        if extras:
            assert set(extras[1].split(",")) <= set(setup["options.extras_require"]), word
        elif "==" in word and not word.endswith(".*"):
            assert f"{word}\n" in pinned, f"{word} is not in requirements/"


def test_what_is_pinned_installs_on_debian_12() -> None:
    """Its Python is 3.11.2: a package that asks for a later 3.11 stops `make demo` there, and nowhere else."""
    asked = {f"{d.name}=={d.version}": d.metadata["Requires-Python"] for d in distributions()}
    refused = {name: python for name, python in asked.items() if python and "3.11.2" not in SpecifierSet(python)}
    assert len(asked) > 100 and not refused


@pytest.mark.parametrize("command", sorted({c for c in all_commands() if c.startswith("hvd-qsgd estimate -p")}))
def test_estimates_of_the_docs_run(command: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and re.search(r"Yes: |No: |Rather not: ", result.output), result.output


# -- Python -------------------------------------------------------------------------------------------


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def signature_of(function: object) -> inspect.Signature:
    return inspect.signature(typing.cast(typing.Any, function))


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_snippets_import_what_is_there(page: Path) -> None:
    """They compile; what they import from this package exists, and takes the settings that they give it."""
    for snippet in snippets(page):
        tree = ast.parse(snippet)
        names: dict[str, object] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hvd_qsgd"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                    names[alias.asname or alias.name] = getattr(module, alias.name)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and inspect.isclass(names.get(node.func.id))
            ):
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                signature_of(names[node.func.id]).bind_partial(*node.args, **keywords)


@pytest.mark.slow
def test_snippets_run_on_two_ranks(tmp_path: Path) -> None:
    outcome = launch([str(ROOT / "tests" / "snippets_worker.py"), str(tmp_path)], ranks=2)
    assert outcome.status == 0, outcome.output
    ran = re.findall(r"rank (\d) ran (\d+) snippets", outcome.output)
    assert sorted(rank for rank, _ in ran) == ["0", "1"] and all(int(number) >= 7 for _, number in ran), outcome.output
