#!/usr/bin/env bash
# Installs what the tests need and runs them: ruff, import-linter, deptry, mypy, then pytest.
#
#   bash scripts/test.sh                    the default tests
#   bash scripts/test.sh --slow             and the slow ones, minutes each
#   bash scripts/test.sh tests/data -k order    arguments go to pytest
#
# Two processes share the tests, file by file: MindSpore compiles on one core. `-n 0` runs them in one.
# Uses the active virtual environment, or makes .venv in the project. PYTHON=/path/to/python3.11 chooses the
# interpreter. Tests that need data which may not be passed on (the genuine tokenizer, ADGEN) look for it in
# ../shared or $GLM_MS_SHARED; without it they are skipped, and counted in the last lines.

set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

# On Linux x86-64 the usual package index gives a build with gigabytes of CUDA
# libraries, so a CPU build is taken wherever the settings of pip know one.
install_torch() {
    local log="$root/output/install.log"
    if "$python" -c 'import torch' >/dev/null 2>&1; then return 0; fi
    step "Installing torch: it reads .bin checkpoints, and the tests write some"
    if quiet_pip "$log" "torch==2.13.0+cpu"; then return 0; fi
    echo "   pip finds no CPU build of torch 2.13.0; taking the one it finds, which may be large"
    if quiet_pip "$log" "torch>=2.1"; then return 0; fi
    tail -n 5 -- "$log" >&2
    fail "pip could not install torch (all of its output: $log)" \
        "Install any CPU build of torch 2.1 or later into $python by hand, then run this again."
}

cd -- "$root"
use_environment
install_torch
install_project test

remedy="Change the code; 'ruff check --fix .' and 'ruff format .' repair most of what ruff finds."
step "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .

remedy="Change the code, or the rules in pyproject.toml if they are wrong."
if "$python" -c 'import importlinter, deptry, mypy' 2>/dev/null; then
    step "import-linter, deptry, mypy"
    lint-imports
    deptry .
    mypy
else
    echo "note: import-linter, deptry and mypy need Python 3.10; they are not run" >&2
fi

step "pytest"
remedy=""
status=0
"$python" -m pytest --numprocesses 2 --dist loadfile "$@" || status=$?
_explained=yes # pytest's own last line is the last line
exit "$status"
