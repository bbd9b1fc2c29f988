"""Damaged and hostile files: a clear error or the right result, and no page and no terminal does what a file says."""

from __future__ import annotations

import ast
import html.parser
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import ROOT
from test_observe import record
from typer.testing import CliRunner

from hvd_qsgd import ConfigError
from hvd_qsgd.cli import app, main
from hvd_qsgd.inspecting import inspect_file
from hvd_qsgd.observe import JsonLines, read_records, report
from hvd_qsgd.observe.report import make_report

MARKUP = "<script>alert(1)</script>"
CONTROL = "\x1b]0;owned\x07\x1b[2J\x9b5m\u202e\n\ud800[red]x[/] :fire:"
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 5, -0.5, 5.0, 1e-320, 1e99, 1e308, float("inf"), float("nan"), 2**62, 10**25, 10**4000),
    *("", "5", MARKUP, '"><img src=x onerror=alert(1)>', "&amp;", CONTROL, r"$\frac{$", "x" * 100_000),
    *([], {}, [[1]], [MARKUP], {"a": 1}, {MARKUP: {MARKUP: MARKUP}}, json.loads("[" * 90 + "]" * 90)),
]


def lines_of_a_run(directory: Path) -> list[dict[str, Any]]:
    sink = JsonLines(directory / "sound.jsonl")
    for step in (10, 20, 30):
        sink.write(record(step))
    sink.close()
    return read_records(directory / "sound.jsonl")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object inside of a record with each of its keys."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield value, key
            yield from places(part)


