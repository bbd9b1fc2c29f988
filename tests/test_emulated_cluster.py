"""The emulated cluster leaves nothing behind, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from emulated_cluster import PREFIX, ClusterError, EmulatedCluster  # noqa: E402

UNAVAILABLE = EmulatedCluster.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"no emulated cluster: {UNAVAILABLE}")

BUILD_AND_WAIT = """\
import time
from emulated_cluster import EmulatedCluster
with EmulatedCluster():
    print("built", flush=True)
    time.sleep(600)
"""


def traces() -> list[str]:
    directories = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")]
    commands = [["ip", "netns", "list"], ["ip", "-oneline", "link"], ["ps", "-C", "sshd", "-o", "args="]]
    outputs = [subprocess.run(command, check=False, capture_output=True, text=True).stdout for command in commands]
    return directories + [line for output in outputs for line in output.splitlines() if PREFIX in line]


def test_an_exception_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), EmulatedCluster(hosts=3) as cluster:
        assert len(cluster.bytes_sent()) == len(cluster.bytes_received()) == 3
        assert traces()
        1 / 0  # noqa: B018
    assert not traces()


def test_what_a_killed_process_left_is_removed() -> None:
    command = [sys.executable, "-c", BUILD_AND_WAIT]
    with subprocess.Popen(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "built\n"
        with pytest.raises(ClusterError, match="Another emulated cluster"), EmulatedCluster():
            pass
        process.send_signal(signal.SIGKILL)
    assert traces()
    with EmulatedCluster():
        pass
    assert not traces()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"hosts": 0}, "1 to"), ({"rate": "quick"}, "Check rate"), ({"subnet": "127.0.0"}, "Choose another")],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ClusterError, match=message), EmulatedCluster(**arguments):
        pass
    assert not traces()
