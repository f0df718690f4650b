#!/usr/bin/env bash
# From nothing to a trained tiny ChatGLM3 and an advert written by it, on a CPU.
#
#   bash scripts/quickstart.sh
#
# Uses the active virtual environment, or makes .venv in the project. PYTHON=/path/to/python3.11 chooses the
# interpreter. Writes to output/quickstart; a second run keeps the weights of the first in earlier_runs.

set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

if [ $# -gt 0 ]; then
    fail "quickstart.sh takes no arguments: $*" "For other runs see README.md and: python run_glm.py --help"
fi

cd -- "$root"
use_environment
install_project

readonly OUT=output/quickstart SAMPLE=configs/tiny/sample
started=$SECONDS

glm() {
    "$python" run_glm.py --config "configs/tiny/$1_glm3_tiny.yaml" --output_dir "$OUT/$2" --device_target CPU \
        processor.tokenizer.vocab_file="$OUT/tokenizer.model" "${@:3}"
}

step "Vocabulary of the sample"
echo "The sample ($SAMPLE) is synthetic: 1200 adverts written by rules for this project. It shows that"
echo "training works; it says nothing about the quality of a real model."
"$python" tools/train_vocab.py --input $SAMPLE/train.json --columns content summary --vocab_size 800 \
    --output "$OUT/tokenizer.model" >/dev/null

step "Evaluating the untrained model on the 60 held-out records"
glm eval before --load_checkpoint "" model.init=random >/dev/null

step "Training (a minute or two)"
glm finetune finetune

step "Evaluating the trained model on the same records"
glm eval after --load_checkpoint "$OUT/finetune" >/dev/null

step "Held-out records, before and after"
"$python" - "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path

before, after = (json.loads((Path(sys.argv[1]) / name / "eval_scores.json").read_text()) for name in ("before", "after"))
print(f"{'':12}{'untrained':>12}{'trained':>12}")
for name in ("loss", "perplexity", "rouge-1", "rouge-2", "rouge-l", "bleu-4"):
    print(f"{name:12}{before[name]:12.2f}{after[name]:12.2f}")
PYTHON

step "An advert for one held-out record"
record() {
    "$python" -c 'import json, sys; print(json.loads(open(sys.argv[1], encoding="utf-8").readline())[sys.argv[2]])' \
        $SAMPLE/dev.json "$1"
}
attributes="$(record content)"
echo "attributes: $attributes"
advert="$(glm predict predict --load_checkpoint "$OUT/finetune" --predict_data "$attributes")"
echo "advert:     $advert"
echo "reference:  $(record summary)"

printf '\nDone in %s s. Weights, curves and predictions: %s\n' "$((SECONDS - started))" "$root/$OUT"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    echo "Next: . .venv/bin/activate, then README.md"
fi
