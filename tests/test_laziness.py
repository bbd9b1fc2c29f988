"""Imports load what they must and no framework besides, in interpreters of their own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = (
    "horovod",
    "keras",
    "matplotlib",
    "mpi4py",
    "numba",
    "tensorboard",
    "tensorflow",
    "tf_keras",
    "torch",
    "triton",
)
#: Everything that may be imported without a framework.
LIGHT = [
    "hvd_qsgd",
    "hvd_qsgd.reduction.agreement",
    "hvd_qsgd.reduction.buffers",
    "hvd_qsgd.codecs",
    "hvd_qsgd.collectives.simulated",
    "hvd_qsgd.reduction.progress",
    "hvd_qsgd.exchanges",
    "hvd_qsgd.feedback",
    "hvd_qsgd.codecs.scaled",
    "hvd_qsgd.reduction.fusion",
    "hvd_qsgd.kernels",
    "hvd_qsgd.observe",
    "hvd_qsgd.policies",
    "hvd_qsgd.codecs.random_words",
    "hvd_qsgd.observe.stats",
]


def loaded_by(statement: str, *, packages: tuple[str, ...] = HEAVY) -> set[str]:
    """Which of some packages an interpreter has loaded after a statement."""
    script = f"import json, sys\n{statement}\n"
    script += f"print(json.dumps(sorted(set({packages!r}) & {{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def check_loads_at_most(statement: str, allowed: set[str]) -> None:
    loaded = loaded_by(statement)
    assert loaded <= allowed, f"{statement!r} loads {sorted(loaded - allowed)}"


@pytest.mark.parametrize("module", ["hvd_qsgd", "all"])
def test_the_package_alone_loads_no_framework(module: str) -> None:
    check_loads_at_most(f"import {', '.join(LIGHT) if module == 'all' else module}", set())


def test_encoding_and_averaging_load_no_framework() -> None:
    check_loads_at_most(
        "import numpy, hvd_qsgd\n"
        "codec = hvd_qsgd.QSGD()\n"
        "codec.decode(codec.encode(numpy.ones(5)), 5)\n"
        "from hvd_qsgd.kernels import kernels_for\n"
        "assert kernels_for(codec, 'numpy') is codec",
        set(),
    )


def test_the_package_imports_numpy_and_nothing_else_from_outside() -> None:
    script = (
        "import sys, numpy\nbefore = set(sys.modules)\nimport hvd_qsgd\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'hvd_qsgd', 'numpy'}\n"
        "assert new <= sys.stdlib_module_names, new"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", [name for name in HEAVY if name in ("numba", "mpi4py", "torch")])
def test_the_proof_fails_if_something_heavy_is_loaded(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with pytest.raises(AssertionError, match=f"loads .*'{package}'"):
        check_loads_at_most(f"import hvd_qsgd, {package}", set())


def test_numba_is_loaded_by_its_kernels_and_torch_is_not() -> None:
    statement = "import hvd_qsgd.kernels as k; k.kernels_for(hvd_qsgd.QSGD(), 'numba')"
    assert loaded_by(f"import hvd_qsgd; {statement}") == {"numba"}


def test_the_torch_package_loads_no_other_framework() -> None:
    """Stock Horovod with torch loads none either; if it ever did, that would be no fault of this package."""
    pytest.importorskip("horovod")
    pytest.importorskip("torch")
    # The compiler is loaded by the first optimizer anyway.
    ours, theirs = loaded_by("import hvd_qsgd.torch"), loaded_by("import horovod.torch, torch._dynamo")
    assert {"torch", "horovod"} <= ours
    assert ours - theirs == set()
    assert not ours & {"tensorflow", "keras", "tf_keras", "mpi4py"}


def test_the_tensorflow_package_loads_no_torch() -> None:
    pytest.importorskip("horovod")
    pytest.importorskip("tensorflow")
    loaded = loaded_by("import hvd_qsgd.tensorflow, hvd_qsgd.keras, hvd_qsgd.kernels.tensorflow")
    assert {"tensorflow", "keras", "horovod"} <= loaded
    assert not loaded & {"torch", "tf_keras", "mpi4py"}


def test_pipelines_need_torch_only_until_they_send() -> None:
    pytest.importorskip("torch")
    ours, theirs = loaded_by("import hvd_qsgd.pipeline"), loaded_by("import torch._dynamo")
    assert "torch" in ours and ours - theirs == set()
