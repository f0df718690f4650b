"""Converts checkpoints between Hugging Face and MindSpore, one tensor at a time.

    python tools/convert_weight.py --input chatglm3-6b --output glm3_6b.ckpt --dtype float16
    python tools/convert_weight.py --input glm3_6b.ckpt --config chatglm3-6b --output chatglm3-6b-new
    python tools/convert_weight.py --input chatglm3-6b --model_generation 3 --output chatglm3.gguf --gguf_type Q8_0

Reads Hugging Face folders (safetensors or .bin, sharded or not), .safetensors, .ckpt and .bin files. Checks all names
and shapes against the config first; the output appears only when it is complete.
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

from glm_ms.convert.conversion import (
    GGUF,
    NEED_TOKENIZER,
    TARGETS,
    Conversion,
    parse_size,
    peak_memory,
    plan_conversion,
)
from glm_ms.convert.gguf_file import TYPES
from glm_ms.convert.gguf_model import ENDING, gguf_tensors
from glm_ms.model.config import FLOAT_TYPES
from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.tokenizer import SentencePieceTokenizer
from glm_ms.tokenizer.base import CHAT

_WITH_TOKENIZER = " or ".join(NEED_TOKENIZER)


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/convert_weight.py --input chatglm3-6b --output glm3_6b.ckpt",
    )
    parser.add_argument(
        "--input", required=True, metavar="PATH", help="folder, .safetensors, .ckpt, .bin, .pth or .pt to read"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="folder (Hugging Face), .ckpt or .safetensors (MindSpore), .gguf (llama.cpp)",
    )
    parser.add_argument(
        "--config", metavar="PATH", help="folder with config.json, a .json or .yaml; needed for a single file"
    )
    parser.add_argument("--dtype", choices=FLOAT_TYPES, help="storage type of the output (default: that of the input)")
    parser.add_argument("--max_shard_size", metavar="SIZE", help="largest file of a Hugging Face folder (default: 2GB)")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        help="kind of output (default: by the ending of --output); hf-glm: a folder that transformers, vLLM "
        "and SGLang load as GlmForCausalLM, without code of the model; gguf: a file for llama.cpp",
    )
    parser.add_argument(
        "--gguf_type", choices=tuple(TYPES), help=f"with --to {GGUF}: type of the matrices (default: F16)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help=f"with --to {_WITH_TOKENIZER}: tokenizer.model or a folder with it (default: of the input)",
    )
    parser.add_argument(
        "--model_generation",
        type=int,
        choices=(2, 3),
        help=f"with --to {_WITH_TOKENIZER}: ChatGLM2 or ChatGLM3, if the files of the tokenizer do not tell",
    )
    parser.add_argument(
        "--without_adapter",
        action="store_true",
        help="of weights with an adapter in the same files, convert the weights",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one conversion; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    start = time.monotonic()
    try:
        conversion = plan_conversion(
            options.input,
            options.output,
            config=options.config,
            dtype=options.dtype,
            target=options.to,
            max_shard_size=parse_size(options.max_shard_size) if options.max_shard_size else None,
            overwrite=options.overwrite,
            with_adapter=options.without_adapter,
            tokenizer=_tokenizer(options),
            gguf_type=options.gguf_type,
        )
        if options.without_adapter and not conversion.reader.adapter_names():
            raise CheckpointError(
                f"{options.input}: --without_adapter: there is no adapter beside the weights; remove it"
            )
        _run_with_bar(conversion)
    except (FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    if conversion.reader.ignored:
        print(f"left out {len(conversion.reader.ignored)} tensors of optimizer and training state")
    if options.without_adapter:
        print(f"left out {len(conversion.reader.adapter_names())} tensors of an adapter")
    size, kind = conversion.total_bytes, conversion.dtype
    if conversion.target == GGUF:
        size, kind = conversion.output.stat().st_size, conversion.gguf_type
        types = [kind for shape, kind in gguf_tensors(conversion.shapes, kind).values() if len(shape) > 1]
        if other := len(types) - types.count(kind):
            print(f"{other} matrices are F16: their rows are not made of whole blocks of {kind}")
    print(
        f"{conversion.output}: {len(conversion.shapes)} tensors, {size:,} bytes "
        f"({kind}), {time.monotonic() - start:.1f} s, peak memory {peak_memory() / 1e6:,.0f} MB"
    )
    return 0


def _tokenizer(options: argparse.Namespace) -> SentencePieceTokenizer | None:
    """The tokenizer of the model, for the target that needs it."""
    target = options.to or (GGUF if Path(options.output).suffix == ENDING else None)
    if target not in NEED_TOKENIZER:
        for name in ("tokenizer", "model_generation"):
            if getattr(options, name) is not None:
                raise CheckpointError(f"--{name}: is for --to {_WITH_TOKENIZER} only; remove it")
        return None
    from glm_ms.pretrained import find_tokenizer  # takes seconds

    family, vocab_file, config = find_tokenizer(
        options.tokenizer or options.config or options.input, options.model_generation
    )
    return family.tokenizer(vocab_file, template=config.get("template", CHAT))


def _run_with_bar(conversion: Conversion) -> None:
    total = len(conversion.shapes)
    with tqdm(total=conversion.total_bytes, unit="B", unit_scale=True, desc="converting") as bar:
        done = 0

        def advance(name: str, size: int) -> None:
            nonlocal done
            done += 1
            bar.set_postfix_str(f"{done}/{total} tensors", refresh=False)
            bar.update(size)

        conversion.run(advance)


if __name__ == "__main__":
    sys.exit(main())
