"""Merges a LoRA adapter into its base weights, one tensor at a time, or removes a merged adapter.

    python tools/merge_lora.py --base chatglm3-6b --adapter output/lora --output chatglm3-6b-merged
    python tools/merge_lora.py --base chatglm3-6b-merged --adapter output/lora --output chatglm3-6b-again --remove

Base and output may be a Hugging Face folder, a .ckpt, a .safetensors; the base also the output folder of a run. The
output appears only when it is complete. Needs memory for three copies of the largest weight in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.convert.conversion import Conversion, parse_size, plan_conversion
from glm_ms.model.config import FLOAT_TYPES, ConfigError
from glm_ms.peft import is_adapter_folder
from glm_ms.peft.adapter import AdapterError, StoredAdapter, base_remark, read_adapter, replaced_adapter
from glm_ms.peft.lora import check_complete, linear_names, lora_deltas
from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.run_folder import resolve_checkpoint


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/merge_lora.py --base chatglm3-6b --adapter output/lora --output merged",
    )
    parser.add_argument("--base", required=True, metavar="PATH", help="weights the adapter was trained on")
    parser.add_argument(
        "--adapter", required=True, metavar="PATH", help="LoRA adapter: folder, or output folder of its run"
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="folder (Hugging Face), .ckpt or .safetensors (MindSpore)"
    )
    parser.add_argument(
        "--lora_alpha", type=float, metavar="N", help="of the training, for LoRA of MindFormers, which does not save it"
    )
    parser.add_argument("--remove", action="store_true", help="remove the adapter from a base it was merged into")
    parser.add_argument(
        "--config", metavar="PATH", help="folder with config.json, a .json or .yaml; needed for a single file"
    )
    parser.add_argument("--dtype", choices=FLOAT_TYPES, help="storage type of the output (default: that of the base)")
    parser.add_argument("--max_shard_size", metavar="SIZE", help="largest file of a Hugging Face folder (default: 2GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one merge; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    start = time.monotonic()
    try:
        stored = read_adapter(options.adapter, options.lora_alpha)
        if is_adapter_folder(resolve_checkpoint(options.base)):
            raise AdapterError(f"{options.base}: --base: this is an adapter; give the weights that it was trained on")
        conversion = plan_merge(
            plan_conversion(
                options.base,
                options.output,
                config=options.config,
                dtype=options.dtype,
                max_shard_size=parse_size(options.max_shard_size) if options.max_shard_size else None,
                overwrite=options.overwrite,
                with_adapter=True,
            ),
            stored,
            options.remove,
        )
        with tqdm(total=conversion.total_bytes, unit="B", unit_scale=True, desc="merging") as bar:
            conversion.run(lambda _, size: bar.update(size))
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    remarks = [replaced_adapter(conversion.reader, options.adapter)]
    if not options.remove:  # else the base is the merged one, which has other weights
        remarks.append(base_remark(options.adapter, conversion.reader.path))
    for remark in filter(None, remarks):
        print(remark)
    done = "removed from" if options.remove else "merged into"
    print(
        f"{conversion.output}: adapter {done} {len(conversion.deltas)} of {len(conversion.shapes)} tensors "
        f"({conversion.dtype}), {time.monotonic() - start:.1f} s"
    )
    return 0


def plan_merge(conversion: Conversion, stored: StoredAdapter, remove: bool) -> Conversion:
    """A conversion that also adds or removes the adapter.

    Raises:
        AdapterError: the adapter does not belong to the base, is not LoRA, or changes nothing.
    """
    deltas = lora_deltas(stored, remove)
    problems = [f"{name}: the base has no such weight" for name in deltas if name not in conversion.shapes]
    for name in deltas.keys() & conversion.shapes.keys():
        module = name.removesuffix("weight")
        down, up = (stored.tensors[f"{module}lora_{half}.weight"].shape for half in "AB")
        found = (up[0], down[1])
        if found != tuple(conversion.shapes[name]):
            problems.append(f"{name}: {list(conversion.shapes[name])} in the base, {list(found)} in the adapter")
    if problems:
        raise AdapterError(
            f"{stored.path}: made for another base than {conversion.reader.path}: {capped(sorted(problems))}"
        )
    check_complete(stored, linear_names(conversion.shapes))
    return dataclasses.replace(conversion, deltas=deltas)


if __name__ == "__main__":
    sys.exit(main())
