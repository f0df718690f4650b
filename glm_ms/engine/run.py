"""Carries out one run: device, tokenizer, model, and what `run_mode` asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
from mindformers.core.context import build_context
from mindspore.communication import get_rank

from glm_ms import tokenizer as tokenizers
from glm_ms.engine.evaluate import evaluate
from glm_ms.engine.files import replace_text
from glm_ms.engine.mf_config import mindformers_config
from glm_ms.engine.predict import RESULTS_FILE, predict
from glm_ms.engine.signals import restore_signal_handlers
from glm_ms.engine.summary import summary
from glm_ms.engine.train import train
from glm_ms.engine.weights import build_model
from glm_ms.settings import Settings, SettingsError
from glm_ms.tokenizer import SentencePieceTokenizer


def run(settings: Settings) -> None:
    """Runs train, finetune, eval or predict.

    Args:
        settings: a configuration whose device has been checked.

    Raises:
        ValueError: anything that is wrong with weights, data or settings, with a message for the user.
    """
    output_dir = Path(settings.output_dir)
    restore_signal_handlers()
    _set_device(settings)
    say = _say_on_rank_zero(settings)
    ms.set_seed(settings.seed)
    tokenizer = build_tokenizer(settings)
    for note in settings.notes:
        say(note)
    if settings.is_training():
        _train(settings, tokenizer, say)
        return
    if settings.use_parallel:
        raise SettingsError(
            f"{settings.where('use_parallel')}: use_parallel: True: --run_mode {settings.run_mode} runs in one "
            "process; set use_parallel: False and start it without msrun"
        )
    model = build_model(settings, tokenizer.vocab_size, say)
    replace_text(output_dir / f"{settings.run_mode}_settings.yaml", settings.to_yaml())
    if settings.run_mode == "eval":
        for name, value in evaluate(settings, model, tokenizer, say).items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    else:
        predict(settings, model, tokenizer, _show, say)
        say(f"answers: {output_dir / RESULTS_FILE}")


def build_tokenizer(settings: Settings) -> SentencePieceTokenizer:
    """The tokenizer of `processor.tokenizer`."""
    chosen = settings.processor.tokenizer
    return getattr(tokenizers, chosen.type)(chosen.vocab_file)


def _train(settings: Settings, tokenizer: SentencePieceTokenizer, say: Callable[[str], None]) -> None:
    last = train(settings, tokenizer, say)
    if last is None:
        flag = "--load_adapter" if settings.model.pet_config.pet_type else "--load_checkpoint"
        say(f"the run is finished; to train on, begin a new one with {flag} {settings.output_dir}")
    else:
        say(f"step {last.step}: loss {last.loss:.6f}")
    for line in summary(settings):
        say(line)


def _set_device(settings: Settings) -> None:
    # MindFormers keeps a context of its own: left to itself it would turn graph mode off when training begins.
    build_context(mindformers_config(settings, total_steps=1))


def _say_on_rank_zero(settings: Settings) -> Callable[[str], None]:
    """Writes lines to standard error: a pipe of predictions must not carry remarks."""

    def say(line: str) -> None:
        if not settings.use_parallel or get_rank() == 0:
            print(line, file=sys.stderr, flush=True)

    return say


def _show(text: str) -> None:
    print(text, end="", flush=True)
