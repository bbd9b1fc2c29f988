"""What docs/family.md promises in numbers."""

from __future__ import annotations

import inspect
import pydoc
import re
from pathlib import Path

import pytest
from checkers import gauss

import hvd_qsgd.feedback
import hvd_qsgd.policies
import hvd_qsgd.torch
from hvd_qsgd import EliasQSGD

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "family.md").read_text()
COMPRESSORS = {name: kind for name, kind in vars(hvd_qsgd.torch).items() if name.endswith("Compressor")}


def test_elias_code_takes_as_many_bits_as_stated() -> None:
    stated = re.search(r"about ([\d.]+) bits a value at 4 bits", TEXT)
    assert stated is not None
    x = gauss(1 << 17)
    assert round(8 * len(EliasQSGD().encode(x)) / x.size, 1) == float(stated[1])


def test_every_class_that_is_named_is_there() -> None:
    known = {**vars(hvd_qsgd.torch), **vars(hvd_qsgd.feedback), **vars(hvd_qsgd.policies)}
    named = re.findall(r"`(\w+Compressor)`|`(EF21|LoCo|ErrorFeedback|MomentumCorrection)\(", TEXT)
    assert len(named) > 10 and all((one or other) in known for one, other in named)
    assert set(COMPRESSORS) - {one for one, _ in named} == {"CastCompressor", "Compressor", "IdentityCompressor"}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_help_describes_every_compressor(name: str) -> None:
    kind = COMPRESSORS[name]
    text = pydoc.plain(pydoc.render_doc(kind))
    described = text[: text.index("Method resolution order")]
    own = [p for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert all(re.search(rf"{parameter.name}\b.*:", described) for parameter in own), described
    for method in ("stats", "reset", "state_dict", "compress"):
        assert f" {method}(self" in text
