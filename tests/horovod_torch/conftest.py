"""For tests that every rank of a Horovod job runs, in the same order; ``tests/launch.py`` starts them.

A rank that fails a test ends the job, because the others would wait for it forever.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch

from hvd_qsgd.torch.flights import ENGINE

COUNTS = {"collected": 0, "passed": 0}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(number): only in jobs of so many ranks")
    hvd.init()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Not skipped but left out, so that all that is collected must pass.
    items[:] = [item for item in items if all(mark.args == (hvd.size(),) for mark in item.iter_markers("ranks"))]
    COUNTS["collected"] = len(items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        head = f"rank {hvd.rank()} of {hvd.size()} failed in {report.when} of {report.nodeid}"
        print(f"\n{head}\n{report.longreprtext}\n{report.capstdout}{report.capstderr}", file=sys.stderr, flush=True)
        os._exit(1)
    COUNTS["passed"] += report.when == "call" and report.passed


def pytest_sessionfinish() -> None:
    directory = os.environ.get("HVD_QSGD_TEST_REPORTS")
    if directory:
        Path(directory, f"{hvd.rank()}.json").write_text(json.dumps(COUNTS))
    hvd.shutdown()


@pytest.fixture(autouse=True)
def _nothing_is_left_under_way() -> Iterator[None]:
    """All ranks start a test together, and leave no exchange behind."""
    hvd.barrier()
    yield
    assert all(task.finished for task in ENGINE._tasks)
