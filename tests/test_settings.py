"""Compressors show their settings, with types and defaults, to mypy, editors, ``help()`` and ``inspect``."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hvd_qsgd
import hvd_qsgd.tensorflow
import hvd_qsgd.torch
from hvd_qsgd.compressors.base import CompressorBase
from hvd_qsgd.compressors.settings import Settings, SettingsWithoutFeedback
from hvd_qsgd.tensorflow.compressor import TensorFlowSettings
from hvd_qsgd.torch.compressor import TorchSettings

ROOT = Path(__file__).resolve().parent.parent
CALLS = ROOT / "tests" / "typed_calls.py"
FRAMEWORKS = {"torch": (hvd_qsgd.torch, TorchSettings), "tensorflow": (hvd_qsgd.tensorflow, TensorFlowSettings)}


def parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def compressors(framework: str) -> dict[str, type[CompressorBase]]:
    """The classes that users see, by name."""
    kinds = {name: kind for name, kind in vars(FRAMEWORKS[framework][0]).items() if inspect.isclass(kind)}
    return {name: kind for name, kind in kinds.items() if issubclass(kind, CompressorBase)}


CLASSES = [pytest.param(fw, name, id=f"{fw}.{name}") for fw in FRAMEWORKS for name in compressors(fw)]


def test_all_classes_are_looked_at() -> None:
    assert len(compressors("torch")) == 14 and len(compressors("tensorflow")) == 11


@pytest.mark.parametrize(("framework", "name"), CLASSES)
def test_signature_and_help_show_every_setting(framework: str, name: str) -> None:
    module, settings = FRAMEWORKS[framework]
    kind = compressors(framework)[name]
    shown = parameters(kind)
    common = {key: p for key, p in parameters(module.Compressor).items() if key != "codec"}
    if name == "DGCCompressor":
        del common["error_feedback"]
    assert {key: shown.get(key) for key in common} == common
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in shown.values())
    assert set(common) | {"error_feedback"} == set(settings.__annotations__)
    text = pydoc.plain(pydoc.render_doc(kind))
    assert f"{name}{inspect.signature(kind)}" in text and "**settings" not in text


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_types_that_checkers_see_are_those_of_the_signature(framework: str) -> None:
    module, settings = FRAMEWORKS[framework]
    known = parameters(module.Compressor)
    del known["codec"]
    typed = {key: hint.__forward_arg__ for key, hint in settings.__annotations__.items()}
    assert typed == {key: p.annotation for key, p in known.items()}
    parts = (settings, Settings, SettingsWithoutFeedback)
    described = {key: text for part in parts for key, text in described_in(part)}
    assert described == {key: f"Default: {p.default!r}" for key, p in known.items()}


def described_in(kind: type) -> list[tuple[str, str]]:
    """Names of a class, with the text that editors show beside each."""
    body = ast.parse(inspect.getsource(kind)).body[0].body[1:]
    return [(field.target.id, ast.literal_eval(text.value)) for field, text in zip(body[::2], body[1::2])]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_settings_of_codecs_have_the_defaults_of_the_codec(framework: str) -> None:
    for name in set(compressors(framework)) - {"Compressor", "DGCCompressor"}:
        known = parameters(getattr(hvd_qsgd, name.removesuffix("Compressor")))
        own = [p for p in parameters(compressors(framework)[name]).values() if p.kind is not p.KEYWORD_ONLY]
        assert all(p.default == known[p.name].default for p in own if p.name != "scaled"), name


@pytest.mark.parametrize("name", [name for name in compressors("tensorflow") if name != "Compressor"])
def test_frameworks_take_and_say_the_same(name: str) -> None:
    torch, tensorflow = (compressors(framework)[name] for framework in ("torch", "tensorflow"))
    one, other = parameters(torch), parameters(tensorflow)
    assert one.pop("progress_thread") and other.pop("kernels")
    assert one == other and list(one) == list(other)
    assert torch.__doc__ == tensorflow.__doc__.replace("hvd_qsgd.tensorflow", "hvd_qsgd.torch")


def test_classes_of_users_show_settings_too() -> None:
    class Mixin:
        def __init__(self, **others: Any) -> None:
            super().__init__(**others)

    class Own(Mixin, hvd_qsgd.torch.QSGDCompressor):
        def __init__(self, steps: int, *, seed: int = 1, **settings: Any) -> None:
            super().__init__(seed=seed, **settings)

    class Plain(hvd_qsgd.torch.QSGDCompressor):
        pass

    class Few(hvd_qsgd.torch.QSGDCompressor):
        def __init__(self) -> None:
            super().__init__(bits=2)

    shown = parameters(Own)
    assert next(iter(shown)) == "steps" and shown["seed"].default == 1 and shown["min_dims"].default == 2
    assert parameters(Plain) == parameters(hvd_qsgd.torch.QSGDCompressor)
    assert not parameters(Few)
    assert Own(3, min_dims=1).min_dims == 1 and Few().seed == 0


@pytest.mark.slow
def test_mypy_reports_wrong_calls_and_no_others() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", str(CALLS.relative_to(ROOT))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    reported = {int(line) for line in re.findall(r"typed_calls\.py:(\d+): error:", run.stdout)}
    wrong = {number for number, line in enumerate(CALLS.read_text().splitlines(), 1) if "# wrong: " in line}
    assert reported == wrong and len(wrong) > 30, run.stdout + run.stderr
    assert all(line.startswith("tests/typed_calls.py:") for line in run.stdout.splitlines()), run.stdout
