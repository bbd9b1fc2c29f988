"""For tests that every rank of a Horovod job runs, in the same order; ``launch.py`` starts them.

A rank that fails a test ends the job, because the others would wait for it forever.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest


class RankPlugin:
    """pytest's hooks inside a rank.

    Args:
        hvd: Horovod's module for the framework; initialized already.
    """

    def __init__(self, hvd: Any) -> None:
        self._hvd = hvd
        self._counts = {"collected": 0, "passed": 0}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Not skipped but left out, so that all that is collected must pass. Last: after what -k deselects.
        size = self._hvd.size()
        items[:] = [item for item in items if all(mark.args == (size,) for mark in item.iter_markers("ranks"))]
        self._counts["collected"] = len(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            where = f"rank {self._hvd.rank()} of {self._hvd.size()} failed in {report.when} of {report.nodeid}"
            text = f"\n{where}\n{report.longreprtext}\n{report.capstdout}{report.capstderr}"
            print(text, file=sys.stderr, flush=True)
            os._exit(1)
        self._counts["passed"] += report.when == "call" and report.passed

    def pytest_sessionfinish(self) -> None:
        directory = os.environ.get("HVD_QSGD_TEST_REPORTS")
        if directory:
            Path(directory, f"{self._hvd.rank()}.json").write_text(json.dumps(self._counts))
        self._hvd.shutdown()
