"""Compares a trained model with its quantized forms on real text: perplexity, logits, greedy answers.

    python tools/compare_quantization.py --config configs/tiny/eval_glm3_tiny.yaml \
        --load_checkpoint output/tiny/glm3_finetune --prompts 8

The settings, those of run_mode eval, name the model and the records to measure on. Weights with calibration are
quantized by `glm-ms quantize --calibration FILE`: name the folders with --quantized.
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
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import FileError

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM

# (bits, group) of the forms that are made of the weights in memory.
FORMS = ((8, None), (4, 32), (4, 64), (4, 128))
_HEADINGS = ("weights", "perplexity", "change", "mean change of a logit", "same likeliest token", "same greedy tokens")


@dataclass(frozen=True)
class Measured:
    """What one form of the weights gives.

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
        "--prompts", type=int, default=32, metavar="N", help="records with greedy answers (default: 32)"
    )
    parser.add_argument("--new_tokens", type=int, default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument("--output", metavar="FILE", help="also write the table here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of values of the file")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
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
    """The lines of a Markdown table, one form of the weights after another in memory."""
    from glm_ms.families import build_tokenizer
    from glm_ms.pretrained import load_pretrained

    tokenizer = build_tokenizer(settings.processor.tokenizer)
    rows, prompts = records(settings, tokenizer, options.prompts)
    plain = load_pretrained(options.load_checkpoint)
    limits = {"max_new_tokens": options.new_tokens, "eos_token_id": list(tokenizer.stop_token_ids)}
    expected = measure(plain, rows, prompts, limits)
    yield f"| {' | '.join(_HEADINGS)} |"
    yield "|" + "---|" * len(_HEADINGS)
    yield f"| {plain.config.param_init_type} | {expected.perplexity:.3f} | | | | |"
    forms: list[tuple[str, Any]] = [(str(form), form) for form in (quantization(*numbers) for numbers in FORMS)]
    forms += [(f"{Path(folder).name}", Path(folder)) for folder in options.quantized]
    for name, form in forms:
        made = isinstance(form, Quantization)
        model = load_pretrained(options.load_checkpoint if made else form, quantization=form if made else None)
        yield described(name, measure(model, rows, prompts, limits), expected)


def records(settings: Settings, tokenizer: Any, number: int) -> tuple[list[Any], list[list[int]]]:
    """Rows with labels of all records, and the prompts of the first ones."""
    from glm_ms.engine.from_settings import labelled_rows, prompts_with_references

    data = labelled_rows(settings.eval_dataset, tokenizer)
    asked = prompts_with_references(settings.eval_dataset, tokenizer, settings.generation)
    prompts = [asked[index]["input_ids"].tolist() for index in range(min(number, len(asked)))]
    return [data[index] for index in range(len(data))], prompts


def measure(model: GLMForCausalLM, rows: list[Any], prompts: list[list[int]], limits: dict[str, Any]) -> Measured:
    """Runs all rows, and the prompts greedily."""
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    loss, tokens, logits = 0.0, 0, []
    for place, row in enumerate(rows):
        batch = tuple(row[name][None] for name in names)
        total, count = model.loss_sum(batch)
        loss, tokens = loss + total, tokens + count
        if place < len(prompts):
            scores = model(batch[0], batch[2], batch[3]).asnumpy()[0, :-1]
            logits.append(scores[row["labels"][1:] >= 0])
    answers = [ids[len(prompt) :] for prompt, ids in zip(prompts, model.generate(prompts, **limits))]
    return Measured(float(np.exp(loss / tokens)), np.concatenate(logits), answers)


def described(name: str, found: Measured, expected: Measured) -> str:
    """A line of the table.

    A token is the same if it is at the same place of the answer; after the first other one most are not.
    """
    change = found.perplexity / expected.perplexity - 1
    logits = np.abs(found.logits - expected.logits).mean()
    likeliest = (found.logits.argmax(-1) == expected.logits.argmax(-1)).mean()
    pairs = list(zip(found.answers, expected.answers))
    same = sum(sum(a == b for a, b in zip(*pair)) for pair in pairs) / sum(max(map(len, pair)) for pair in pairs)
    return f"| {name} | {found.perplexity:.3f} | {change:+.3%} | {logits:.4f} | {likeliest:.2%} | {same:.2%} |"


if __name__ == "__main__":
    sys.exit(main())
