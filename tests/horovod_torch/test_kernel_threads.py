"""How many threads encode."""

from __future__ import annotations

import os

import horovod.torch as hvd
import pytest
import torch
from rank_checks import dyadic

from hvd_qsgd import ConfigError
from hvd_qsgd.kernels import threads
from hvd_qsgd.torch import QSGDCompressor


def test_a_rank_uses_its_cores_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3 * hvd.local_size())))
    before = torch.get_num_threads()
    results = []
    try:
        for torch_threads, asked, used in ((8, None, 3), (2, None, 2), (1, None, 1), (1, 5, 5)):
            torch.set_num_threads(torch_threads)
            compressor = QSGDCompressor(threads=asked)
            x = dyadic((600, 1000))
            results.append(hvd.allreduce(x, name="x", compression=compressor))
            assert threads._threads == used
    finally:
        torch.set_num_threads(before)
        threads.use_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(ConfigError, match="threads=0"):
        QSGDCompressor(threads=0)
