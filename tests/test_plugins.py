"""Codecs, kernels, feedback and exchanges of other packages, each in an interpreter that finds such a package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_qsgd import QSGD, Codec
from hvd_qsgd import codecs as of_codecs
from hvd_qsgd import exchanges as of_exchanges
from hvd_qsgd import feedback as of_feedback
from hvd_qsgd import kernels as of_kernels
from hvd_qsgd.errors import ConfigError
from hvd_qsgd.exchanges import Exchange
from hvd_qsgd.feedback import ErrorFeedback
from hvd_qsgd.kernels import KERNELS

#: A codec that sends the highest bytes of each value, and an exchange that adds up what is left of the values.
PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hvd_qsgd.codecs import Codec, Kernels
from hvd_qsgd.codecs.base import check_integer, combine
from hvd_qsgd.exchanges import Exchange
from hvd_qsgd.exchanges.base import AllReduce, Work, ring_bytes
from hvd_qsgd.feedback import ErrorFeedback


@dataclass(frozen=True)
class Short(Codec):
    """Sends the highest ``size`` bytes of each value."""

    size: int = 2
    name: ClassVar[str] = "short"

    def __post_init__(self):
        check_integer("Short", "size", self.size, 2, 4)

    @property
    def biased(self):
        return True

    def payload_size(self, length):
        return self.size * length

    def encode_into(self, x, out, key=0, first=0):
        out[: self.size * x.size] = x.view(np.uint8).reshape(-1, 4)[:, 4 - self.size :].reshape(-1)
        return self.size * x.size

    def decode_into(self, payload, out, mode="set"):
        self.check_payload(payload, out.size)
        values = np.zeros((out.size, 4), np.uint8)
        values[:, 4 - self.size :] = payload.reshape(-1, self.size)
        combine(out, values.view(np.float32).reshape(-1), mode)


@dataclass(frozen=True)
class ShortKernels(Kernels):
    codec: Short

    def encode_into(self, x, out, key=0, first=0):
        return self.codec.encode_into(x, out, key, first)

    def decode_into(self, payload, out, mode="set"):
        self.codec.decode_into(payload, out, mode)


class Remember(ErrorFeedback):
    name: ClassVar[str] = "remember"


def short_sum(job):
    message = np.concatenate([piece.x for piece in job.pieces])
    sums = yield AllReduce(f"{job.name}.sum", job.codec.decode(job.codec.encode(message), message.shape), "sum")
    job.wire_bytes += ring_bytes(sums.nbytes, job.ranks)
    at = 0
    for piece in job.pieces:
        kept = job.codec.decode(job.codec.encode(piece.x), piece.x.shape)
        if piece.keep_error:
            piece.x -= kept
        piece.out[...] = sums[at : at + len(piece.x)] / job.ranks
        at += len(piece.x)


SHORT_SUM = Exchange(
    short_sum,
    lambda codec, length, ranks: Work({"allreduce": ring_bytes(4 * length, ranks)}, encoded=length),
    lambda codec: isinstance(codec, Short),
    preference=9,
)
'''
ENTRY_POINTS = """
[hvd_qsgd.codecs]
short = shortened:Short

[hvd_qsgd.kernels]
numba.short = shortened:ShortKernels

[hvd_qsgd.feedback]
remember = shortened:Remember

[hvd_qsgd.exchanges]
short_sum = shortened:SHORT_SUM
"""
#: What a program does with the members of the package, whatever brings them.
USE = """
import numpy as np
from hvd_qsgd.codecs import codec_from_config
from hvd_qsgd.collectives.simulated import simulate
from hvd_qsgd.exchanges import Job, Piece, check_exchange, choose_exchange, exchanges_for, start_exchange
from hvd_qsgd.feedback import feedback_from_config
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.policies.rules import parse_codec

codec = codec_from_config({"codec": "short", "size": 3})
assert codec == parse_codec("short(3)") and codec_from_config(codec.config()) == codec
assert exchanges_for(codec) == ("short_sum", "allgather", "scatter_gather")
assert exchanges_for(hvd_qsgd.QSGD()) == ("allgather", "scatter_gather", "allreduce")
assert choose_exchange("by_ranks", codec, 4) == "short_sum"
kernels = kernels_for(codec, "numba")
assert type(kernels).__name__ == "ShortKernels"
x = np.random.default_rng(1).standard_normal((4, 100)).astype(np.float32)
kinds = [feedback_from_config({"feedback": "remember"}) for _ in x]
for exchange in exchanges_for(codec):
    check_exchange(exchange, codec)
    corrected = [kind.correct("w", part.copy(), 4) for kind, part in zip(kinds, x)]
    outs = [np.empty(100, np.float32) for _ in x]
    jobs = [
        Job("job", [Piece("w", one, out, keep_error=True)], kernels, rank, 4, lambda n, dtype: np.empty(n, dtype))
        for rank, (one, out) in enumerate(zip(corrected, outs))
    ]
    simulate([start_exchange(exchange, job) for job in jobs])
    assert all(out.tobytes() == outs[0].tobytes() for out in outs)
    assert np.allclose(outs[0], x.mean(0), atol=1e-3)
    for kind, one, out in zip(kinds, corrected, outs):
        assert 0 < abs(one).max() < 1e-2
        kind.keep("w", one, out)
