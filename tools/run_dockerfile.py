"""Carry out a Dockerfile without Docker, in a directory, and run commands in the result.

    python tools/run_dockerfile.py /var/tmp/image --mirror http://MIRROR/debian -- python examples/demo.py

FROM becomes debootstrap, RUN a chroot in namespaces of its own; ARG, ENV, SHELL, USER, WORKDIR, COPY, CMD mean what
they mean to Docker. What says how a container is run (EXPOSE, HEALTHCHECK, LABEL) changes no file and is passed over.
It proves that the steps work, not that the image is the same: the base is the suite that the tag names, as it is today.

Stages are kept: a stage that is finished is not built again until its directory is removed. Needs Linux, root,
debootstrap and dockerfile-parse.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile_parse import DockerfileParser

PASSED_OVER = {"COMMENT", "EXPOSE", "HEALTHCHECK", "LABEL"}
#: Docker sets it where a Dockerfile does not.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What Docker's images of Debian have as well: no package may start a service.
POLICY = "#!/bin/sh\nexit 101\n"

# In a mount namespace of its own, so that no mount outlives the step, and a process namespace, so that no process does.
ENTER = """
set -e
root=$1; user=$2; directory=$3; shift 3
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
for bind in /etc/resolv.conf /etc/hosts $BINDS; do
    source=${bind%%:*}; place=$root${bind##*:}
    if [ -d "$source" ]; then mkdir -p "$place"; else mkdir -p "${place%/*}"; touch "$place"; fi
    mount --bind "$source" "$place"
done
exec chroot --userspec="$user" "$root" /usr/bin/env -i -C "$directory" "$@"
"""


@dataclass
class Stage:
    """A root directory, and what the instructions so far have set for the next ones."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    args: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "root"
    workdir: str = "/"
    cmd: list[str] = field(default_factory=list)

    def substitute(self, text: str) -> str:
        known = {**self.args, **self.env}
        return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: known.get(match[1] or match[2], ""), text)

    def inside(self, path: str) -> Path:
        return self.root / os.path.normpath(os.path.join(self.workdir, path)).lstrip("/")

    def ids(self, owner: str) -> tuple[int, int]:
        """Numbers of a user, as the stage's own /etc/passwd has them."""
        for line in (self.root / "etc/passwd").read_text().splitlines():
            name, _, uid, gid = line.split(":")[:4]
            if owner in (name, uid):
                return int(uid), int(gid)
        raise SystemExit(f"run_dockerfile: there is no user {owner!r} in {self.root}")

    def home(self) -> str:
        uid = str(self.ids(self.user)[0])
        lines = (self.root / "etc/passwd").read_text().splitlines()
        return next(line.split(":")[5] for line in lines if line.split(":")[2] == uid)


