"""The ssh servers of the hosts of :mod:`emulated_cluster`, which share the file system and know one key."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from namespaces import PATIENCE_S, ClusterError, call, find_tool, tail, tool_environment

SSHD_RUNTIME_DIRECTORY = Path("/run/sshd")

SSHD_CONFIG = """\
ListenAddress 0.0.0.0
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile none
# The keys lie below the world-writable temporary directory, in a directory that only root may enter.
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
LogLevel ERROR
"""

SSH_CONFIG = """\
User root
IdentityFile {directory}/user_key
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {directory}/known_hosts
GlobalKnownHostsFile /dev/null
UpdateHostKeys no
BatchMode yes
ConnectTimeout 5
LogLevel ERROR
"""

# horovodrun and Open MPI both call whatever `ssh` is first on PATH; their own options cannot name a known_hosts file.
SSH_WRAPPER = """\
#!/bin/sh
exec {ssh} -F {directory}/ssh_config "$@"
"""

# Each host has a name of its own that resolves to its own address. Open MPI keeps its files by host name and would mix
# those of several hosts. Gloo looks the name up where Horovod should tell it the interface (for process sets, the
# global one included): it connects to itself if the name means 127.0.0.1 and crashes if the name is unknown.
HOST_SCRIPT = """\
echo {name} > /proc/sys/kernel/hostname &&
mount --bind {directory}/hosts /etc/hosts &&
exec {sshd} -D -e -f {directory}/sshd_config
"""


def write_ssh_files(directory: Path, subnet: str) -> None:
    """Keys, settings and the ``ssh`` that uses them, for all hosts of a subnet."""
    for key in ("host_key", "user_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "emulated-cluster", "-f", str(directory / key))
    host_key = (directory / "host_key.pub").read_text()
    (directory / "known_hosts").write_text(f"{subnet}.* {host_key}")
    (directory / "sshd_config").write_text(SSHD_CONFIG.format(directory=directory))
    (directory / "ssh_config").write_text(SSH_CONFIG.format(directory=directory))
    wrapper = directory / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(SSH_WRAPPER.format(directory=directory, ssh=find_tool("ssh")))
    wrapper.chmod(0o755)


def start_server(directory: Path, name: str) -> subprocess.Popen[bytes]:
    """The ssh server of a host, which takes the host's name and sees the cluster's hosts file."""
    # Every program here replaces the one before, so the process id is that of the ssh server.
    script = HOST_SCRIPT.format(name=name, directory=directory, sshd=find_tool("sshd"))
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", script],
            env=tool_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def await_login(directory: Path, launcher: str, name: str, address: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the namespace ``launcher`` can log in; raise ClusterError if it cannot."""
    deadline = time.monotonic() + PATIENCE_S
    command = ["ip", "netns", "exec", launcher, str(directory / "bin" / "ssh"), address, "true"]
    while True:
        attempt = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if attempt.returncode == 0:
            return
        if server.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    log = tail(directory / f"{name}.log")
    raise ClusterError(
        f"The ssh server of {name} accepts no login: {attempt.stderr.strip()} {log}\n"
        "Common causes are a locked root account (`passwd -S root`), a login shell that fails, "
        "or a firewall that filters bridged packets."
    )
