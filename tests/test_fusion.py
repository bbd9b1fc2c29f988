"""Bundles: every element in one of them, cut where the codec allows, no larger than they may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_qsgd.reduction.fusion import Slice, plan_bundles

LENGTHS = st.lists(st.integers(0, 500), max_size=12).map(lambda lengths: [(f"t{i}", n) for i, n in enumerate(lengths)])


def check_bundles(bundles: list[list[Slice]], lengths: list[tuple[str, int]], granularity: int, limit: int) -> None:
    flat = [part for bundle in bundles for part in bundle]
    # Whole tensors, in the order given, without a gap.
    expected = iter(flat)
    for name, length in lengths:
        stop = 0
        while stop < length:
            part = next(expected, None)
            assert part is not None
            assert (part.name, part.start) == (name, stop)
            assert part.stop > part.start
            stop = part.stop
        assert stop == length
    assert next(expected, None) is None

    totals = dict(lengths)
    for part in flat:
        if granularity:
            assert part.start % granularity == 0
            assert part.stop % granularity == 0 or part.stop == totals[part.name]
        else:
            assert (part.start, part.stop) == (0, totals[part.name])
    for bundle in bundles:
        size = sum(part.stop - part.start for part in bundle)
        if size > limit:
            # One slice that cannot be cut.
            assert len(bundle) == 1
            assert not granularity or size <= granularity
    for bundle, following in zip(bundles, bundles[1:]):
        # A new bundle begins only where the next slice has no room in the old one.
        assert sum(part.stop - part.start for part in (*bundle, following[0])) > limit


@given(lengths=LENGTHS, granularity=st.sampled_from([0, 1, 8, 64, 1000]), limit=st.integers(1, 700))
def test_every_element_is_in_one_bundle(lengths: list[tuple[str, int]], granularity: int, limit: int) -> None:
    check_bundles(plan_bundles(lengths, granularity, limit), lengths, granularity, limit)


@given(lengths=LENGTHS, granularity=st.sampled_from([0, 8]), limit=st.integers(1, 700))
def test_all_ranks_make_the_same_bundles(lengths: list[tuple[str, int]], granularity: int, limit: int) -> None:
    assert plan_bundles(iter(lengths), granularity, limit) == plan_bundles(lengths, granularity, limit)


def test_small_tensors_share_a_bundle_and_large_ones_are_cut() -> None:
    bundles = plan_bundles([("a", 10), ("b", 20), ("c", 200), ("d", 5)], 8, 64)
    assert bundles == [
        [Slice("a", 0, 10), Slice("b", 0, 20)],
        [Slice("c", 0, 64)],
        [Slice("c", 64, 128)],
        [Slice("c", 128, 192)],
        [Slice("c", 192, 200), Slice("d", 0, 5)],
    ]
    assert plan_bundles([("a", 10), ("c", 200), ("d", 5)], 0, 64) == [
        [Slice("a", 0, 10)],
        [Slice("c", 0, 200)],
        [Slice("d", 0, 5)],
    ]
    assert plan_bundles([], 8, 64) == plan_bundles([("a", 0)], 8, 64) == []


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [[Slice("a", 0, 8)]],
        [[Slice("a", 0, 8), Slice("a", 8, 16), Slice("a", 16, 20)], [Slice("b", 0, 4)]],
        [[Slice("a", 0, 16)], [Slice("b", 0, 4)], [Slice("a", 16, 20)]],
        [[Slice("a", 0, 10)], [Slice("a", 10, 20)], [Slice("b", 0, 4)]],
        [[Slice("a", 0, 16)], [Slice("a", 16, 20)], [Slice("b", 0, 4)]],
        [[Slice("a", 0, 16)], [Slice("a", 16, 20), Slice("b", 0, 4), Slice("b", 4, 4)]],
    ],
)
def test_bundle_check_fails_on_wrong_bundles(wrong: list[list[Slice]]) -> None:
    lengths = [("a", 20), ("b", 4)]
    check_bundles([[Slice("a", 0, 16)], [Slice("a", 16, 20), Slice("b", 0, 4)]], lengths, 8, 16)
    with pytest.raises(AssertionError):
        check_bundles(wrong, lengths, 8, 16)
