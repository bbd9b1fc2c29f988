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
import torch
from launch import ROOT
from safetensors.torch import save_file
from test_observe import record
from typer.testing import CliRunner

from hvd_qsgd import ConfigError
from hvd_qsgd.cli import app, main
from hvd_qsgd.commands.inspect_files import inspect_file
from hvd_qsgd.compressors.base import STATE_VERSION
from hvd_qsgd.observe import JsonLines, read_records, report
from hvd_qsgd.observe.report import make_report
from hvd_qsgd.torch.state import _split, read_state

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
        with pytest.raises(ConfigError, match=rf"line 1 has a wrong field: {field} is '<script>.*must be a .*number"):
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


# -- states -------------------------------------------------------------------------------------------


def saved_state() -> dict[str, Any]:
    return {
        "version": STATE_VERSION,
        "config": {"codec": "topk", "ratio": 0.01, "error_feedback": {"feedback": "residual"}},
        "arrays": {"residual/0/w": torch.arange(6.0), "residual/0/v": torch.ones(2)},
        "numbers": {"steps/0/w": 3},
        "steps": {"0/w": 41, "0/v": 41},
        "memory": {"0/w": {"threshold": 0.5, "left": 3, "q": torch.ones(2, 3)}},
        "policy": {"step": 4, "last": {"0/w": torch.ones(3)}},
    }


def write_state(path: Path, metadata: str, arrays: dict[str, Any]) -> Path:
    save_file(arrays, path, metadata={"hvd_qsgd": metadata})
    return path


def test_damaged_states_are_refused_by_name_of_file_and_field(tmp_path: Path) -> None:
    """Their plain part, which tells where arrays belong: each of its parts missing, of another type, or too deep."""
    tensors, plain = _split(saved_state(), "")
    path = write_state(tmp_path / "rank-00000-of-00001.safetensors", json.dumps(plain), tensors)
    assert json.dumps(_split(read_state(path), "")[1]) == json.dumps(plain)
    refused = 0
    for number in range(len(list(places(plain)))):
        for hostile in (None, True, -5, "", MARKUP, [], {}, [[]], {"value": MARKUP}, {"tensor": "/nowhere"}, "missing"):
            copy = json.loads(json.dumps(plain))
            inside, key = list(places(copy))[number]
            del inside[key]
            if hostile != "missing":
                inside[key] = hostile
            write_state(path, json.dumps(copy), tensors)
            try:
                state = read_state(path)
                inspect_file(path)
                assert set(state) >= set(saved_state())
            except ConfigError as error:
                refused += 1
                assert re.match(rf"{path} holds a damaged state: \S.*\. Go back", str(error)), error
    assert refused > 400
    deep = '{"mapping": {"version": ' * 5000 + "0" + "}}" * 5000
    for metadata, why in (
        ("nothing", "its metadata cannot be read as JSON"),
        ("[" * 100_000, "its metadata cannot be read as JSON"),
        (deep, "read as JSON|levels deep|is neither a value"),
        (json.dumps(plain).replace("0.01", "[" * 90 + "]" * 90), "config.ratio.* is nested more than 20 levels deep"),
        ("3", "all of it is neither a value nor a tensor nor"),
        ('{"mapping": {}}', "version is missing"),
    ):
        with pytest.raises(ConfigError, match=f"holds a damaged state: .*{why}"):
            read_state(write_state(path, metadata, tensors))


def test_files_of_damaged_bytes_are_refused(tmp_path: Path) -> None:
    tensors, plain = _split(saved_state(), "")
    path = write_state(tmp_path / "x.safetensors", json.dumps(plain), tensors)
    sound, rng, read = path.read_bytes(), np.random.default_rng(0), 0
    for number in range(600):
        content = np.frombuffer(sound, np.uint8).copy()
        if number % 3 == 0:
            content = content[: rng.integers(len(content))]
        else:
            content[rng.integers(len(content))] = rng.integers(32, 127)
        path.write_bytes(content.tobytes())
        try:
            inspect_file(path)
            read += 1
        except ConfigError as error:
            assert str(path) in str(error)
    assert 50 < read < 550
    with pytest.raises(ConfigError, match="There is no file"):
        inspect_file(tmp_path)


def test_checkpoints_with_damaged_states_are_refused(tmp_path: Path) -> None:
    path, loop = tmp_path / "x.pt", [1]
    loop.append(loop)  # type: ignore[arg-type]
    deep: Any = saved_state()
    for _ in range(400):
        deep = [deep]
    for content in ({"a": loop, "b": saved_state()}, {"a": deep}):
        torch.save(content, path)
        assert inspect_file(path).facts["states"] == 1
    for field in ("version", "config", "arrays", "steps", "numbers", "memory", "policy"):
        for hostile in (None, 3.5, MARKUP, [1], {1: 2}, {"a": deep}):
            torch.save({"here": [{**saved_state(), field: hostile}]}, path)
            with pytest.raises(ConfigError, match=rf"holds a damaged state at here/0: (a name in )?{field}"):
                inspect_file(path)
