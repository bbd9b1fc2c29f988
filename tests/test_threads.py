"""Threads for CPU kernels: the same bytes from any number of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from checkers import check_kernels, check_lanes, gauss, hard_arrays

from hvd_qsgd import QSGD
from hvd_qsgd.kernels import kernels_for, threads

HARD = hard_arrays()
CODECS = [QSGD(), QSGD(7, 24), QSGD(2, 64, "l2"), QSGD(8, 512, "max", "nearest")]


@pytest.fixture(autouse=True)
def _few_elements_are_enough(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "LEAST_ELEMENTS", 1)
    yield
    threads.use_threads(1)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_and_values_are_those_of_numpy(codec: QSGD, count: int) -> None:
    threads.use_threads(count)
    kernels = kernels_for(codec, "numba")
    for x in [*HARD.values(), gauss(5 * codec.bucket_size + 3)]:
        check_kernels(codec, kernels, x, 2**64 - 1, 3 * codec.bucket_size)
        check_lanes(codec, kernels, x, 5, 7)


def test_parts_are_all_units_on_as_many_threads() -> None:
    threads.use_threads(3)
    together = threading.Barrier(3, timeout=20)
    seen: list[tuple[int, int]] = []
    names: set[str] = set()

    def call(start: int, stop: int) -> None:
        together.wait()
        names.add(threading.current_thread().name)
        seen.append((start, stop))

    threads.in_parts(10 * 8 - 3, 8, call)
    assert sorted(seen) == [(0, 3), (3, 6), (6, 10)]
    assert len(names) == 3


def test_short_vectors_stay_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LEAST_ELEMENTS", 100)
    threads.use_threads(4)
    names = []
    for length in (0, 1, 199):
        threads.in_parts(length, 8, lambda start, stop: names.append((threading.current_thread(), stop)))
    assert names == [(threading.current_thread(), units) for units in (0, 1, 25)]


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_a_part_is_raised_when_all_have_ended(bad: int) -> None:
    threads.use_threads(2)
    ended = []

    def call(start: int, stop: int) -> None:
        if start == bad:
            raise ZeroDivisionError
        ended.append(start)

    with pytest.raises(ZeroDivisionError):
        threads.in_parts(2, 1, call)
    assert ended == [1 - bad]


def test_threads_are_made_anew_in_a_forked_process() -> None:
    threads.use_threads(2)
    codec = QSGD(bucket_size=8)
    x = gauss(1000)
    expected = codec.encode(x)

    def encoded() -> np.ndarray:
        out = np.empty_like(expected)
        kernels_for(codec, "numba").encode_into(x, out)
        return out

    assert (encoded() == expected).all()
    child = os.fork()
    if child == 0:
        os._exit(0 if (encoded() == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_rank_owns_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert [threads.owned_cores(processes) for processes in (1, 4, 5, 13)] == [12, 3, 2, 1]