class Builder:
    """Builds the stages of one Dockerfile below ``directory``."""

    def __init__(
        self,
        dockerfile: Path,
        directory: Path,
        *,
        mirror: str | None = None,
        binds: list[str] | None = None,
        build_args: dict[str, str] | None = None,
    ) -> None:
        self.context = dockerfile.absolute().parent
        self.steps = DockerfileParser(fileobj=dockerfile.open("rb")).structure
        self.directory = directory
        self.mirror, self.binds, self.build_args = mirror, binds or [], build_args or {}
        self.stages: dict[str, Stage] = {}

    def build(self, target: str | None = None) -> Stage:
        """Carry out all stages that the target, by default the last, needs; return it."""
        split: list[tuple[str, str, list[tuple[str, str]]]] = []
        for step in self.steps:
            name, value = step["instruction"].upper(), step["value"]
            if name == "FROM":
                base, _, alias = re.fullmatch(r"(\S+)(\s+AS\s+(\S+))?", value, re.IGNORECASE).groups()  # type: ignore[union-attr]
                split.append((base, alias or f"stage{len(split)}", []))
            elif name not in PASSED_OVER:
                if not split:
                    raise SystemExit(f"run_dockerfile: {name} before FROM is not understood")
                split[-1][2].append((name, value))
        wanted = {target or split[-1][1]}
        for base, alias, steps in reversed(split):
            if alias in wanted:
                copied = (re.match(r"(?:--\S+\s+)*--from=(\S+)", value) for name, value in steps if name == "COPY")
                wanted |= {base, *(match[1] for match in copied if match)}
        for base, alias, steps in split:
            if alias in wanted:
                self.stages[alias] = self._stage(base, alias, steps)
        return self.stages[target or split[-1][1]]

    def _stage(self, base: str, alias: str, steps: list[tuple[str, str]]) -> Stage:
        done = self.directory / f"{alias}.done"
        root = self.directory / alias
        parent = self.stages.get(base) or Stage(self._debootstrap(base))
        stage = replace(parent, root=root, env=dict(parent.env), args={})
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)
            print(f"== {alias}: FROM {base}", flush=True)
            subprocess.run(["cp", "-a", "--reflink=auto", parent.root, root], check=True)
        for name, value in steps:
            changes_files = name in ("RUN", "COPY", "WORKDIR")
            if not done.exists():
                print(f"== {alias}: {name} {value}", flush=True)
            if not (changes_files and done.exists()):
                getattr(self, f"_{name.lower()}")(stage, value)
            elif name == "WORKDIR":
                stage.workdir = os.path.join(stage.workdir, stage.substitute(value))
        done.touch()
        return stage

    def _debootstrap(self, image: str) -> Path:
        match = re.fullmatch(r"debian:([a-z]+)[\w.-]*(@\S+)?", image)
        if not match:
            raise SystemExit(f"run_dockerfile: FROM {image} cannot be made by debootstrap, only debian:SUITE-... can")
        root = self.directory / f"debian-{match[1]}"
        done = root.with_suffix(".done")
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", match[1], str(root), *([self.mirror] if self.mirror else [])]
            subprocess.run(command, check=True)
            policy = root / "usr/sbin/policy-rc.d"
            policy.write_text(POLICY)
            policy.chmod(0o755)
            done.touch()
        return root

    def run(self, stage: Stage, command: list[str], *, with_args: bool = False) -> int:
        """Run a command in a stage as its user; nothing that it starts or mounts outlives it."""
        variables = {"HOME": stage.home(), **(stage.args if with_args else {}), **stage.env}
        assignments = [f"{name}={value}" for name, value in variables.items()]
        user = ":".join(map(str, stage.ids(stage.user)))
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
        environment = {"PATH": DEFAULT_PATH, "BINDS": " ".join(self.binds)}
        arguments = [str(stage.root), user, stage.workdir, *assignments, *command]
        return subprocess.run([*enter, *arguments], env=environment, stdin=subprocess.DEVNULL, check=False).returncode

    # -- one method for each instruction --------------------------------------------------------

    def _run(self, stage: Stage, value: str) -> None:
        command = json.loads(value) if value.startswith("[") else [*stage.shell, value]
        status = self.run(stage, command, with_args=True)
        if status:
            raise SystemExit(f"run_dockerfile: status {status} of RUN {value}")

    def _copy(self, stage: Stage, value: str) -> None:
        words = stage.substitute(value).split()
        options = dict(word[2:].split("=") for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        origin = self.stages[options["from"]].root if "from" in options else self.context
        into = stage.inside(target)
        for source in sources:
            found = origin / source.lstrip("/")
            is_folder = len(sources) > 1 or target.endswith(("/", "."))
            place = into / found.name if is_folder and not found.is_dir() else into
            place.parent.mkdir(parents=True, exist_ok=True)
            if found.is_dir():
                ignored = None if "from" in options else shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(found, place)
            if "chmod" in options:
                place.chmod(int(options["chmod"], 8))
            if "chown" in options or "from" not in options:
                uid, gid = stage.ids(options.get("chown", "root").partition(":")[0])
                for path in [place, *(place.rglob("*") if place.is_dir() else ())]:
                    os.chown(path, uid, gid, follow_symlinks=False)

    def _arg(self, stage: Stage, value: str) -> None:
        name, has_default, default = value.partition("=")
        if name in self.build_args or has_default:
            stage.args[name] = self.build_args.get(name, stage.substitute(default))

    def _env(self, stage: Stage, value: str) -> None:
        stage.env |= dict(word.split("=", 1) for word in shlex.split(stage.substitute(value)))

    def _shell(self, stage: Stage, value: str) -> None:
        stage.shell = json.loads(value)

    def _user(self, stage: Stage, value: str) -> None:
        stage.user = stage.substitute(value).partition(":")[0]

    def _workdir(self, stage: Stage, value: str) -> None:
        stage.workdir = os.path.join(stage.workdir, stage.substitute(value))
        stage.inside("").mkdir(parents=True, exist_ok=True)

    def _cmd(self, stage: Stage, value: str) -> None:
        stage.cmd = json.loads(value) if value.startswith("[") else [*stage.shell, value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the stages are built: some gigabytes")
    parser.add_argument("--dockerfile", type=Path, default=Path(__file__).resolve().parent.parent / "Dockerfile")
    parser.add_argument("--target", help="stage to build (default: the last)")
    parser.add_argument("--mirror", help="archive that debootstrap takes Debian from (default: its own)")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH[:PLACE]", help="show to all steps")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="set an ARG")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="variable for the command")
    parser.add_argument("command", nargs="*", help="after --: what to run in the result (default: its CMD)")
    # argparse gives up on options between the directory and the command.
    arguments = parser.parse_intermixed_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    builder = Builder(
        arguments.dockerfile,
        arguments.directory.absolute(),
        mirror=arguments.mirror,
        binds=arguments.bind,
        build_args=dict(pair.split("=", 1) for pair in arguments.build_arg),
    )
    stage = builder.build(arguments.target)
    stage.env |= dict(pair.split("=", 1) for pair in arguments.env)
    sys.exit(builder.run(stage, arguments.command or stage.cmd))


if __name__ == "__main__":
    main()
