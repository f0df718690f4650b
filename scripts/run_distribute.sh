#!/usr/bin/env bash
# Starts run_glm.py on the cards of a rank table, watches it, and ends it as a whole when a rank fails.
#
#   bash scripts/run_distribute.sh hccl_8p.json configs/glm3/X.yaml "[0,8)" finetune
#
# For all arguments see --help. Uses $PYTHON, the active environment, or .venv in the project.

set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

find_python
exec "$python" -m glm_ms.launch.distribute "$@"
