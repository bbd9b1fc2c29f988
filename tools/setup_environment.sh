#!/usr/bin/env bash
# Makes .venv, the environment that everything in the Makefile runs in, or brings it up to date.
# Safe to interrupt and to call again: what is finished is not done twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
logs=$venv/logs
stamp=$venv/.complete  # holds the fingerprint of what the environment was made from
packages_unfinished=$venv/.packages-unfinished
PIP=("$venv/bin/python" -m pip --no-input --disable-pip-version-check)

# A calling make exports these (with ARGS=... among them), and the make that compiles Horovod would obey them.
unset MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

fingerprint() {
    {
        # Scripts in a virtual environment hold its absolute path: a moved checkout is a new one.
        pwd -P
        "$venv/bin/python" -VV
        cat requirements/*.txt setup.cfg pyproject.toml tools/setup_environment.sh
    } 2>&1 | sha256sum
}

# A line now and then, so that a long step does not look like a dead one. It ends with this script, however that ends.
heartbeat() {
    local seconds=0
    while sleep 30 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 30))
        printf '      %d min %02d s\n' $((seconds / 60)) $((seconds % 60))
    done
}

# step TITLE ESTIMATE LOG COMMAND...: run a command with its output in a log; on failure show the log's end.
step() {
    local title=$1 estimate=$2 log=$logs/$3 started=$SECONDS status=0
    shift 3
    printf '%s (%s); log: %s\n' "$title" "$estimate" "$log"
    heartbeat &
    heartbeat_pid=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    stop_heartbeat
    if ((status)); then
        tail -n 20 "$log" | cut -c 1-200 | sed 's/^/    | /' >&2
        fail "this step failed: $title" "Read $PWD/$log, then run the same command again."
    fi
    printf '      done in %d s\n' $((SECONDS - started))
}

heartbeat_pid=
stop_heartbeat() {
    if [[ $heartbeat_pid ]]; then
        kill "$heartbeat_pid" 2>/dev/null || true
        wait "$heartbeat_pid" 2>/dev/null || true
        heartbeat_pid=
    fi
}
trap stop_heartbeat EXIT
trap 'fail "interrupted; the same command goes on from here."' INT TERM

# The environment itself leads PATH when make or an activated shell calls, and cannot be made from itself.
find_python() {
    local candidate
    while read -r candidate; do
        # A version manager may put a name on PATH that does not run.
        if "$candidate" -c 'import os, sys
sys.exit(sys.version_info[:2] != (3, 11) or os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1]))' \
            "$venv" >/dev/null 2>&1 </dev/null; then
            echo "$candidate"
            return
        fi
    done < <(type -aP ${PYTHON:-python3.11 python3})
    return 1
}

check_tools() {
    local missing=()
    python=$(find_python) || fail \
        "CPython 3.11 was not found${PYTHON:+ at PYTHON=$PYTHON}; the pinned packages are for that version." \
        "Install it (on Debian 12: apt-get install python3 python3-venv python3-dev), or name it: make setup PYTHON=/path/to/python3.11"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("the venv module of $python (python3-venv)")
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        missing+=("the header files of $python (python3-dev)")
    command -v "${CXX:-g++}" >/dev/null || missing+=("the C++ compiler ${CXX:-g++} (g++)")
    command -v gcc >/dev/null || missing+=("gcc (gcc)")
    command -v cmake >/dev/null || missing+=("cmake (cmake)")
    command -v make >/dev/null || missing+=("make (make)")
    if ((${#missing[@]})); then
        fail "the environment cannot be made without these; Debian's package is in parentheses:" "${missing[@]/#/  }"
    fi
}

if [[ -f $stamp && $(fingerprint) == "$(<"$stamp")" ]]; then
    exit 0
fi

check_tools
echo "Setting up $PWD/$venv. The first time takes 10 to 20 minutes, mostly to compile Horovod; later calls, no time."

# What an interrupted pip leaves behind can look installed and not be, and a moved environment runs the old one's
# scripts: both start afresh, cheaply, because pip has kept the downloads.
if [[ -e $packages_unfinished ]] || ! grep -qsF "$(pwd -P)/$venv" $venv/bin/activate; then
    rm -rf "$venv"
fi
mkdir -p "$logs"
rm -f "$stamp"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    step "[1/5] Creating the virtual environment" "seconds" venv.log "$python" -m venv "$venv"
else
    echo "[1/5] The virtual environment exists"
fi

install_packages() {
    "${PIP[@]}" install --progress-bar off -r requirements/development.txt &&
        "${PIP[@]}" install --progress-bar off --no-deps -r requirements/without-dependencies.txt
}
touch "$packages_unfinished"
step "[2/5] Installing the pinned packages, torch and TensorFlow among them" "1 to 10 minutes, by network" \
    packages.log install_packages
rm -f "$packages_unfinished"

step "[3/5] Installing this project in place" "seconds" project.log \
    "${PIP[@]}" install --no-deps --no-build-isolation -e .

# It shows its own progress, and keeps the compiler's output in the log.
echo "[4/5] Installing Horovod, compiled for these packages unless an earlier build can be used"
"$venv/bin/python" -m hvd_qsgd install-horovod --log "$logs/horovod.log" </dev/null ||
    fail "this step failed: [4/5] Installing Horovod" \
        "The reason is above; the compiler's output, if it came that far, in $PWD/$logs/horovod.log. Then run the same command again."

step "[5/5] Loading what was installed" "up to a minute" load.log \
    env TF_CPP_MIN_LOG_LEVEL=2 TF_USE_LEGACY_KERAS=1 "$venv/bin/python" -c \
    'import hvd_qsgd, horovod.torch, horovod.tensorflow.keras, mpi4py; print("All of it loads.")'

fingerprint >"$stamp"
echo "The environment is ready."
