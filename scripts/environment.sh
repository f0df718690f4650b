# Interpreter, virtual environment and installation, for the scripts beside this file. To be sourced.
#
#   use_environment            sets $python: the virtual environment that is active, or .venv in the project
#   install_project [EXTRAS]   installs the project with its packages there; at once if that was done before
#   fail MESSAGE REMEDY        ends the script
#   step TITLE                 names what comes next; a failure that says nothing else is reported with it
#
# shellcheck shell=bash

set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python=""
export PYTHONUTF8=1

# MindSpore 2.9.0 has wheels for these versions only.
readonly FITTING="CPython 3.9, 3.10, 3.11 or 3.12 (64 bits)"
# The python3 of the machine first: it is the one its owner has chosen.
readonly CANDIDATES="python3 python3.11 python3.12 python3.10 python3.9"

_step="starting"
_explained=""
_ticker=""

_on_exit() {
    local status=$1
    if [ -n "$_ticker" ]; then kill "$_ticker" 2>/dev/null || true; fi
    if [ "$status" -ne 0 ] && [ -z "$_explained" ]; then
        printf '\nerror: %s did not work (exit status %s); the reason stands above.\n' "$_step" "$status" >&2
        printf '  %s\n' "${remedy:-Mend that and run ${0##*/} again: what has been done is kept.}" >&2
    fi
}
trap '_on_exit $?' EXIT

fail() {
    _explained=yes
    printf '\nerror: %s\n  %s\n' "$1" "$2" >&2
    exit 1
}

step() {
    _step=$1
    printf '\n== %s\n' "$1"
}

# Prints "yes", or why an interpreter does not fit.
_judge() {
    "$1" -c '
import platform, sys
version = "%d.%d" % sys.version_info[:2]
if platform.python_implementation() != "CPython":
    print("is " + platform.python_implementation())
elif not (3, 9) <= sys.version_info[:2] <= (3, 12) or sys.maxsize < 2 ** 32:
    print("is Python %s, %d bits" % (version, 64 if sys.maxsize > 2 ** 32 else 32))
else:
    print("yes")
' 2>/dev/null || echo "does not start"
}

_can_make_environments() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# Sets $found to the interpreter that makes the virtual environment.
_find_interpreter() {
    local name verdict seen="" lacking=""
    found=""
    # shellcheck disable=SC2086  # a list of words
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- $CANDIDATES; fi
    for name in "$@"; do
        if ! command -v -- "$name" >/dev/null 2>&1; then
            seen="$seen$name is not there; "
            continue
        fi
        verdict="$(_judge "$name")"
        if [ "$verdict" != yes ]; then
            seen="$seen$name $verdict; "
        elif ! _can_make_environments "$name"; then
            lacking="${lacking:-$name}"
        else
            found="$(command -v -- "$name")"
            return 0
        fi
    done
    if [ -n "$lacking" ]; then
        fail "$lacking fits, but its module venv (or ensurepip) is missing" \
            "Install it (Debian, Ubuntu: apt install python3-venv), or activate an environment of your own first."
    fi
    fail "no Python that fits: ${seen%; }" \
        "MindSpore 2.9.0 needs $FITTING. Point to one: PYTHON=/path/to/python3.11 bash scripts/${0##*/}"
}

