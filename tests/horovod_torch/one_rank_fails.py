"""A test that fails on one rank while the others wait for it; the job must end at once."""

from __future__ import annotations

import horovod.torch as hvd


def test_that_fails_on_the_last_rank() -> None:
    assert hvd.rank() < hvd.size() - 1, "what went wrong"
    hvd.barrier()
