"""Real Horovod: runs the tests of ``horovod_tensorflow`` on every rank of real jobs."""

from __future__ import annotations

import pytest
from launch import check, compile_kernels, launch_pytest

FOLDER = "horovod_tensorflow"
CORE = ["test_rank_checks.py", "test_allreduce.py", "test_tape.py", "test_feedback.py", "test_family.py"]
#: For four ranks on few cores.
SOME = "test_gradients or test_settings_of_the_tape or test_two_models or test_two_halves or test_an_id"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_kernels()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "launcher", "files"),
    [
        (2, "mpi", [*CORE, "test_refusals.py"]),
        (2, "gloo", ["test_devices.py", "test_monitor.py"]),
        (2, "mpi", ["test_like_none.py"]),
        (4, "gloo", ["test_tape.py", "test_devices.py", "-k", "test_gradients and traced or different_devices"]),
        (4, "mpi", ["test_tape.py", "test_process_sets.py", "-k", SOME]),
    ],
)
def test_every_mode_on_every_rank(ranks: int, launcher: str, files: list[str]) -> None:
    check(launch_pytest(files, ranks, launcher, timeout=800, folder=FOLDER), ranks)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "launcher"), [(2, "gloo")])
def test_keras_3(ranks: int, launcher: str) -> None:
    check(launch_pytest(["test_keras3.py"], ranks, launcher, timeout=800, folder=FOLDER), ranks)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "launcher"), [(2, "mpi")])
def test_tf_keras(ranks: int, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    check(launch_pytest(["test_tf_keras.py"], ranks, launcher, timeout=800, folder=FOLDER), ranks)