use_environment() {
    local folder verdict
    case "$(uname -s)-$(uname -m)" in
        Linux-x86_64 | Linux-aarch64) ;;
        *) echo "note: tried on Linux (x86-64, aarch64) only; this is $(uname -s) $(uname -m)" >&2 ;;
    esac
    folder="${VIRTUAL_ENV:-$root/.venv}"
    if [ -n "${PYTHON:-}" ] && [ -e "$folder" ]; then
        echo "note: PYTHON=$PYTHON is not used, $folder is; remove or deactivate that to make another" >&2
    fi
    if [ ! -e "$folder" ]; then
        if [ -n "${VIRTUAL_ENV:-}" ]; then
            fail "VIRTUAL_ENV is $folder, which does not exist" "Run: unset VIRTUAL_ENV"
        fi
        _find_interpreter
        step "Virtual environment: $folder ($("$found" --version 2>&1))"
        "$found" -m venv -- "$folder" || {
            rm -rf -- "$folder" # this run has made it
            fail "$found could not make a virtual environment in $folder" \
                "See above; or activate an environment of your own first."
        }
    fi
    python="$folder/bin/python"
    if [ ! -x "$python" ]; then
        fail "$folder is no virtual environment (no bin/python)" "Remove or deactivate it and run this again."
    fi
    verdict="$(_judge "$python")"
    if [ "$verdict" != yes ]; then
        fail "$python $verdict; MindSpore 2.9.0 needs $FITTING" \
            "Remove $folder (or deactivate it) and run this again, with PYTHON=/path/to/python3.11 if need be."
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        fail "$folder has no pip" "Remove it (or run $python -m ensurepip) and run this again."
    fi
    # msrun, pytest and ruff are looked up by name; the environment's own come first.
    export PATH="$folder/bin:$PATH"
}

# Shows that something goes on while a quiet command runs.
_tick() {
    local seconds=0
    while sleep 1; do
        seconds=$((seconds + 1))
        if [ -t 2 ]; then
            printf '\r   %s s ' "$seconds" >&2
        elif [ $((seconds % 30)) -eq 0 ]; then
            printf '   %s s\n' "$seconds" >&2
        fi
    done
}

# quiet_pip LOG ARGUMENTS: pip with its talk in a file.
quiet_pip() {
    local log=$1 status=0
    shift
    mkdir -p -- "$(dirname -- "$log")"
    _tick &
    _ticker=$!
    "$python" -m pip install --no-input "$@" >"$log" 2>&1 || status=$?
    kill "$_ticker" 2>/dev/null || true
    wait "$_ticker" 2>/dev/null || true
    _ticker=""
    if [ -t 2 ]; then printf '\r            \r' >&2; fi
    return "$status"
}

_stamp() {
    printf '%s\n%s\n' "$root" "$(cksum <"$root/pyproject.toml")"
}

install_project() {
    local extras=${1:-} log="$root/output/install.log" stamp
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/.glm_ms_installed${extras:+_$extras}"
    if [ "$(cat -- "$stamp" 2>/dev/null)" = "$(_stamp)" ] && "$python" -I -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("glm_ms", "mindspore", "mindformers"))))'; then
        return 0
    fi
    step "Installing the project and its packages; a few minutes the first time"
    # Editable, so that tools and tests run what stands in this folder; older pips cannot do that.
    if ! { quiet_pip "$log" "pip>=21.3" && quiet_pip "$log" -e "$root${extras:+[$extras]}"; }; then
        tail -n 25 -- "$log" >&2
        fail "pip could not install the project (all of its output: $log)" \
            "Usual reasons: no connection to the package index, a full disk, no C compiler. Mend it and run this again."
    fi
    _stamp >"$stamp"
}

# Sets $python to an interpreter that has everything already: $PYTHON, the active environment, .venv in the project,
# else that of PATH. Makes and installs nothing, for launchers that are to start at once. The project's modules are
# found whether it is installed there or not.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python="$(command -v -- "$PYTHON")" || fail "PYTHON=$PYTHON is not there" "Give the path of an interpreter."
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        python="$VIRTUAL_ENV/bin/python"
        [ -x "$python" ] || fail "VIRTUAL_ENV is $VIRTUAL_ENV, which has no bin/python" "Run: unset VIRTUAL_ENV"
    elif [ -z "${CONDA_PREFIX:-}" ] && [ -x "$root/.venv/bin/python" ]; then
        python="$root/.venv/bin/python"
    else
        python="$(command -v python || command -v python3)" ||
            fail "no python on PATH" "Activate an environment, or run: PYTHON=/path/to/python bash scripts/${0##*/} ..."
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}