print("used")
"""


def install(site: Path, entry_points: str = ENTRY_POINTS, source: str = PACKAGE, name: str = "shortened") -> Path:
    """Put a package where an interpreter with this search path finds it."""
    metadata = site / f"{name}-1.5.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    (site / f"{name}.py").write_text(source)
    return site


def run(site: Path, script: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import sys, hvd_qsgd\n{script}"]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )


def check_runs(site: Path, script: str) -> None:
    result = run(site, script)
    assert result.returncode == 0, result.stderr


def test_members_of_an_installed_package_are_used_like_those_of_this_one(tmp_path: Path) -> None:
    check_runs(install(tmp_path), USE)


def test_members_are_registered_by_a_program(tmp_path: Path) -> None:
    script = """
import shortened
from hvd_qsgd import codecs, exchanges, feedback, kernels

assert exchanges.exchanges_for(shortened.Short(3)) == ("allgather", "scatter_gather")
for _ in range(2):
    assert codecs.register(shortened.Short) is shortened.Short
    assert kernels.register("numba", "short", shortened.ShortKernels) is shortened.ShortKernels
    assert feedback.register(shortened.Remember) is shortened.Remember
    assert exchanges.register(shortened.SHORT_SUM) is shortened.SHORT_SUM
"""
    check_runs(install(tmp_path, ""), script + USE)


def test_packages_are_looked_for_only_when_a_name_is_not_known(tmp_path: Path) -> None:
    # Names are told without an import of the package.
    script = """
from hvd_qsgd import codecs, feedback
from hvd_qsgd.kernels import kernels_for
from hvd_qsgd.policies.rules import parse_codec
from hvd_qsgd.exchanges import check_exchange

codec = parse_codec("qsgd(8)")
codecs.codec_from_config(codec.config()), check_exchange("allgather", codec), kernels_for(codec, "numpy")
feedback.feedback_from_config({"feedback": "ef"})
assert "importlib.metadata" not in sys.modules
assert "short" in list(codecs.CODECS) and "short_sum" not in codecs.CODECS and "shortened" not in sys.modules
assert [codec.__name__ for codec in codecs.CODECS.values()][-1] == "Short" and "shortened" in sys.modules
"""
    check_runs(install(tmp_path), script)


CODEC = "[hvd_qsgd.codecs]\n"
LOOKED_UP = "hvd_qsgd.codec_from_config({'codec': 'short'})"


@pytest.mark.parametrize(
    ("entry_points", "source", "message"),
    [
        (
            f"{CODEC}short = shortened:Short\n",
            "import not_there",
            "The package shortened 1.5 cannot be loaded for its codec 'short' (shortened:Short): ModuleNotFoundError: "
            "No module named 'not_there'.",
        ),
        (f"{CODEC}short = shortened:Shrot\n", PACKAGE, "AttributeError: module 'shortened' has no attribute 'Shrot'."),
        (
            f"{CODEC}short = shortened:Remember\n",
            PACKAGE,
            "(shortened:Remember) as a codec 'short': it must be a class that derives from hvd_qsgd.codecs.base.Codec.",
        ),
        (
            f"{CODEC}short = shortened:Short\n",
            PACKAGE.replace('"short"', '"long"'),
            "as a codec 'short': its own name is 'long', and must be this one",
        ),
        (
            f"{CODEC}qsgd = shortened:Short\n",
            PACKAGE,
            "The package shortened 1.5 offers a codec 'qsgd' (shortened:Short), but the name belongs to hvd_qsgd "
            "itself. Uninstall one of them.",
        ),
    ],
    ids=["no import", "no attribute", "another kind", "another name", "a name of this package"],
)
def test_a_package_that_cannot_work_is_named(tmp_path: Path, entry_points: str, source: str, message: str) -> None:
    site = install(tmp_path, entry_points, source)
    result = run(site, LOOKED_UP)
    assert result.returncode == 1 and "SetupError: The package shortened 1.5 " in result.stderr
    assert message in result.stderr
    check_runs(site, "hvd_qsgd.codec_from_config({'codec': 'qsgd'})")


def test_two_packages_with_one_name_are_named(tmp_path: Path) -> None:
    entry_points = f"{CODEC}short = shortened:Short\n"
    install(install(tmp_path, entry_points), entry_points, name="longer")
    result = run(tmp_path, LOOKED_UP)
    assert "but the name belongs to " in result.stderr
    assert "longer 1.5" in result.stderr and "shortened 1.5" in result.stderr


def test_what_cannot_be_registered_is_refused() -> None:
    class Other(QSGD):
        name = "qsgd"

    class Feedback(ErrorFeedback):
        name = "two words"

    class Half(Codec):
        name = "half"

    steps = type("Steps", (), {"__name__": "auto"})()
    with pytest.raises(ConfigError, match="codec 'qsgd': the name belongs to <class "):
        of_codecs.register(Other)
    with pytest.raises(ConfigError, match="it must have decode_into, encode_into, payload_size"):
        of_codecs.register(Half)
    with pytest.raises(ConfigError, match="its own name is 'two words', and must be this one, of letters"):
        of_feedback.register(Feedback)
    with pytest.raises(ConfigError, match=r"derives from hvd_qsgd\.feedback\.base\.Feedback"):
        of_feedback.register(Half)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"it must be an instance of hvd_qsgd\.exchanges\.Exchange"):
        of_exchanges.register(steps)
    with pytest.raises(ConfigError, match="exchange 'auto': the name belongs to hvd_qsgd itself"):
        of_exchanges.register(Exchange(steps, lambda *_: None, bool))  # type: ignore[arg-type, return-value]
    assert "qsgd" in KERNELS["numba"]
    with pytest.raises(ConfigError, match=r"kernels class 'numba\.qsgd': the name belongs to hvd_qsgd itself"):
        of_kernels.register("numba", "qsgd", QSGD)
    with pytest.raises(ConfigError, match='must be a backend other than "numpy", a dot, and the name'):
        of_kernels.register("numpy", "half", QSGD)
