"""Several hosts on one Linux machine, for honest multi-host runs of Horovod without a second computer.

Every host is a network namespace with its own interface ``eth0``, its own address, host name and ssh server.
All hosts hang on one bridge, and a token bucket on both ends of each cable limits them to a link rate::

    with EmulatedCluster(hosts=2, rate="1gbit") as cluster:
        result = cluster.run([sys.executable, "train.py"], launcher="mpi")
        print(result.stdout, cluster.bytes_sent())

``run`` is a real multi-host ``horovodrun`` or ``mpirun`` over ssh. It starts in one more namespace, the launcher, whose
link is not limited and whose traffic is not counted, so that all hosts are equally remote. The hosts share the file
system and the processors of this machine: the bytes are real, the time for computing is not that of a cluster.

Hosts can fail while a program runs (``disconnect``, ``kill``), and links can differ (``limit``).

The byte counters are those of the kernel. Large TCP segments pass a virtual cable in one piece, so they count
their headers once and the numbers are a few per cent below those of a physical wire.

Needs Linux, root, iproute2, util-linux and OpenSSH; ``EmulatedCluster.unavailable()`` tells what is missing.
The same from the command line::

    python benchmarks/emulated_cluster.py --hosts 2 --rate 1gbit --launcher mpi -- python train.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from namespaces import (
    INTERFACE,
    PREFIX,
    TOOLS,
    ClusterError,
    acquire_lock,
    add_namespace,
    call,
    find_tool,
    kill_processes,
    limit_link,
    remove_leftovers,
    tail,
    tool_environment,
)
from ssh_servers import SSHD_RUNTIME_DIRECTORY, await_login, start_server, write_ssh_files

BRIDGE = f"{PREFIX}bridge"
LAUNCHER = f"{PREFIX}launcher"

LAUNCHERS = ("mpi", "gloo", "mpirun")
MAX_HOSTS = 200
LAUNCHER_NUMBER = 253
BRIDGE_NUMBER = 254

# Runs in a namespace that vanishes with the shell, so that a check leaves nothing behind.
KERNEL_CHECK = """\
ip link add {bridge} type bridge &&
ip link add probe0 type veth peer name probe1 &&
tc qdisc add dev probe0 root tbf rate 1gbit burst 512kb latency 100ms
"""


class EmulatedCluster:
    """A context manager that builds the hosts on entry and removes every trace of them on exit.

    What a killed earlier process left behind is removed on entry. One cluster can exist at a time.

    Args:
        hosts: Number of hosts.
        rate: Speed of each host's link in both directions, as ``tc`` writes it ("1gbit", "200mbit"); None is unlimited.
        burst: Bytes that may pass at full speed before the limit applies, as ``tc`` writes it.
        latency: Longest time that a packet may wait in the queue before it is dropped, as ``tc`` writes it.
        subnet: The first three numbers of the addresses; hosts are .1, .2 and so on, the bridge is .254.
    """

    def __init__(
        self,
        hosts: int = 2,
        *,
        rate: str | None = "1gbit",
        burst: str = "512kb",
        latency: str = "100ms",
        subnet: str = "10.77.0",
    ) -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ClusterError(f"hosts={hosts} cannot work: a cluster has 1 to {MAX_HOSTS} hosts.")
        self.rate, self.burst, self.latency, self.subnet = rate, burst, latency, subnet
        self.addresses = [f"{subnet}.{number}" for number in range(1, hosts + 1)]
        self._names = [f"{PREFIX}host{number}" for number in range(1, hosts + 1)]
        self._servers: list[subprocess.Popen[bytes]] = []
        self._lock: socket.socket | None = None
        self._directory = Path()
        self._made_runtime_directory = False

    @staticmethod
    def unavailable() -> str | None:
        """Why no cluster can be built here, in one sentence, or None if one can."""
        if not sys.platform.startswith("linux"):
            return f"network namespaces exist on Linux only, and this is {sys.platform}"
        if os.geteuid() != 0:
            return "building network namespaces needs root; run as root or in a privileged container"
        for tool, package in TOOLS.items():
            if find_tool(tool) is None:
                return f"{tool} was not found; install the package {package}"
        check = ["unshare", "--net", "sh", "-c", KERNEL_CHECK.format(bridge=BRIDGE)]
        result = subprocess.run(check, check=False, capture_output=True, text=True, env=tool_environment())
        if result.returncode:
            return f"the kernel refuses namespaces, bridges, veth or tbf: {result.stderr.strip()}"
        return None

    def __enter__(self) -> EmulatedCluster:
        if reason := self.unavailable():
            raise ClusterError(f"No emulated cluster can be built: {reason}.")
        self._lock = acquire_lock()
        try:
            remove_leftovers()
            self._check_subnet_is_free()
            self._directory = Path(tempfile.mkdtemp(prefix=PREFIX))
            write_ssh_files(self._directory, self.subnet)
            self._write_hosts_file()
            self._build_network()
            self._start_servers()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def run(
        self,
        command: Sequence[str],
        *,
        launcher: str = "mpi",
        processes: int | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        capture: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on all hosts with ``horovodrun`` or ``mpirun`` and wait for it.

        Nothing that the command started is left running afterwards, however it ends.

        Args:
            command: Program and arguments; ``python`` is the interpreter of the current environment.
            launcher: "mpi" or "gloo", which are those of ``horovodrun``, or "mpirun", which is called directly.
            processes: Number of processes, filled up host by host; one per host by default.
            environment: Variables for launcher and processes, on top of those of the current process.
            timeout: Seconds until everything is killed.
            capture: Whether the result holds stdout and stderr; otherwise they are passed through.

        Raises:
            ClusterError: the launcher is unknown or missing, or the time is over.
        """
        if self._lock is None:
            raise ClusterError("The cluster is not running: use it inside `with EmulatedCluster(...) as cluster:`.")
        arguments = self._launch_command(command, launcher, processes or len(self.addresses))
        outputs = [self._directory / "stdout", self._directory / "stderr"]
        # Files instead of pipes: no reader that can block, and a run that hangs has its output too.
        with outputs[0].open("wb") as stdout, outputs[1].open("wb") as stderr:
            process = subprocess.Popen(
                ["ip", "netns", "exec", LAUNCHER, *arguments],
                env=self._launch_environment(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=stdout if capture else None,
                stderr=stderr if capture else None,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                output = "\n".join(tail(path) for path in outputs)
                raise ClusterError(
                    f"`{shlex.join(command)}` did not end within {timeout} s and was killed. "
                    f"Raise the timeout, or see what it was doing:\n{output}"
                ) from None
            finally:
                self._end_run(process)
        texts = [path.read_text(errors="replace") if capture else "" for path in outputs]
        return subprocess.CompletedProcess(arguments, process.returncode, *texts)

    def bytes_sent(self) -> list[int]:
        """Bytes that each host has sent over its link since the cluster was built."""
        return [self._counter(name, "tx_bytes") for name in self._names]

    def bytes_received(self) -> list[int]:
        """Bytes that each host has received over its link since the cluster was built."""
        return [self._counter(name, "rx_bytes") for name in self._names]

    def limit(self, host: int, rate: str) -> None:
        """Give one host, counted from 0, a link of another rate in both directions."""
        limit_link(self._names[host], "replace", rate, self.burst, self.latency)

    def disconnect(self, host: int) -> None:
        """Pull the cable of a host, counted from 0: it goes on, but nothing reaches it and nothing comes from it."""
        call("ip", "link", "set", self._names[host], "down")

    def kill(self, host: int) -> None:
        """Kill all that runs on a host, counted from 0, and its ssh server; its kernel closes their connections."""
        kill_processes(self._names[host])

    def _counter(self, name: str, counter: str) -> int:
        return int(call("ip", "netns", "exec", name, "cat", f"/sys/class/net/{INTERFACE}/statistics/{counter}"))

    def _check_subnet_is_free(self) -> None:
        for line in call("ip", "-oneline", "-4", "address").splitlines():
            if f" {self.subnet}." in line:
                raise ClusterError(
                    f"The subnet {self.subnet}.0/24 is in use on this machine by interface {line.split()[1]}. "
                    "Choose another one with subnet=."
                )

    def _build_network(self) -> None:
        # The bridge has an address so that a driver outside of the cluster can reach the hosts.
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "address", "add", f"{self.subnet}.{BRIDGE_NUMBER}/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")
        add_namespace(LAUNCHER, f"{self.subnet}.{LAUNCHER_NUMBER}", BRIDGE)
        for name, address in zip(self._names, self.addresses, strict=True):
            add_namespace(name, address, BRIDGE)
            if self.rate is not None:
                limit_link(name, "add", self.rate, self.burst, self.latency)

    def _start_servers(self) -> None:
        if not SSHD_RUNTIME_DIRECTORY.exists():
            SSHD_RUNTIME_DIRECTORY.mkdir(mode=0o755)
            self._made_runtime_directory = True
        for name in self._names:
            self._servers.append(start_server(self._directory, name))
        for name, address, server in zip(self._names, self.addresses, self._servers, strict=True):
            await_login(self._directory, LAUNCHER, name, address, server)

    def _write_hosts_file(self) -> None:
        cluster = [f"{address} {name}" for address, name in zip(self.addresses, self._names, strict=True)]
        (self._directory / "hosts").write_text("\n".join([*cluster, Path("/etc/hosts").read_text()]))

    def _launch_command(self, command: Sequence[str], launcher: str, processes: int) -> list[str]:
        if launcher not in LAUNCHERS:
            raise ClusterError(f"launcher={launcher!r} is unknown. Choose one of {', '.join(LAUNCHERS)}.")
        slots = -(-processes // len(self.addresses))
        hosts = ",".join(f"{address}:{slots}" for address in self.addresses)
        if launcher == "mpirun":
            return [*self._mpirun(processes, hosts), *command]
        horovodrun = Path(sys.prefix, "bin", "horovodrun")
        if not horovodrun.exists():
            raise ClusterError(f"{horovodrun} does not exist. Install Horovod into the environment {sys.prefix}.")
        arguments = [str(horovodrun), f"--{launcher}", "-np", str(processes), "-H", hosts]
        # The cache of successful ssh checks would vouch for hosts of an earlier cluster.
        arguments += ["--disable-cache", "--network-interface", INTERFACE]
        if launcher == "mpi" and _has_own_mpi():
            # Tells ssh where a host finds Open MPI's daemon, which is not on the path of a login shell.
            arguments.append(f"--mpi-args=--prefix {shlex.quote(sys.prefix)}")
        return [*arguments, *command]

    def _mpirun(self, processes: int, hosts: str) -> list[str]:
        """As in Horovod's documentation; Open MPI hands no variables to remote hosts but those that are named."""
        arguments = ["mpirun", "-np", str(processes), "--host", hosts, "--bind-to", "none", "--map-by", "slot"]
        arguments += ["--mca", "pml", "ob1", "--mca", "btl", "^openib", "--mca", "btl_tcp_if_include", INTERFACE]
        arguments += ["--mca", "oob_tcp_if_include", INTERFACE]
        for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS"):
            arguments += ["-x", name]
        return arguments + (["--prefix", sys.prefix, "-x", "OPAL_PREFIX"] if _has_own_mpi() else [])

    def _launch_environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        environment = dict(os.environ)
        environment |= {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            # A killed run leaves its session files here, where they are removed with the cluster.
            "OMPI_MCA_orte_tmpdir_base": str(self._directory),
        }
        if _has_own_mpi():
            environment["OPAL_PREFIX"] = sys.prefix
        environment |= extra
        # horovodrun hands all variables, PYTHONPATH among them, to the processes on the hosts.
        paths = [str(self._directory / "bin"), str(Path(sys.prefix, "bin")), tool_environment(environment)["PATH"]]
        return environment | {"PATH": os.pathsep.join(paths)}

    def _end_run(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        servers = {server.pid for server in self._servers}
        # horovodrun and ssh start sessions of their own, which the process group does not reach.
        for name in (LAUNCHER, *self._names):
            kill_processes(name, spare=servers)
        process.wait()

    def _tear_down(self) -> None:
        for server in self._servers:
            server.kill()
            server.wait()
        self._servers.clear()
        remove_leftovers()
        if self._made_runtime_directory:
            with contextlib.suppress(OSError):
                SSHD_RUNTIME_DIRECTORY.rmdir()
            self._made_runtime_directory = False
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _has_own_mpi() -> bool:
    """Whether Open MPI is a package of this Python environment, rather than of the system."""
    return Path(sys.prefix, "bin", "mpirun").exists()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a command with horovodrun on several emulated hosts, and print the bytes that each one sent.",
        epilog="Example: %(prog)s --hosts 2 --rate 1gbit --launcher mpi -- python train.py --epochs 1",
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (default: %(default)s)")
    parser.add_argument("--rate", default="1gbit", help="link speed as tc writes it, or 'none' (default: %(default)s)")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="mpi", help="default: %(default)s")
    parser.add_argument("--processes", type=int, help="number of processes (default: one per host)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="program and arguments, after --")
    return parser.parse_args()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    arguments = _parse_arguments()
    # The default action of SIGTERM would end the process without leaving the `with` block.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    rate = None if arguments.rate == "none" else arguments.rate
    try:
        with EmulatedCluster(arguments.hosts, rate=rate) as cluster:
            result = cluster.run(
                arguments.command,
                launcher=arguments.launcher,
                processes=arguments.processes,
                timeout=arguments.timeout,
                capture=False,
            )
            counters = zip(cluster.addresses, cluster.bytes_sent(), cluster.bytes_received(), strict=True)
            for address, sent, received in counters:
                print(f"{address} sent {sent} bytes, received {received} bytes")
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
