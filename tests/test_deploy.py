"""deploy/: manifests fit their schemas, scripts do what they say with stand-ins for the cluster's programs."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from launch import ROOT

BIN = Path(sys.executable).parent
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.31"
JOBS = ["mpijob.yaml", "mpijob-gpu.yaml"]
SCRIPTS = [*DEPLOY.glob("slurm/*.sbatch"), DEPLOY / "container/serve-ssh"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_every_recipe_is_explained() -> None:
    folders = [folder for folder in DEPLOY.iterdir() if folder.is_dir()]
    assert len(folders) >= 4
    for folder in folders:
        text = (folder / "README.md").read_text()
        others = [file for file in folder.iterdir() if file.name != "README.md"]
        # The files of the image are explained by what they do.
        assert folder.name == "container" or all(file.name in text for file in others), folder


def recommended() -> dict[str, str]:
    """What docs/clusters.md says to set, so that a lost host ends the job."""
    section = (ROOT / "docs/clusters.md").read_text().partition("### A host that is lost")[2].partition("\n## ")[0]
    return dict(re.findall(r"\b((?:OMPI_MCA|HOROVOD)_\w+)=(\d+)", section))


def of_mpi(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if "GLOO" not in name}


def test_settings_against_lost_hosts_are_found_in_the_docs() -> None:
    assert {name.split("_")[0] for name in recommended()} == {"OMPI", "HOROVOD"} and len(recommended()) == 6


# -- Kubernetes ---------------------------------------------------------------------------------------


def check_mpijob(job: Any) -> None:
    """As the operator's definition and its controller would."""
    jsonschema.validate(job, json.loads((ROOT / "tests" / "mpijob_schema.json").read_text()))
    last = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] - 1
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", f"{job['metadata']['name']}-worker-{last}")
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}}
        kubernetes_validate.validate({**pod, "spec": replica["template"]["spec"]}, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_mpijob(name: str) -> None:
    check_mpijob(load(DEPLOY / "kubeflow" / name))


WORKER = "spec mpiReplicaSpecs Worker"


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("apiVersion", "kubeflow.org/v1"),
        ("metadata name", "x" * 55),
        # Of the operator's first drafts, and of none that was released.
        ("spec waitForWorkers", True),
        ("spec launcherCreationPolicy", "WaitForWorkers"),
        ("spec runPolicy cleanPodPolicy", "Never"),
        ("spec runPolicy schedulingPolicy", {"minMember": 3}),
        ("spec mpiReplicaSpecs Launcher replicas", 2),
        (f"{WORKER} replicas", 0),
        # The definition takes any word here, the controller two.
        (f"{WORKER} restartPolicy", "ExitCode"),
        (f"{WORKER} template spec container", []),
        (f"{WORKER} template spec containers", []),
    ],
)
def test_wrong_mpijobs_are_found(where: str, wrong: object) -> None:
    job = load(DEPLOY / "kubeflow" / "mpijob.yaml")
    *path, last = where.split()
    functools.reduce(lambda part, key: part.setdefault(key, {}), path, job)[last] = wrong
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        check_mpijob(job)


