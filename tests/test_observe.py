"""Sinks of a monitor, and the report that is made of records."""

from __future__ import annotations

import builtins
import html.parser
import json
import logging
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hvd_qsgd import ConfigError
from hvd_qsgd.observe import JsonLines, LogLines, Prometheus, Record, TensorBoard, read_records
from hvd_qsgd.observe.report import make_report
from hvd_qsgd.observe.stats import Stats, TensorStats

NAME = '0/layer<1>&"x".weight'


def record(step: int = 10, rank: int = 0, error: float | None = 0.5) -> Record:
    measured = {} if error is None else {"input_norm": 4.0, "lost_norm": 4 * error, "residual_norm": 4 * error}
    sent = TensorStats(1000, 10, 40_000, 5000, 5000.0, 40_000.0, 0.1, 0.2, 0.3, "allgather", "QSGD()", "", **measured)
    bias = TensorStats(10, 10, 400, 400, 400.0, 400.0, bypassed="1 dimensions are fewer")
    stats = Stats({NAME: sent, "0/bias": bias}, {"optimizer 0": "allgather (predicted: 1 ms)"})
    return Record(1e9 + step, step, 10, 2.0, rank, 2, "QSGDCompressor()", stats)


def test_a_log_line_says_what_a_mean_step_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hvd_qsgd"):
        LogLines().write(record())
    (line,) = caplog.messages
    assert line == (
        "step 10: 0.00054 MB a step, 7.5 times less; step 200.0 ms, encode 10.0, wait 20.0, decode 30.0; "
        "relative error 0.5; residual norm 2"
    )


def test_json_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run-{rank}.jsonl"
    sink = JsonLines(path)
    written = [record(10, rank=3), record(20, rank=3, error=float("nan"))]
    for entry in written:
        sink.write(entry)
    # Complete before it is closed, and without NaN, which is no JSON.
    lines = read_records(tmp_path / "run-3.jsonl")
    sink.close()
    assert lines[0] == {"version": 1, **json.loads(json.dumps(written[0].as_dict()))}
    assert lines[1]["relative_error"] is None and lines[1]["tensors"][NAME]["lost_norm"] is None
    cut = tmp_path / "cut.jsonl"
    cut.write_text((tmp_path / "run-3.jsonl").read_text()[:-20])
    assert read_records(cut) == lines[:1]


def test_files_that_hold_no_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for text, why in [
        ("", "no record"),
        ("{}\n{}\n", "line 1"),
        ('{"version": 99}\n', "version 99"),
        ("\0\n", "line 1"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            read_records(path)
    with pytest.raises(ConfigError, match=r"\{rank\}"):
        JsonLines(path).write(record(rank=1))


def test_prometheus_serves_totals_and_gauges() -> None:
    sink = Prometheus(port=0)
    sink.write(record())
    sink.write(record(20, error=0.25))
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    label = NAME.replace('"', '\\"')
    for line in (
        f'hvd_qsgd_wire_bytes_total{{rank="0",tensor="{label}"}} 10000.0',
        'hvd_qsgd_steps_total{rank="0"} 20.0',
        f'hvd_qsgd_relative_error{{rank="0",tensor="{label}"}} 0.25',
    ):
        assert line in lines
    with pytest.raises(ConfigError, match="another port="):
        Prometheus(port=sink.port)
    sink.close()


def test_tensorboard_gets_scalars(tmp_path: Path) -> None:
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int, time: float) -> None:
            scalars.append((tag, value, step))

        def flush(self) -> None: ...

    TensorBoard(Writer()).write(record())
    assert ("hvd_qsgd/relative_error", 0.5, 10) in scalars and ("hvd_qsgd/wait_seconds", 0.02, 10) in scalars
    assert (f"hvd_qsgd_tensors/{NAME}/ratio", 8.0, 10) in scalars
    assert not any("0/bias" in tag for tag, _, _ in scalars)


def test_tensorboard_writes_files_that_it_reads(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    sink.write(record())
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (scalar,) = events.Scalars("hvd_qsgd/ratio")
    assert (scalar.step, scalar.value) == (10, pytest.approx(40_400 / 5400))


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (lambda: Prometheus(port=0), "prometheus_client"),
        (lambda: TensorBoard("nowhere"), "tensorboard"),
        (lambda: make_report([]), "matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_the_command(make: Any, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if missing in name and not name.startswith("hvd_qsgd"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=f"pip install {missing}"):
        make()


def test_statistics_since_a_copy() -> None:
    stats = Stats({"a": TensorStats(5, 2, 10, 4, 4.0, 8.0, input_norm=2.0, lost_norm=1.0, measured=2)})
    before = stats.copy()
    stats.tensors["a"].exchanges += 1
    stats.tensors["a"].payload_bytes += 7
    stats.tensors["b"] = TensorStats(1, 1, 4, 4, 4.0, 4.0)
    since = stats.since(before)
    assert (since.tensors["a"].exchanges, since.tensors["a"].payload_bytes, since.payload_bytes) == (1, 7, 11)
    # What was measured before is no news.
    assert since.tensors["a"].relative_error is None and stats.tensors["a"].relative_error == 0.5
    assert set(stats.since(stats.copy()).tensors) == set()


class Page(html.parser.HTMLParser):
    """The parts of a report: cells of tables, and what would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.graphics = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.graphics += tag == "svg"
        self.cells += [""] if tag == "td" else []
        # Links inside of the file, as matplotlib makes them, are none.
        self.fetched += [v for k, v in attributes if k.endswith(("src", "href")) and v and not v.startswith("#")]
        if tag in ("script", "link"):
            self.fetched.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for path, errors in zip(paths, [(0.5, None, 0.25), (None, None, None)], strict=True):
        sink = JsonLines(path)
        for i, error in enumerate(errors):
            sink.write(record(10 * (i + 1), error=error))
        sink.close()
    return paths


def test_a_report_is_whole_and_fetches_nothing(runs: list[Path]) -> None:
    text = make_report(runs)
    page = Page(text)
    assert not page.open and not page.fetched
    assert page.graphics == 5 and "@import" not in text and "url(http" not in text
    assert page.cells.count(NAME) == page.cells.count("0/bias") == 2
    row = page.cells[page.cells.index(NAME) :][:11]
    # Times are those of the last two of three records, in ms a step; errors the last that were measured.
    assert row[1:] == ["1,000", "30", "0.015", "8.0", "10.000", "20.000", "30.000", "0.25", "1", "allgather, QSGD()"]
    assert "not compressed: 1 dimensions are fewer" in page.cells
    # Without errors and residuals their plots are left out.
    assert Page(make_report(runs[1:])).graphics == 3


def test_a_browser_shows_the_report(runs: list[Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(make_report(runs))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--window-size=1240,2000", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert shown.returncode == 0 and picture.exists(), shown.stderr
    pixels = matplotlib.image.imread(picture)[..., :3]
    blue = np.abs(pixels - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.1
    # Lines of the plots, in their colour, in both columns.
    assert blue[:, :600].sum() > 100 and blue[:, 640:].sum() > 100
