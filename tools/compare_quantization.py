"""Compares a trained model with its quantized forms on real text: perplexity, logits, greedy answers.

    python tools/compare_quantization.py --config configs/tiny/eval_glm3_tiny.yaml \
        --load_checkpoint output/tiny/glm3_finetune --prompts 8

The settings, those of run_mode eval, name the model and the records to measure on. Everything is computed as in
generation, on a CPU by the C++ kernels. Weights with calibration are quantized by `glm-ms quantize --calibration FILE`:
name the folders with --quantized.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.program import program
from glm_ms.quant import Quantization, quantization
from glm_ms.settings import Settings, SettingsError, load_settings
from glm_ms.storage.arguments import Parser, whole_number
from glm_ms.storage.errors import FileError

if TYPE_CHECKING:
    from glm_ms.data.rows import Row
    from glm_ms.generation import GLMForCausalLM

_COUNT = whole_number(1, 1 << 20)
# (bits, group) of the forms that are made of the weights in memory.
FORMS = ((8, None), (4, 32), (4, 64), (4, 128))
# Types of keys and values that are compared with those of the arithmetic, over the original weights.
SMALLER_CACHES = ("bfloat16", "int8")
_HEADINGS = (
    "weights", "keys and values", "perplexity", "change", "change of logits", "same likeliest token",
    "same greedy tokens", "same until the first other one", "equal answers",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A form of the model.

    Attributes:
        weights: their name in the table.
        path: of the files.
        quantization: of weights that are not quantized in the files; None: they stay as they are.
        kv_cache: type of keys and values; None: that of the arithmetic.
    """

    weights: str
    path: Path
    quantization: Quantization | None = None
    kv_cache: str | None = None

    def load(self) -> GLMForCausalLM:
        """The model."""
        from glm_ms.pretrained import load_pretrained

        return load_pretrained(self.path, quantization=self.quantization, kv_cache=self.kv_cache)