@pytest.mark.parametrize("name", JOBS)
def test_mpijob_fits_together_and_to_the_image(name: str) -> None:
    spec = load(DEPLOY / "kubeflow" / name)["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
    (start,) = launcher["template"]["spec"]["containers"]
    (serve,) = worker["template"]["spec"]["containers"]
    ranks = int(start["args"][start["args"].index("-np") + 1])
    assert ranks <= spec["slotsPerWorker"] * worker["replicas"]
    assert start["image"] == serve["image"]
    assert spec["sshAuthMountPath"] + "/authorized_keys" in (DEPLOY / "container/sshd_config").read_text()
    assert serve["command"] == ["serve-ssh"] and serve["ports"][0]["containerPort"] == 2222
    assert (ROOT / start["args"][start["args"].index("python") + 1]).exists()
    for container in (start, serve):
        assert container["securityContext"]["runAsNonRoot"] and container["resources"]["limits"]["memory"]
    assert ("gpu" in name) == ("nvidia.com/gpu" in serve["resources"]["limits"])
    # Before the program, or they would be its own.
    options = " ".join(start["args"][: start["args"].index("python")])
    for setting, value in of_mpi(recommended()).items():
        mca = setting.removeprefix("OMPI_MCA_")
        assert (f"--mca {mca} {value}" if mca != setting else f"-x {setting}={value}") in options


# -- Docker Compose -----------------------------------------------------------------------------------


def test_compose(tmp_path: Path) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = DEPLOY / "compose" / "compose.yaml"
    subprocess.run([*command, file], check=True, capture_output=True)
    broken = tmp_path / "compose.yaml"
    broken.write_text(file.read_text().replace("shm_size", "shm_sizes"))
    assert subprocess.run([*command, broken], check=False, capture_output=True).returncode != 0
    services = load(file)["services"]
    hosts = services["launcher"]["command"][services["launcher"]["command"].index("-H") + 1]
    assert {host.split(":")[0] for host in hosts.split(",")} <= set(services)
    build = services["keys"]["build"]
    assert (file.parent / build["context"] / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert recommended().items() <= services["launcher"]["environment"].items()


# -- scripts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [*SCRIPTS, ROOT / "tools/setup_environment.sh", ROOT / ".ci/run"], ids=lambda p: p.name
)
def test_shellcheck(script: Path) -> None:
    checked = subprocess.run(
        [BIN / "shellcheck", "--severity=warning", script], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """An environment as inside of a job: stand-ins for Slurm's programs print how they were called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "mpirun"):
        program = programs / name
        program.write_text(
            f'#!/bin/sh\n[ "$1" = --mpi=list ] && echo "$SRUN_MPI" && exit\nenv >{tmp_path}/seen\necho {name} "$@"\n'
        )
        program.chmod(0o755)
    environment = tmp_path / "job" / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)
    return {
        "PATH": f"{programs}:{os.defpath}",
        "SLURM_SUBMIT_DIR": str(tmp_path / "job"),
        "SLURM_NTASKS": "4",
        "SLURM_CPUS_PER_TASK": "3",
        "SRUN_MPI": "none pmi2 pmix",
    }


def submit(script: str, allocation: dict[str, str], *arguments: str) -> tuple[int, str]:
    command = ["bash", str(DEPLOY / "slurm" / script), *arguments]
    done = subprocess.run(command, env=allocation, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_srun_starts_the_ranks(allocation: dict[str, str]) -> None:
    status, output = submit("srun.sbatch", allocation, "train.py", "--epochs", "two words")
    assert status == 0
    assert output.split()[:2] == ["srun", "--mpi=pmix"] and output.endswith("python train.py --epochs two words\n")
    assert "--kill-on-bad-exit=1" in output and "--cpus-per-task=3" in output


def test_mpirun_starts_the_ranks(allocation: dict[str, str]) -> None:
    status, output = submit("mpirun.sbatch", {**allocation, "HVD_QSGD_INTERFACE": "ib0"}, "train.py")
    assert status == 0 and output.startswith("mpirun -np 4 ") and output.endswith("python train.py\n")
    assert "--mca btl_tcp_if_include ib0" in output and "--prefix" not in output
    # Open MPI from a Python package has to be told where it is.
    mpirun = Path(allocation["SLURM_SUBMIT_DIR"], ".venv/bin/mpirun")
    mpirun.symlink_to(Path(allocation["PATH"].split(":")[0], "mpirun"))
    status, output = submit("mpirun.sbatch", allocation, "train.py")
    assert status == 0 and f"--prefix {mpirun.parent.parent} -x OPAL_PREFIX" in output


def test_lost_hosts_end_the_job(allocation: dict[str, str], tmp_path: Path) -> None:
    def seen() -> set[str]:
        return set((tmp_path / "seen").read_text().splitlines())

    settings = of_mpi(recommended())
    output = submit("mpirun.sbatch", allocation, "train.py")[1]
    assert {f"{name}={value}" for name, value in settings.items()} <= seen()
    stalls = [name for name in settings if name.startswith("HOROVOD_")]
    assert stalls and all(f"-x {name} " in output for name in stalls)
    # With srun there are no daemons of Open MPI that could be lost.
    submit("srun.sbatch", {**allocation, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "7"}, "train.py")
    assert {"HOROVOD_STALL_CHECK_TIME_SECONDS=60", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=7"} <= seen()


@pytest.mark.parametrize("script", ["srun.sbatch", "mpirun.sbatch"])
def test_slurm_scripts_say_what_is_missing(script: str, allocation: dict[str, str]) -> None:
    assert submit(script, allocation) == (2, f"usage: sbatch {script} SCRIPT.py [ARGUMENT]...\n")
    status, output = submit(script, {**allocation, "HVD_QSGD_ENVIRONMENT": "/nowhere"}, "train.py")
    assert status == 1 and "set HVD_QSGD_ENVIRONMENT" in output


def test_srun_without_pmix_is_refused(allocation: dict[str, str]) -> None:
    status, output = submit("srun.sbatch", {**allocation, "SRUN_MPI": "none pmi2"}, "train.py")
    assert status == 1 and "use mpirun.sbatch" in output


def test_slurm_options_are_those_of_sbatch() -> None:
    known = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output"}
    for script in DEPLOY.glob("slurm/*.sbatch"):
        lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
        assert {line.split("--")[1].split("=")[0] for line in lines} == known
