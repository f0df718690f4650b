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
from typing import TYPE_CHECKING

from tqdm import tqdm

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.convert.conversion import peak_memory
from glm_ms.data.formats import FORMATS
from glm_ms.program import program
from glm_ms.quant import BITS, GROUPS, quantization
from glm_ms.storage.arguments import Parser, whole_number
from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.tokenizer.base import CHAT

if TYPE_CHECKING:
    import numpy as np

    from glm_ms.quant.calibration import Calibration
    from glm_ms.quant.writer import QuantizedCopy

FORMAT = "ADGenDataLoader"
COLUMNS = ("content", "summary")
RECORDS = 128
LONGEST = 512  # tokens of a record
# Options that say how to read the records of --calibration.
OF_RECORDS = ("format", "columns", "records", "tokenizer", "model_generation")


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
    calibration = parser.add_argument_group("rounding that keeps the results on real text")
    calibration.add_argument("--calibration", metavar="FILE", help="records to run through the model")
    calibration.add_argument("--format", choices=FORMATS, help=f"of the records (default: {FORMAT})")
    calibration.add_argument(
        "--columns", nargs=2, metavar="NAME", help=f"of prompt and answer (default: {' '.join(COLUMNS)})"
    )
    calibration.add_argument(
        "--records", type=whole_number(1, 1 << 20), metavar="N", help=f"at most (default: {RECORDS})"
    )
    calibration.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer.model, or a folder or YAML with it (default: of the model)"
    )
    calibration.add_argument(
        "--model_generation", type=int, choices=(2, 3), help="ChatGLM2 or ChatGLM3, if the tokenizer does not tell"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Quantizes one checkpoint; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    start = time.monotonic()
    try:
        _check(options)
        chosen = quantization(options.bits, options.group)
        from glm_ms.quant.writer import plan_quantization  # takes seconds

        copy = plan_quantization(options.model, options.output, chosen, options.config, options.overwrite)
        inputs_of = None if options.calibration is None else _calibration(options, copy).inputs_of
        with tqdm(total=copy.total_bytes, unit="B", unit_scale=True, desc="quantizing") as bar:
            copy.run(inputs_of, lambda _, size: bar.update(size))
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


def _check(options: argparse.Namespace) -> None:
    """Raises CheckpointError for an option that would have no effect."""
    for name in OF_RECORDS:
        if options.calibration is None and getattr(options, name) is not None:
            raise CheckpointError(f"--{name}: is for --calibration FILE only; add that or remove --{name}")


def _calibration(options: argparse.Namespace, copy: QuantizedCopy) -> Calibration:
    """Of the records of --calibration."""
    from glm_ms.quant.calibration import Calibration

    plan = copy.conversion
    rows = _rows(options, plan.config.seq_length)
    highest = max(int(ids.max()) for ids, _ in rows)
    if highest >= plan.config.padded_vocab_size:
        raise CheckpointError(f"{options.calibration}: id {highest}: the tokenizer is not that of {options.model}")
    return Calibration(plan.reader, plan.config, rows)


def _rows(options: argparse.Namespace, seq_length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and positions of the records in the template of the model, without padding."""
    from glm_ms.data.datasets import TrainDataset
    from glm_ms.families import build_encoder
    from glm_ms.pretrained import find_tokenizer
    from glm_ms.settings.schema import DataLoaderSettings, TrainDatasetSettings

    family, vocab_file, config = find_tokenizer(options.tokenizer or options.model, options.model_generation)
    tokenizer = family.tokenizer(vocab_file, template=config.get("template", CHAT))
    loader = DataLoaderSettings(
        options.format or FORMAT, options.calibration, origin_columns=list(options.columns or COLUMNS)
    )
    half = min(LONGEST, seq_length) // 2
    section = TrainDatasetSettings(loader, half, half - 1, 2 * half)
    data = TrainDataset(options.calibration, build_encoder(section, tokenizer), options.records or RECORDS)
    print(data.describe(), file=sys.stderr)
    encoded = [data[index] for index in range(len(data))]
    kept = [row["attention_mask"] == 1 for row in encoded]
    return [(row["input_ids"][mask], row["position_ids"][mask]) for row, mask in zip(encoded, kept)]


if __name__ == "__main__":
    sys.exit(main())