@dataclass(frozen=True)
class Measured:
    """What a form gives.

    Attributes:
        perplexity: on the answers of the records.
        logits: at the first `prompts` records, of the labelled places, float32 [tokens, vocabulary].
        answers: greedy ids of the same records.
    """

    perplexity: float
    logits: np.ndarray
    answers: list[list[int]]


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, metavar="YAML", help="settings of an evaluation")
    parser.add_argument("--load_checkpoint", required=True, metavar="PATH", help="the trained weights")
    parser.add_argument(
        "--quantized", nargs="*", default=[], metavar="FOLDER", help="further forms, of glm-ms quantize"
    )
    parser.add_argument(
        "--prompts", type=_COUNT, default=32, metavar="N", help="records with greedy answers (default: 32)"
    )
    parser.add_argument("--new_tokens", type=_COUNT, default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument("--output", metavar="FILE", help="also write the table here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of values of the file")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        for folder in options.quantized:  # not only after all else is measured
            if not Path(folder).is_dir():
                raise FileError(f"--quantized {folder}: no such folder; give key=value before --quantized")
        flags = {"run_mode": "eval", "load_checkpoint": options.load_checkpoint}
        settings = load_settings(options.config, options.overrides, flags)
        lines = []
        for line in table(settings, options):
            print(line, flush=True)
            lines.append(line)
        if options.output is not None:
            Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (FileError, SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def table(settings: Settings, options: argparse.Namespace) -> Iterator[str]:
    """The lines of a Markdown table, one form of the model after another in memory."""
    from glm_ms.families import build_tokenizer
    from glm_ms.generation.graph_choice import GraphMaker

    tokenizer = build_tokenizer(settings.processor.tokenizer)
    rows, prompts = records(settings, tokenizer, options.prompts)
    limits = {"max_new_tokens": options.new_tokens, "eos_token_id": list(tokenizer.stop_token_ids)}
    path = Path(options.load_checkpoint)
    plain = Form("", path).load()
    caches = SMALLER_CACHES if GraphMaker(plain.network).why_portable is None else ()
    original, expected = plain.config.param_init_type, measure(plain, rows, prompts, limits)
    del plain
    yield f"| {' | '.join(_HEADINGS)} |"
    yield "|" + "---|" * len(_HEADINGS)
    yield f"| {original} | | {expected.perplexity:.3f} |" + " |" * (len(_HEADINGS) - 3)
    forms = [Form(str(chosen), path, chosen) for chosen in (quantization(*numbers) for numbers in FORMS)]
    forms += [Form(Path(folder).name, Path(folder)) for folder in options.quantized]
    forms += [Form(original, path, kv_cache=cache) for cache in caches]
    for form in forms:
        yield described(form, measure(form.load(), rows, prompts, limits), expected)


def records(settings: Settings, tokenizer: Any, number: int) -> tuple[list[Row], list[list[int]]]:
    """Rows with labels of all records, without padding, and the prompts of the first ones."""
    from glm_ms.data.rows import shortened
    from glm_ms.engine.from_settings import labelled_rows, prompts_with_references

    data = labelled_rows(settings.eval_dataset, tokenizer)
    asked = prompts_with_references(settings.eval_dataset, tokenizer, settings.generation)
    prompts = [asked[index]["input_ids"].tolist() for index in range(min(number, len(asked)))]
    return [shortened(data[index]) for index in range(len(data))], prompts


def measure(model: GLMForCausalLM, rows: list[Row], prompts: list[list[int]], limits: dict[str, Any]) -> Measured:
    """Runs all rows, and the prompts greedily."""
    from glm_ms.generation.graph_choice import GraphMaker
    from glm_ms.generation.paged import PagedDecoder

    decoder = PagedDecoder(GraphMaker(model.network, model.kv_cache)(1, max(len(row["input_ids"]) for row in rows)))
    loss, tokens, kept = 0.0, 0, []
    for place, row in enumerate(rows):
        labelled = row["labels"][1:] >= 0
        scores = logits_of(decoder, row)[:-1][labelled]
        loss += loss_of(scores, row["labels"][1:][labelled])
        tokens += len(scores)
        if place < len(prompts):
            kept.append(scores)
    answers = [ids[len(prompt) :] for prompt, ids in zip(prompts, model.generate(prompts, **limits))]
    return Measured(float(np.exp(loss / tokens)), np.concatenate(kept), answers)


def logits_of(decoder: Any, row: Row) -> np.ndarray:
    """The logits after every token of a row, float32 [S, V]."""
    slot, found = decoder.open(row["input_ids"], positions=row["position_ids"]), []
    while not decoder.ready(slot):
        found.append(decoder.prefill(slot, all_logits=True))
    decoder.free([slot])
    return np.concatenate(found)


def loss_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """Sum of the cross entropy of logits [n, V] and labels [n]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels[:, None], -1)[:, 0]
    return float((np.log(np.exp(shifted).sum(-1)) - chosen).sum())


def described(form: Form, found: Measured, expected: Measured) -> str:
    """A line of the table; see "What is lost" in docs/quantization.md for the meaning of its numbers."""
    change = found.perplexity / expected.perplexity - 1
    logits = np.sqrt(np.square(found.logits - expected.logits).mean()) / expected.logits.std()
    likeliest = (found.logits.argmax(-1) == expected.logits.argmax(-1)).mean()
    pairs = list(zip(found.answers, expected.answers))
    tokens = sum(max(map(len, pair)) for pair in pairs)
    same = sum(sum(a == b for a, b in zip(*pair)) for pair in pairs) / tokens
    until = sum(common(*pair) for pair in pairs) / tokens
    equal = sum(a == b for a, b in pairs)
    return (
        f"| {form.weights} | {form.kv_cache or ''} | {found.perplexity:.3f} | {change:+.3%} | {logits:.2%} | "
        f"{likeliest:.2%} | {same:.2%} | {until:.2%} | {equal} of {len(pairs)} |"
    )


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at the start that two answers share."""
    for place, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return place
    return min(len(first), len(second))


if __name__ == "__main__":
    sys.exit(main())
