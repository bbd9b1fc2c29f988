"""What docs/family.md promises in numbers."""

from __future__ import annotations

import re
from pathlib import Path

from checkers import gauss

import hvd_qsgd.feedback
import hvd_qsgd.policies
import hvd_qsgd.torch
from hvd_qsgd import EliasQSGD

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "family.md").read_text()


def test_elias_code_takes_as_many_bits_as_stated() -> None:
    stated = re.search(r"about ([\d.]+) bits a value at 4 bits", TEXT)
    assert stated is not None
    x = gauss(1 << 17)
    assert round(8 * len(EliasQSGD().encode(x)) / x.size, 1) == float(stated[1])


def test_every_class_that_is_named_is_there() -> None:
    known = {**vars(hvd_qsgd.torch), **vars(hvd_qsgd.feedback), **vars(hvd_qsgd.policies)}
    named = re.findall(r"`(\w+Compressor)`|`(EF21|LoCo|ErrorFeedback|MomentumCorrection)\(", TEXT)
    assert len(named) > 10 and all((one or other) in known for one, other in named)
    assert {name for name in hvd_qsgd.torch.__all__ if name.endswith("Compressor")} - {one for one, _ in named} == {
        "CastCompressor",
        "Compressor",
        "IdentityCompressor",
    }
