"""Carries out one run: device, tokenizer, model, and what `run_mode` asks for."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.core.context import build_context

from glm_ms.ascend_hints import overflow_mode_note
from glm_ms.engine.evaluate import evaluate
from glm_ms.engine.predict import RESULTS_FILE, predict
from glm_ms.engine.ranks import be_patient, ranks_of
from glm_ms.engine.report.summary import summary
from glm_ms.engine.signals import restore_signal_handlers
from glm_ms.engine.step.trainer_config import mindformers_config
from glm_ms.engine.train import train
from glm_ms.engine.weights import build_model, fuse
from glm_ms.families import family_of
from glm_ms.ops.ascend import soc_version
from glm_ms.settings import Settings, SettingsError
from glm_ms.storage.atomic import replace_text
from glm_ms.tokenizer import SentencePieceTokenizer

# Keys whose values may differ from server to server; what the files hold is compared where they are read.
_OWN_TO_A_SERVER = frozenset(
    {"output_dir", "load_checkpoint", "load_adapter", "vocab_file", "dataset_dir", "cache_dir", "predict_data",
     "device_id", "num_parallel_workers"}
)  # fmt: skip


def run(settings: Settings) -> None:
    """Runs train, finetune, eval or predict.

    In a parallel run every rank calls it. A rank that fails ends its process at once, so that whoever started the
    ranks sees it and ends the others.

    Args:
        settings: a configuration whose device has been checked.

    Raises:
        ValueError: anything that is wrong with weights, data or settings, with a message for the user.
    """
    try:
        _run(settings)
    except BaseException as error:
        if settings.use_parallel:
            atexit.register(_end_process, _status(error))
        raise


def _run(settings: Settings) -> None:
    output_dir = Path(settings.output_dir)
    restore_signal_handlers()
    _check_input(settings)
    be_patient(settings)
    _set_device(settings)
    ranks = ranks_of(settings)
    ranks.agree("settings", _shared(settings.to_dict()))
    say = _say_on_rank_zero(settings)
    ms.set_seed(settings.seed)
    tokenizer = build_tokenizer(settings)
    overflow = overflow_mode_note(soc_version())
    for note in [*settings.notes, *([overflow] if overflow else [])]:
        say(note)
    if settings.is_training():
        _train(settings, tokenizer, say)
        return
    model = build_model(settings, tokenizer.vocab_size, say)
    fuse(settings, model, say)
    if ranks.first:
        replace_text(output_dir / f"{settings.run_mode}_settings.yaml", settings.to_yaml())
    if settings.run_mode == "eval":
        scores = evaluate(settings, model, tokenizer, say)
        for name, value in scores.items() if ranks.first else ():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    else:
        predict(settings, model, tokenizer, _show, say)
        say(f"answers: {output_dir / RESULTS_FILE}")


def _shared(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    """`section.key` -> value of the settings that all ranks must share: all but places of files and cards."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found.update(_shared(value, f"{section}{key}."))
        elif key not in _OWN_TO_A_SERVER:
            found[f"{section}{key}"] = value
    return found


def build_tokenizer(settings: Settings) -> SentencePieceTokenizer:
    """The tokenizer of `processor.tokenizer`."""
    chosen = settings.processor.tokenizer
    return family_of(chosen.type).tokenizer(chosen.vocab_file)


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


def _check_input(settings: Settings) -> None:
    """Raises SettingsError for prompts that no rank would get."""
    if settings.use_parallel and settings.run_mode == "predict" and settings.predict_data == "-":
        raise SettingsError(
            f"{settings.where('predict_data')}: predict_data: -: the ranks of msrun get no standard input; put the "
            "prompts into a .txt or .jsonl file, or run one process with --use_parallel False"
        )


def _status(error: BaseException) -> int:
    """The exit status of a process that this error ends, as in run_glm.py."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, SettingsError):
        return 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _end_process(status: int) -> None:
    """Ends a failed rank. As the last handler registered it runs before MindSpore's own, which would wait for the
    ranks that live on; the error has been printed by now."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a pipe that was closed
            continue
    os._exit(status)


def _say_on_rank_zero(settings: Settings) -> Callable[[str], None]:
    """Writes lines to standard error: a pipe of predictions must not carry remarks."""

    def say(line: str) -> None:
        if ranks_of(settings).first:
            print(line, file=sys.stderr, flush=True)

    return say


def _show(text: str) -> None:
    print(text, end="", flush=True)
