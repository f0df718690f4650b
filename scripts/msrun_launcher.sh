#!/usr/bin/env bash
# Starts a program on many cards with msrun, watches it, and ends it as a whole when a rank fails.
#
#   bash scripts/msrun_launcher.sh "run_glm.py --config X.yaml --run_mode finetune --use_parallel True" 8
#
# For all arguments see --help. Uses $PYTHON, the active environment, or .venv in the project.

set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

find_python
exec "$python" -m glm_ms.launch.msrun "$@"
