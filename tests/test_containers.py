"""The Dockerfiles: pinned, without root, whole; and the tool that carries them out without Docker."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pathspec
import pytest
from dockerfile_parse import DockerfileParser
from launch import ROOT

BIN = Path(sys.executable).parent
FILES = ["Dockerfile", "Dockerfile.gpu"]


def steps_of(name: str) -> list[tuple[str, str]]:
    structure = DockerfileParser(fileobj=(ROOT / name).open("rb")).structure
    return [(step["instruction"].upper(), step["value"]) for step in structure if step["instruction"] != "COMMENT"]


def stages_of(name: str) -> dict[str, list[tuple[str, str]]]:
    stages: dict[str, list[tuple[str, str]]] = {}
    for step in steps_of(name):
        if step[0] == "FROM":
            stages[step[1].split()[-1]] = []
        list(stages.values())[-1].append(step)
    return stages


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_dockerfile", ROOT / "tools" / "run_dockerfile.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_dockerfile"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_hadolint(name: str, tmp_path: Path) -> None:
    assert subprocess.run([BIN / "hadolint", ROOT / name], check=False).returncode == 0
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM debian\nRUN cd /tmp\n")
    assert subprocess.run([BIN / "hadolint", broken], check=False, capture_output=True).returncode != 0


@pytest.mark.parametrize("name", FILES)
def test_everything_is_pinned(name: str) -> None:
    stages = stages_of(name)
    for _, value in (step for steps in stages.values() for step in steps if step[0] == "FROM"):
        base = value.split()[0]
        assert base in stages or re.fullmatch(r"[\w/]+:[a-z]+-\d{8}-slim(@sha256:[0-9a-f]{64})?", base), base
    build = stages["build"]
    assert any(step == "ENV" and "PIP_CONSTRAINT=/build/requirements/development.txt" in value for step, value in build)
    installs = [i for i, (step, value) in enumerate(build) if step == "RUN" and "pip install" in value]
    constraint = next(i for i, (_, value) in enumerate(build) if "PIP_CONSTRAINT" in value)
    assert installs and constraint < min(installs)


@pytest.mark.parametrize("name", FILES)
def test_the_image_runs_without_root_and_is_watched(name: str) -> None:
    *_, (last, final) = stages_of(name).items()
    assert last == "runtime"
    users = [value for step, value in final if step == "USER"]
    assert users and users[-1] == "1000"
    assert all(step not in ("RUN", "COPY") for step, _ in final[final.index(("USER", "1000")) :])
    health = [value for step, value in final if step == "HEALTHCHECK"]
    assert len(health) == 1 and '["hvd-qsgd", "doctor"]' in health[0]
    assert "gcc" not in " ".join(value for _, value in final + stages_of(name)["base"])


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".dockerignore").read_text().splitlines())
    sources = []
    for step, value in steps_of(name):
        if step == "COPY" and "--from=" not in value:
            sources += [word for word in value.split() if not word.startswith("--")][:-1]
    assert len(sources) > 5
    for source in sources:
        path = ROOT / source
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in (".py", ".md")]
        assert files, f"{source} does not exist"
        assert not [file for file in files if ignored.match_file(str(file.relative_to(ROOT)))], source
    assert ignored.match_file(".git/config") and ignored.match_file(".venv/bin/python")


def test_the_stage_of_tests_has_what_they_import() -> None:
    steps = stages_of("Dockerfile")["test"]
    copied = {value.split()[-1] for step, value in steps if step == "COPY"}
    (command,) = (json.loads(value) for step, value in steps if step == "CMD")
    files = [ROOT / word for word in command if word.startswith("tests/")]
    needed = {folder for file in files for folder in re.findall(r'ROOT / "(\w+)"', file.read_text())}
    assert len(files) > 2 and {"tests", "tools"} <= needed | {"tests"} <= copied


def test_both_images_run_alike() -> None:
    cpu, gpu = (stages_of(name)["runtime"] for name in FILES)
    assert cpu == [step for step in gpu if not (step[0] == "ENV" and "NVIDIA_VISIBLE_DEVICES" in step[1])]
    assert stages_of(FILES[0])["base"] == stages_of(FILES[1])["base"]
    build = " ".join(value for _, value in stages_of("Dockerfile.gpu")["build"])
    assert "HOROVOD_NCCL_HOME=$NVIDIA/nccl" in build and "install(gpu=True)" in build


def test_the_ssh_server_and_the_image_agree() -> None:
    server = dict(
        line.split(None, 1)
        for line in (ROOT / "deploy/container/sshd_config").read_text().splitlines()
        if line and not line.startswith("#")
    )
    final = stages_of("Dockerfile")["runtime"]
    assert ("EXPOSE", server["Port"]) in final
    assert server["PasswordAuthentication"] == "no" and server["PermitRootLogin"] == "no"
    path = next(value for step, value in stages_of("Dockerfile")["base"] if step == "ENV")
    assert server["SetEnv"] == path
    assert re.search(rf"Port {server['Port']}\b", (ROOT / "deploy/container/ssh_config").read_text())


# -- the tool -----------------------------------------------------------------------------------------

SMALL = """
FROM debian:bookworm-1-slim AS base
ARG GREETING=hello
ENV WORD=$GREETING PLACE=/srv
WORKDIR $PLACE
COPY a.txt folder ./
FROM base AS unused
RUN false
FROM base
USER user
COPY --from=base --chmod=640 /srv/a.txt /srv/copy/
CMD ["cat", "a.txt"]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory where debootstrap has been already, and a context to build from."""
    image = tmp_path / "work" / "debian-bookworm"
    (image / "etc").mkdir(parents=True)
    (image / "etc" / "passwd").write_text(
        f"root:x:0:0::/root:/bin/sh\nuser:x:{os.getuid()}:{os.getgid()}::/h:/bin/sh\n"
    )
    (tmp_path / "work" / "debian-bookworm.done").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "Dockerfile").write_text(SMALL)
    return tmp_path


@pytest.mark.skipif(os.getuid() != 0, reason="gives files to users")
def test_instructions_mean_what_they_mean_to_docker(tool: ModuleType, root: Path) -> None:
    builder = tool.Builder(root / "Dockerfile", root / "work", build_args={"GREETING": "servus"})
    stage = builder.build()
    assert stage.env["WORD"] == "servus" and stage.workdir == "/srv" and stage.user == "user"
    assert stage.cmd == ["cat", "a.txt"]
    assert (stage.root / "srv/a.txt").read_text() == "a" and (stage.root / "srv/inner/b.txt").read_text() == "b"
    assert (stage.root / "srv/copy/a.txt").stat().st_mode & 0o777 == 0o640
    assert not (root / "work" / "unused").exists()
    # What is finished is not built again.
    (root / "a.txt").unlink()
    again = tool.Builder(root / "Dockerfile", root / "work").build()
    assert again == tool.replace(stage, env=again.env, args=again.args)


def test_what_it_cannot_do_is_an_error(tool: ModuleType, root: Path) -> None:
    (root / "Dockerfile").write_text("FROM alpine:3\n")
    with pytest.raises(SystemExit, match="FROM alpine:3 cannot be made by debootstrap"):
        tool.Builder(root / "Dockerfile", root / "work").build()


def test_it_knows_every_instruction_of_the_dockerfiles(tool: ModuleType) -> None:
    used = {step for name in FILES for step, _ in steps_of(name)} - {"FROM"} - tool.PASSED_OVER
    assert used and all(hasattr(tool.Builder, f"_{step.lower()}") for step in used)
    assert all(json.loads(value) for name in FILES for step, value in steps_of(name) if step == "CMD")
