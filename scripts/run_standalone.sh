#!/usr/bin/env bash
# Runs run_glm.py on one card, in the foreground.
#
#   bash scripts/run_standalone.sh configs/glm3/X.yaml 0 finetune
#
# For all arguments see --help. Uses $PYTHON, the active environment, or .venv in the project.

set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'USAGE'
usage: run_standalone.sh CONFIG_PATH DEVICE_ID RUN_STATUS [--flag value ...]

Runs run_glm.py on one card, in the foreground.

  CONFIG_PATH   YAML file of the run
  DEVICE_ID     number of the card (on a CPU: 0)
  RUN_STATUS    train, finetune, eval or predict
  --flag value  and all that follows goes to run_glm.py as it is; see python run_glm.py --help
USAGE
}

if [ $# -eq 0 ]; then
    usage >&2
    _explained=yes # the usage is all there is to say
    exit 2
fi
case "$1" in -h | --help) usage && exit 0 ;; esac
if [ $# -lt 3 ]; then
    fail "$# arguments; at least CONFIG_PATH DEVICE_ID RUN_STATUS are needed" "See run_standalone.sh --help"
fi
readonly CONFIG=$1 DEVICE=$2 STATUS=$3
shift 3
[ -f "$CONFIG" ] || fail "CONFIG_PATH $CONFIG: no such file in $PWD" "Check the path."
case "$DEVICE" in "" | *[!0-9]*) fail "DEVICE_ID $DEVICE: not the number of a card" "The first card is 0." ;; esac
case "$STATUS" in
    train | finetune | eval | predict) ;;
    *) fail "RUN_STATUS $STATUS: train, finetune, eval or predict" "See run_standalone.sh --help" ;;
esac
case "${1:---}" in
    --*) ;;
    *) fail "$1: what follows RUN_STATUS begins with a --flag" "Write key.sub=value as --key.sub value." ;;
esac

find_python
# What an outer job tells its processes is of no use to a run on one card.
unset RANK_ID RANK_SIZE RANK_TABLE_FILE MINDSPORE_HCCL_CONFIG_PATH DEVICE_NUM
unset MS_ROLE MS_SCHED_HOST MS_SCHED_PORT MS_WORKER_NUM MS_SERVER_NUM MS_NODE_ID MS_TOPO_TIMEOUT
export DEVICE_ID="$DEVICE"
alone=(--use_parallel False)
for word in "$@"; do
    case "$word" in --use_parallel | --use_parallel=*) alone=() ;; esac # a flag may not be given twice
done
exec "$python" "$root/run_glm.py" --config "$CONFIG" ${alone[@]+"${alone[@]}"} --run_mode "$STATUS" \
    --device_id "$DEVICE" "$@"
