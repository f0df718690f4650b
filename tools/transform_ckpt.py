"""Merges, splits and re-splits the checkpoints of a cluster by MindSpore's strategy files, one tensor at a time.

    python tools/transform_ckpt.py --src_ckpt_strategy output/strategy --src_ckpt_dir output/slices \\
        --dst_ckpt_dir merged --prefix glm3_
    python tools/transform_ckpt.py --src_ckpt_dir merged --dst_ckpt_strategy other/strategy \\
        --dst_ckpt_dir for_other_cluster --prefix glm3_

Without --src_ckpt_strategy the source is a whole checkpoint, without --dst_ckpt_strategy the output is. All ranks must
be there, of one run and step; copies of a slice must be equal bit for bit, and files must match their manifest.json.
The output appears only when it is complete. The slices of an adapter become the folder of an adapter, as from a
run on one card.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.convert.adapter_files import CONFIG, LORA
from glm_ms.convert.cluster.placement import FORMATS
from glm_ms.convert.cluster.resharding import Resharding, plan_resharding
from glm_ms.convert.conversion import peak_memory
from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import CheckpointError


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/transform_ckpt.py --src_ckpt_strategy output/strategy "
        "--src_ckpt_dir output/slices --dst_ckpt_dir merged --prefix glm3_",
    )
    add = parser.add_argument
    add(
        "--src_ckpt_strategy",
        metavar="PATH",
        help="strategy of the source: a file, or a folder with those of the ranks (default: the source is whole)",
    )
    add("--dst_ckpt_strategy", metavar="PATH", help="strategy of the output (default: make one whole checkpoint)")
    add(
        "--src_ckpt_dir",
        required=True,
        metavar="DIR",
        help="folder with rank_0, rank_1, ...; or a whole checkpoint; or the output folder of a run",
    )
    add(
        "--dst_ckpt_dir",
        required=True,
        metavar="DIR",
        help="folder to create, with rank_N/<prefix>N.<format>, or the files of an adapter",
    )
    add("--prefix", default="checkpoint_", metavar="NAME", help="start of the file names (default: checkpoint_)")
    add("--format", choices=FORMATS, help="format of the output (default: that of the source)")
    add(
        "--step",
        type=_step,
        metavar="STEP",
        help="which checkpoint, if a folder has several: 500 of step_00000500, 2_500 of NAME-2_500.ckpt (default: "
        "the newest that all ranks have)",
    )
    add("--weights_only", action="store_true", help="leave out optimizer state and training counters")
    add("--partial", action="store_true", help="allow checkpoints and strategies to name different weights")
    add(
        "--no_verify",
        action="store_true",
        help="compare neither the copies of a slice nor the files with their manifests; reads less",
    )
    return parser  # fmt: skip


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one transformation; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    start = time.monotonic()
    try:
        plan = plan_resharding(
            options.src_ckpt_dir,
            options.dst_ckpt_dir,
            prefix=options.prefix,
            src_strategy=options.src_ckpt_strategy,
            dst_strategy=options.dst_ckpt_strategy,
            kind=options.format,
            step=options.step,
            partial=options.partial,
            weights_only=options.weights_only,
            verify=not options.no_verify,
            say=print,
        )
        total = plan.checked_bytes + plan.total_bytes
        with tqdm(total=total, unit="B", unit_scale=True, desc="transforming") as bar:
            plan.run(bar.update)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{plan.output}: {len(plan.tensors)} tensors, {plan.total_bytes:,} bytes, from {len(plan.source)} to "
        f"{plan.placement.ranks} ranks, {time.monotonic() - start:.1f} s, peak memory {peak_memory() / 1e6:,.0f} MB"
    )
    for line in next_steps(plan, options.dst_ckpt_strategy is None):
        print(line)
    return 0


def next_steps(plan: Resharding, merged: bool) -> list[str]:
    """Commands that use the output."""
    output, placement = plan.output, plan.placement
    if not merged:
        return [f"each rank N of the new cluster loads {output}/rank_N/{placement.prefix}N.{placement.kind}"]
    if placement.adapter is not None:
        lines = [f"to evaluate: python run_glm.py --config CONFIG --run_mode eval --load_adapter {output}"]
        if placement.adapter is LORA:
            merge = f"python tools/merge_lora.py --base BASE --adapter {output} --output FOLDER"
            lines.append(f"to merge into its base: {merge}")
        return lines
    config = "" if CONFIG in plan.companions else " --config CONFIG"
    return [
        f"to evaluate: python run_glm.py --config CONFIG --run_mode eval --load_checkpoint {output}",
        f"to export:   python tools/convert_weight.py --input {output}{config} --output FOLDER",
    ]


def _step(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:step_)?(?:(\d+)_)?(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a step, such as 500, nor EPOCH_STEP as in file names, such as 2_500"
        )
    return int(match.group(1) or 0), int(match.group(2))


if __name__ == "__main__":
    sys.exit(main())