def mutated(lines: list[dict[str, Any]], rng: np.random.Generator) -> tuple[list[dict[str, Any]], str]:
    """A copy with one field missing, another value, or another name; and which field that is."""
    copy = json.loads(json.dumps(lines))
    # The last lines as well: what they lack is no sign of a run that was killed.
    everywhere = list(places(copy[rng.integers(len(copy))]))
    inside, key = everywhere[rng.integers(len(everywhere))]
    value = inside.pop(key)
    chosen = HOSTILE[rng.integers(len(HOSTILE))]
    kind = rng.integers(8)
    if kind == 1:
        inside[chosen if isinstance(chosen, str) else "other"] = value
    elif kind > 1:
        inside[key] = chosen
    return copy, key


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Tags(html.parser.HTMLParser):
    """The kinds of tags of a page and the names of their attributes; tags must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(f"{tag} {name}" for name, _ in attributes)}


def check_page(page: str, sound: set[str]) -> None:
    """It has no tag and no attribute that the page of a sound file lacks, and no control characters."""
    assert Tags(page).names <= sound
    assert page.isascii() or page.encode("utf-8")
    assert not [c for c in page if not c.isprintable() and c != "\n"]


def test_mutated_records_give_a_page_or_name_line_and_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines, rng = lines_of_a_run(tmp_path), np.random.default_rng(0)
    # They take most of the time, and get numbers alone.
    monkeypatch.setattr(report, "draw", lambda runs: [])
    sound = Tags(make_report([written(tmp_path / "sound.jsonl", lines)])).names
    outcomes = {"page": 0, "error": 0}
    for _ in range(1500):
        changed, field = mutated(lines, rng)
        path = written(tmp_path / "run.jsonl", changed)
        try:
            page = make_report([path])
        except ConfigError as error:
            outcomes["error"] += 1
            told = str(error)
            assert re.search(r"line [123]\b", told) and len(told) < 500
            # Without a version nothing is known of the fields.
            assert json.dumps(field)[1:-1].replace('\\"', '"') in told.replace("\\'", "'") or field == "version"
            with pytest.raises(ConfigError, match="line"):
                inspect_file(path)
            continue
        outcomes["page"] += 1
        check_page(page, sound)
        json.dumps(inspect_file(path).as_dict(), allow_nan=False)
    assert min(outcomes.values()) > 150 and not caplog.messages


def test_ranks_that_are_markup_are_refused(tmp_path: Path) -> None:
    lines = lines_of_a_run(tmp_path)
    for field in ("rank", "ranks", "steps", "time"):
        path = written(tmp_path / "run.jsonl", [{**lines[0], field: MARKUP}, *lines[1:]])
        with pytest.raises(ConfigError, match=rf"line 1: {field} is '<script>.*, and must be a .*number"):
            make_report([path])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_plots_of_hostile_labels_and_extreme_numbers(tmp_path: Path) -> None:
    lines = lines_of_a_run(tmp_path)
    sound = Tags(make_report([tmp_path / "sound.jsonl"])).names
    numbers = [
        field
        for field, value in lines[0].items()
        if isinstance(value, (int, float)) and field not in ("version", "time")
    ]
    for name, values in {
        f"_$\\frac$ {CONTROL[:4]}": (1, 1, 1),
        MARKUP.replace("/", ""): (2**31, 1e-320, 1e12),
        "zeros": (1, 0, 0),
    }.items():
        whole, low, high = values
        changed = [dict(line) for line in lines]
        for line, value in zip(changed, (low, high, low)):
            for field in numbers:
                line[field] = whole if isinstance(line[field], int) else value
            line["tensors"] = {MARKUP: line["tensors"]["0/bias"], CONTROL: line["tensors"]["0/bias"]}
        page = make_report([written(tmp_path / f"{name}.jsonl", changed)])
        check_page(page, sound)
        assert page.count("<svg") == 5


def test_a_line_that_was_cut_off_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of_a_run(tmp_path)
    path = written(tmp_path / "run.jsonl", lines)
    content = path.read_text()
    for cut in (1, 30, 1000):
        path.write_text(content[:-cut])
        caplog.clear()
        # The first cut takes the end of the line alone.
        assert read_records(path) == lines[: 3 if cut == 1 else 2]
        assert len(caplog.messages) == (cut > 1) and all("line 3, the last one" in m for m in caplog.messages)
    path.write_text(content.replace("\n", "\nnothing\n", 1))
    with pytest.raises(ConfigError, match="line 2 is no record"):
        read_records(path)
    path.write_text(content + "[" * 100_000)
    caplog.set_level(logging.ERROR)
    assert read_records(path) == lines
    path.write_text("[" * 100_000 + "\n" + content)
    with pytest.raises(ConfigError, match="line 1 is no record"):
        read_records(path)


def test_the_reader_knows_every_field(tmp_path: Path) -> None:
    """What is new in a record must be checked as well."""
    (line,) = [json.loads(json.dumps({"version": 1, **record().as_dict()}))]
    assert read_records(written(tmp_path / "run.jsonl", [line])) == [line]


def test_terminals_are_shown_names_and_not_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of_a_run(tmp_path)
    for line in lines:
        line["compressor"] = CONTROL
        line["tensors"] = {f"blocks[attn].{CONTROL}": line["tensors"]["0/bias"]}
    path = written(tmp_path / "run[bold].jsonl", lines)
    shown = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "250"}).output
    assert not [c for c in shown if not c.isprintable() and c != "\n"]
    with pytest.raises(SystemExit, match="1"), monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["hvd-qsgd", "inspect", f"{CONTROL[:9]}[red].pt"])
        main()
    assert capsys.readouterr().err == "hvd-qsgd: There is no file \\x1b]0;owned[red].pt.\n"
    for text in (r"\x1b]0;owned\x07\x1b[2J\x9b5m\u202e\n\ud800[red]x[/] :fire:", "blocks[attn].", "run[bold].jsonl"):
        assert text in shown.replace("\n", "")


def printing_of(module: Path) -> set[str]:
    """Names by which a module could print something itself."""
    names = {node.id for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Attribute)}
    return names & {"print", "echo", "secho", "Console", "Table", "Text", "rich"}


def test_commands_print_through_one_module() -> None:
    modules = {path.stem: printing_of(path) for path in (ROOT / "hvd_qsgd" / "cli").glob("*.py")}
    assert {name for name, found in modules.items() if found} == {"output"}
