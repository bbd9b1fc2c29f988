"""Network namespaces and the cables between them: the system calls of :mod:`emulated_cluster`."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

#: Every namespace, link and temporary directory starts with this. What carries it and is not in use is removed.
PREFIX = "hvdq-"
INTERFACE = "eth0"

#: Gloo can stall for seconds over a loopback interface with the default MTU of 65536.
LOOPBACK_MTU = 9000
#: How long a started ssh server may take to accept a login, and killed processes to vanish.
PATIENCE_S = 10.0

#: Programs that are called, and the packages (of Debian) that bring them.
TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "mount": "mount",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}


class ClusterError(RuntimeError):
    """The emulated cluster cannot be built or used. The message says what failed, why, and what to do."""


def tool_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment with the administrators' directories on the path, which a shell of root may lack."""
    variables = dict(os.environ if environment is None else environment)
    return variables | {"PATH": os.pathsep.join([variables.get("PATH", os.defpath), "/usr/sbin", "/sbin"])}


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=tool_environment()["PATH"])


def call(*command: str, remedy: str = "", check: bool = True) -> str:
    """Output of a command, which has to succeed unless told otherwise."""
    result = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=tool_environment()
    )
    if check and result.returncode:
        raise ClusterError(f"`{shlex.join(command)}` failed: {result.stderr.strip()} {remedy}".rstrip())
    return result.stdout


def acquire_lock() -> socket.socket:
    """Claim the machine for one cluster; the kernel releases the claim when the process ends, however it ends."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        # A leading zero byte makes a name without a file.
        lock.bind(f"\0{PREFIX}emulated-cluster")
    except OSError:
        lock.close()
        raise ClusterError(
            "Another emulated cluster is running on this machine, and their names would clash. Wait until it has ended."
        ) from None
    return lock


def namespaces() -> list[str]:
    lines = call("ip", "netns", "list", check=False).splitlines()
    return [line.split()[0] for line in lines if line.startswith(PREFIX)]


def links() -> list[str]:
    # A line reads "7: name@peer: <flags> ...".
    lines = call("ip", "-oneline", "link", check=False).splitlines()
    names = [line.split(": ")[1].split("@")[0] for line in lines]
    return [name for name in names if name.startswith(PREFIX)]


def kill_processes(namespace: str, *, spare: Collection[int] = ()) -> None:
    """Kill all processes in a namespace of ours, and wait until they are gone."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        pids = call("ip", "netns", "pids", namespace, check=False).split()
        alive = {int(pid) for pid in pids}.difference(spare)
        if not alive:
            return
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def remove_leftovers() -> None:
    """Remove everything that carries the prefix; a step that fails does not keep the others from happening."""
    for name in namespaces():
        kill_processes(name)
    for name in links():
        call("ip", "link", "delete", name, check=False)
    for name in namespaces():
        call("ip", "netns", "delete", name, check=False)
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Another user can put a directory of that name there, and it is not ours to remove.
        if directory.lstat().st_uid == os.geteuid():
            shutil.rmtree(directory, ignore_errors=True)


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def add_namespace(name: str, address: str, bridge: str) -> None:
    """A host: a namespace with an address, on a cable of the same name to the bridge."""
    call("ip", "netns", "add", name)
    call("ip", "link", "add", name, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    call("ip", "link", "set", name, "master", bridge, "up")
    call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
    call("ip", "-n", name, "link", "set", INTERFACE, "up")
    call("ip", "-n", name, "link", "set", "lo", "mtu", str(LOOPBACK_MTU), "up")


def limit_link(name: str, how: str, rate: str, burst: str, latency: str) -> None:
    """A token bucket on both ends of a host's cable; ``how`` is "add" or "replace"."""
    bucket = ["root", "tbf", "rate", rate, "burst", burst, "latency", latency]
    for prefix, device in (([], name), (["ip", "netns", "exec", name], INTERFACE)):
        command = [*prefix, "tc", "qdisc", how, "dev", device, *bucket]
        call(*command, remedy="Check rate, burst and latency: see `man tc-tbf`.")
