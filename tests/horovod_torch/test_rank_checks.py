"""The checkers themselves: what cannot fail proves nothing."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from expectations import SHAPE, assert_equal, assert_within_a_level
from rank_checks import assert_same_on_all_ranks, backward, make_parameters, normal

from hvd_qsgd import QSGD


def test_equal_bits_pass() -> None:
    assert_same_on_all_ranks([normal(SHAPE, rank=0), torch.tensor(float("nan")), torch.empty(0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_one_flipped_bit_on_one_rank_fails_on_all(dtype: torch.dtype) -> None:
    tensor = (100 * normal(SHAPE, rank=0)).to(dtype)
    if hvd.rank() == hvd.size() - 1:
        tensor.view(torch.uint8)[-1, -1] ^= 1
    with pytest.raises(AssertionError, match=f"ranks \\[{hvd.size() - 1}\\] differ"):
        assert_same_on_all_ranks([tensor])


def test_one_ulp_is_not_equal() -> None:
    x = normal(SHAPE)
    y = x.clone()
    y[3, 4] = torch.nextafter(y[3, 4], torch.tensor(9.0))
    assert_equal(x, x.clone())
    with pytest.raises(AssertionError, match="1 of 5183 elements differ; element 223 "):
        assert_equal(x, y)
    with pytest.raises(AssertionError, match="shape"):
        assert_equal(x, x.t())


def test_a_level_too_much_is_found() -> None:
    codec, x = QSGD(), normal(SHAPE)
    y = x.clone()
    y[0, 0] += 1.01 * x.reshape(-1)[:512].abs().max() / codec.levels
    assert_within_a_level(codec, x, [x])
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within_a_level(codec, y, [x])


def test_backward_gives_the_gradients_asked_for() -> None:
    parameters = make_parameters({"weight": SHAPE})
    backward(parameters, {"weight": normal(SHAPE)})
    assert_equal(parameters["weight"].grad, normal(SHAPE))
