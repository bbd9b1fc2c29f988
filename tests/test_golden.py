"""The bytes in tests/golden, written once by tools/write_golden_files.py, are those of every backend today."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkers import check_same_bits, flip_bit, wrapper

from hvd_qsgd import codec_from_config
from hvd_qsgd.kernels import kernels_for

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "write_golden_files.py"
sys.path.insert(0, str(TOOL.parent))

from write_golden_files import CASES, DIRECTORY, SUFFIXES, Case, digest, make_bytes, read_bytes  # noqa: E402

#: Listed here as well, so that no case can be dropped unnoticed.
NAMES = [
    "qsgd_2bit",
    "qsgd_3bit",
    "qsgd_4bit_second_part",
    "qsgd_7bit_nearest",
    "qsgd_8bit_l2",
    "qsgd_l2_nearest",
    "qsgd_not_finite",
    "qsgd_zeros_and_tail_of_one",
    "qsgd_extreme_magnitudes",
    "topk_plain",
    "topk_bitmap",
    "topk_gaps_float16",
    "topk_ties_and_zeros",
    "topk_not_finite",
    "minmax_2bit",
    "minmax_7bit_after_relu",
    "minmax_8bit_extreme",
    "minmax_not_finite",
    "rows_topk",
    "rows_qsgd_second_part",
    "cast_float16",
    "cast_bfloat16",
    "identity",
    "lanes_4bit_4_ranks",
    "lanes_8bit_1000_ranks_not_finite",
    "elias_4bit",
    "elias_sparse",
    "elias_fixed_width",
    "random_k",
    "random_k_unbiased",
    "random_k_not_finite",
    "sign",
    "topk_rows",
    "topk_rows_ties_and_zeros",
    "topk_global",
    "topk_threshold",
    "scaled",
]
BACKENDS = ("numpy", "numba", "torch")


def check_golden(name: str, backend: str, directory: Path = DIRECTORY) -> None:
    """The stored input gives the stored bytes, and those decode to what they decoded to."""
    settings = json.loads((directory / f"{name}.json").read_text())
    x = np.load(directory / f"{name}.npy")
    data = np.fromfile(directory / f"{name}.bin", np.uint8)
    codec = codec_from_config(settings["config"])
    assert codec.version == settings["version"]
    case = Case(name, codec, x, settings["first"], settings["ranks"])
    assert f"{case.key:016x}" == settings["key"]
    kernels, wrap = kernels_for(codec, backend), wrapper(backend)
    check_same_bits(make_bytes(kernels, case, wrap), data)
    assert digest(read_bytes(kernels, case, data, wrap)) == settings["decoded_sha256"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_golden(name: str, backend: str) -> None:
    check_golden(name, backend)


def test_every_case_has_its_files_and_every_file_its_case() -> None:
    assert [case.name for case in CASES] == NAMES
    assert {path.name for path in DIRECTORY.iterdir()} == {name + suffix for name in NAMES for suffix in SUFFIXES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_belong_to_the_cases_of_the_tool(case: Case) -> None:
    settings = json.loads((DIRECTORY / f"{case.name}.json").read_text())
    made_of = (codec_from_config(settings["config"]), settings["first"], settings["ranks"], settings["key"])
    assert made_of == (case.codec, case.first, case.ranks, f"{case.key:016x}")
    check_same_bits(np.load(DIRECTORY / f"{case.name}.npy"), case.x)


@pytest.fixture()
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DIRECTORY, tmp_path / "golden"))


@pytest.mark.parametrize("name", NAMES)
def test_golden_check_fails_on_one_flipped_bit(name: str, copy: Path) -> None:
    check_golden(name, "numpy", copy)
    path = copy / f"{name}.bin"
    data = np.fromfile(path, np.uint8)
    for bit in (0, 8 * data.size // 2 + 5, 8 * data.size - 1):
        flip_bit(data, bit).tofile(path)
        with pytest.raises(AssertionError, match="bytes differ"):
            check_golden(name, "numpy", copy)


def test_golden_check_fails_on_another_input_or_outcome(copy: Path) -> None:
    path = copy / "qsgd_2bit.npy"
    x = np.load(path)
    np.save(path, np.where(np.arange(x.size) == np.abs(x).argmax(), 2 * x, x))
    with pytest.raises(AssertionError):
        check_golden("qsgd_2bit", "numpy", copy)
    path = copy / "qsgd_3bit.json"
    path.write_text(path.read_text().replace('"decoded_sha256": "', '"decoded_sha256": "0'))
    with pytest.raises(AssertionError):
        check_golden("qsgd_3bit", "numpy", copy)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_golden_check_fails_on_a_missing_file(suffix: str, copy: Path) -> None:
    (copy / f"topk_plain{suffix}").unlink()
    with pytest.raises(FileNotFoundError):
        check_golden("topk_plain", "numpy", copy)


def run_tool(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--directory", str(directory), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_tool_writes_these_files_and_overwrites_none_unless_forced(copy: Path) -> None:
    changed, removed = copy / "identity.bin", copy / "qsgd_2bit.bin"
    changed.write_bytes(b"")
    removed.unlink()
    result = run_tool(copy)
    assert result.returncode == 1
    assert "nothing was written" in result.stderr
    assert changed.read_bytes() == b""
    assert not removed.exists()
    result = run_tool(copy, "--force")
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in DIRECTORY.iterdir()
    }


def test_a_case_of_another_version_is_refused(copy: Path) -> None:
    path = copy / "identity.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(AssertionError):
        check_golden("identity", "numpy", copy)
