"""For tests that every rank of a Horovod job runs; see ``tests/rank_plugin.py``."""

from __future__ import annotations

from collections.abc import Iterator

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from rank_plugin import RankPlugin


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(number): only in jobs of so many ranks")
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    config.pluginmanager.register(RankPlugin(hvd))


@pytest.fixture(autouse=True)
def _all_ranks_start_together() -> Iterator[None]:
    hvd.allreduce(tf.zeros(1), name="start")
    yield
