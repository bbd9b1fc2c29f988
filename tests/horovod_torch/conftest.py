"""For tests that every rank of a Horovod job runs; see ``tests/rank_plugin.py``."""

from __future__ import annotations

from collections.abc import Iterator

import horovod.torch as hvd
import pytest
import torch
from rank_plugin import RankPlugin

from hvd_qsgd.torch.flights import ENGINE


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(number): only in jobs of so many ranks")
    hvd.init()
    torch.set_num_threads(1)
    config.pluginmanager.register(RankPlugin(hvd))


@pytest.fixture(autouse=True)
def _nothing_is_left_under_way() -> Iterator[None]:
    """All ranks start a test together, and leave no exchange behind."""
    hvd.barrier()
    yield
    assert all(task.finished for task in ENGINE._tasks)
