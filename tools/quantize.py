"""Quantizes the weights of linear layers to 8 or 4 bits, one tensor at a time.

    python tools/quantize.py --model chatglm3-6b --bits 4 --group 32 --output chatglm3-6b-int4
    python tools/quantize.py --model chatglm3-6b --bits 4 --output chatglm3-6b-int4 --calibration train.json

Reads what tools/convert_weight.py reads. The output is a folder that eval, predict, chat, serve and the finetuning of
adapters take in place of the original; its weights are mapped into memory, not read. See docs/quantization.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.convert.conversion import peak_memory
from glm_ms.program import program
from glm_ms.quant import BITS, GROUPS, quantization
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import FileError


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/quantize.py --model chatglm3-6b --bits 4 --output chatglm3-6b-int4",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder, .safetensors, .ckpt, .bin, .pth or .pt to read"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--bits", type=int, choices=BITS, required=True, help="of a weight")
    parser.add_argument(
        "--group", type=int, choices=GROUPS, help="with 4 bits: inputs that share a scale (default: 32)"
    )
    parser.add_argument(
        "--config", metavar="PATH", help="folder with config.json, a .json or .yaml; needed for a single file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Quantizes one checkpoint; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    start = time.monotonic()
    try:
        chosen = quantization(options.bits, options.group)
        from glm_ms.quant.writer import plan_quantization  # takes seconds

        copy = plan_quantization(options.model, options.output, chosen, options.config, options.overwrite)
        with tqdm(total=copy.total_bytes, unit="B", unit_scale=True, desc="quantizing") as bar:
            copy.run(on_tensor=lambda _, size: bar.update(size))
    except (FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{options.output}: {copy.quantization}, {copy.total_bytes:,} bytes, {time.monotonic() - start:.1f} s, "
        f"peak memory {peak_memory() / 1e6:,.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
