"""Kinds of feedback other than the residual, through Horovod's optimizer."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from expectations import assert_equal
from rank_checks import (
    apply_gradients,
    check_resumes,
    gather,
    make_gradients,
    make_optimizer,
    make_parameters,
    reduce_gradients,
)

from hvd_qsgd.errors import ConfigError
from hvd_qsgd.feedback import EF21, ErrorFeedback, Feedback, LoCo
from hvd_qsgd.torch import Compressor, QSGDCompressor, TopKCompressor

SHAPES = {"first": (40, 50), "bias": (50,), "second": (30, 41)}
KINDS: list[Feedback] = [ErrorFeedback("bfloat16"), ErrorFeedback("int8"), EF21(), LoCo(reset=3)]
CODECS: list[tuple[type[Compressor], dict[str, Any]]] = [
    (TopKCompressor, {"ratio": 0.1}),
    (QSGDCompressor, {"bits": 3, "rounding": "nearest", "exchange": "scatter_gather"}),
    (QSGDCompressor, {"norm": "l2", "scaled": True, "exchange": "allreduce"}),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("codec", "settings"), CODECS, ids=lambda v: str(v))
def test_ranks_agree_and_a_resumed_run_equals_an_uninterrupted_one(
    kind: Feedback, codec: type[Compressor], settings: dict[str, Any]
) -> None:
    check_resumes(lambda: codec(**settings, error_feedback=kind), SHAPES)


def test_ef21_gives_the_mean_of_the_estimates() -> None:
    compressor = TopKCompressor(0.1, error_feedback=EF21())
    parameters = make_parameters(SHAPES)
    optimizer = make_optimizer(parameters, compressor)
    for number in range(3):
        raw = make_gradients(parameters, number)
        reduce_gradients(optimizer, parameters, raw)
        apply_gradients(optimizer)
        arrays = compressor.state_dict()["arrays"]
        for name in ("first", "second"):
            own = torch.stack(gather(arrays[f"own/{name}"])).double().mean(0)
            torch.testing.assert_close(parameters[name].grad.view(-1).double(), own, rtol=0, atol=1e-5)
            assert_equal(arrays[f"mean/{name}"], parameters[name].grad.view(-1))
    compressor.check_state()


def test_one_object_of_settings_serves_several_compressors() -> None:
    kind = EF21()
    compressors = [TopKCompressor(0.1, error_feedback=kind) for _ in range(2)]
    x = torch.ones(40, 50) * (hvd.rank() + 1)
    hvd.allreduce(x, name="x", compression=compressors[0])
    assert not compressors[1].state_dict()["arrays"] and not kind.arrays()
    with pytest.raises(ConfigError, match="settings of the saved run"):
        TopKCompressor(0.1).load_state_dict(compressors[0].state_dict())
