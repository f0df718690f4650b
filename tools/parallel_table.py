"""Prints the table of layouts in the documentation: what one card stores of the 6B network in each layout.

    python tools/parallel_table.py --rig ../shared/rig/run.sh

For each layout it compiles the training step of ChatGLM3-6B, full width, two blocks a stage, for the first card of a
simulated Ascend cluster of 8, and multiplies the bytes of a block by the number of blocks of the first stage, which are
all cut in the same way. Needs gcc and the rig, a launcher that runs MindSpore's Ascend compiler without a card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "glm3" / "run_glm3_6b_finetune_800_32G.yaml"
STEP = REPOSITORY / "tests" / "parallel" / "rig_step.py"
# data x model x stages, optimizer sharding.
LAYOUTS = (
    (8, 1, 1, False),
    (8, 1, 1, True),
    (2, 4, 1, False),
    (2, 4, 1, True),
    (1, 8, 1, False),
    (2, 2, 2, True),
)
SHOWN = {
    "embedding": "transformer.embedding.embedding_table",
    "query": "transformer.encoder.layers.0.self_attention.query_key_value.query.weight",
    "key": "transformer.encoder.layers.0.self_attention.query_key_value.key.weight",
    "gate": "transformer.encoder.layers.0.mlp.dense_h_to_4h.gate.weight",
}
_FLOAT32, _MOMENT, _BLOCKS = 4, "adam_m.", 28


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status: 0 done, 1 a layout does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--rig",
        required=True,
        metavar="PATH",
        help="launcher that runs the Ascend compiler of MindSpore without a card; not part of this project",
    )
    options = parser.parse_args(arguments)
    print("| data x model x stages | optimizer | " + " | ".join(SHOWN) + " | weights | with moments and gradients |")
    print("|---" * (len(SHOWN) + 4) + "|")
    for layout in LAYOUTS:
        try:
            print(row(layout, compiled(Path(options.rig), layout)), flush=True)
        except subprocess.CalledProcessError as error:
            print(f"error: {layout}: {error.stdout[-2000:]}", file=sys.stderr)
            return 1
    return 0


def compiled(rig: Path, layout: tuple[int, int, int, bool]) -> Mapping[str, Sequence[int]]:
    """Name -> shape of what the first card stores."""
    data, model, stages, sharded = layout
    micro = 2 * stages if stages > 1 else 1
    keys = (
        f"parallel_config.data_parallel={data}", f"parallel_config.model_parallel={model}",
        f"parallel_config.pipeline_stage={stages}", f"parallel_config.micro_batch_num={micro}",
        f"parallel.enable_parallel_optimizer={sharded}", "runner_config.batch_size=1",
        f"recompute_config.parallel_optimizer_comm_recompute={sharded and stages == 1}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        line = [str(rig), "--ranks", "8", "--only", "0", "--target", "ascend", "--timeout", "1500", "--out", folder,
                "--", str(STEP), str(CONFIG), str(2 * stages), *keys]  # fmt: skip
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return json.loads(Path(folder, "slices_rank_0.json").read_text(encoding="utf-8"))


def row(layout: tuple[int, int, int, bool], slices: Mapping[str, Sequence[int]]) -> str:
    """A line of the table; float32 weights, two moments and gradients of the same sizes."""
    data, model, stages, sharded = layout
    shown = (" x ".join(map(str, slices[name])) for name in SHOWN.values())
    weights = 0
    for name, shape in slices.items():
        if not name.startswith(_MOMENT):
            times = 0 if ".layers.1." in name else _BLOCKS // stages if ".layers.0." in name else 1
            weights += times * math.prod(shape) * _FLOAT32
    cells = (f"{data} x {model} x {stages}", "split" if sharded else "whole", *shown, f"{weights / 2**30:.2f} GiB",
             f"{4 * weights / 2**30:.2f} GiB")  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
