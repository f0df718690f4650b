"""Compares vLLM with transformers on a folder that `convert_weight.py --to hf-glm` wrote.

    python tools/compare_vllm.py --model chatglm3-6b-glm --dtype float16

Needs vLLM, transformers and a device that both can use. For every prompt it compares the ids of the chat template and
the tokens of greedy answers. Kernels round differently, so two answers may part where the best two tokens are nearly
equal: the gap of their logits is shown, and `--max_gap` is the largest that counts as rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.program import program
from glm_ms.storage.arguments import Parser

_PROMPTS = (
    "你好",
    "北京有哪些好玩的地方？",
    "Write a function that reverses a list.",
    "1 + 1 =",
    "<|user|> 是什么？😀",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER", help="what convert_weight.py --to hf-glm wrote")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"), help="of both")
    parser.add_argument("--device", default="cuda", help="device of transformers (default: cuda)")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    parser.add_argument(
        "--max_gap", type=float, default=0.1, metavar="GAP", help="gap of logits that may be rounding (default: 0.1)"
    )
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status: 0 equal, 1 different or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    if not (Path(options.model) / "tokenizer.json").is_file():
        print(f"error: {options.model}: not a folder that convert_weight.py --to hf-glm wrote", file=sys.stderr)
        return 1
    try:
        import vllm
        from transformers import AutoTokenizer
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install vllm", file=sys.stderr)
        return 1
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chats = [[{"role": "user", "content": prompt}] for prompt in _PROMPTS]
    rows = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True) for chat in chats]
    answers = _vllm_answers(vllm, options, chats, rows)
    if answers is None:
        return 1
    gaps = _gaps(options, rows, answers)
    for prompt, gap in zip(_PROMPTS, gaps):
        print(f"{prompt!r}: {'equal' if gap is None else f'parts where the best logits are {gap:.3f} apart'}")
    return int(any(gap is not None and gap > options.max_gap for gap in gaps))


def _vllm_answers(vllm: Any, options: argparse.Namespace, chats: list, rows: list[list[int]]) -> list[list[int]] | None:
    """Greedy answers of vLLM; None, with a line for the user, if its prompts have other ids."""
    engine = vllm.LLM(model=options.model, dtype=options.dtype)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=options.max_new_tokens)
    answers = []
    for chat, ids in zip(chats, rows):
        (result,) = engine.chat(chat, greedy)
        if list(result.prompt_token_ids) != ids:
            print(f"{chat[0]['content']!r}: vLLM has the prompt {list(result.prompt_token_ids)}, transformers {ids}")
            return None
        answers.append(list(result.outputs[0].token_ids))
    return answers


def _gaps(options: argparse.Namespace, rows: list[list[int]], answers: list[list[int]]) -> list[float | None]:
    """For every answer how far transformers prefers another token, at the first that it would not choose; or None."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.to(options.device).eval()
    gaps: list[float | None] = []
    for ids, answer in zip(rows, answers):
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *answer]], device=options.device)).logits[0].float()
        scores = logits[len(ids) - 1 : len(ids) - 1 + len(answer)]
        behind = scores.max(-1).values - scores[torch.arange(len(answer)), answer]
        wrong = behind.nonzero()
        gaps.append(behind[wrong[0, 0]].item() if len(wrong) else None)
    return gaps


if __name__ == "__main__":
    sys.exit(main())
