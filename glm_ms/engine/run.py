"""Carries out one run: device, tokenizer, model, and the job that `run_mode` names."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import mindspore as ms

from glm_ms.ascend_hints import overflow_mode_note
from glm_ms.data.prompts import read_prompts
from glm_ms.engine import device
from glm_ms.engine.evaluate import evaluate
from glm_ms.engine.export import export
from glm_ms.engine.predict import predict
from glm_ms.engine.process import Say, end_process_after
from glm_ms.engine.ranks import be_patient, ranks_of
from glm_ms.engine.report.summary import summary
from glm_ms.engine.weights import build_model, fuse
from glm_ms.families import build_tokenizer
from glm_ms.ops.ascend import soc_version
from glm_ms.program import restore_signal_handlers
from glm_ms.settings import Settings, SettingsError
from glm_ms.storage.errors import WriteError
from glm_ms.storage.run_folder import ANSWERS_FILE
from glm_ms.tokenizer import SentencePieceTokenizer

# Keys whose values may differ between servers; the contents of the files are compared when they are read.
_PER_SERVER = frozenset(
    {"output_dir", "load_checkpoint", "load_adapter", "vocab_file", "dataset_dir", "cache_dir", "predict_data",
     "device_id", "num_parallel_workers"}
)  # fmt: skip


def training_module() -> ModuleType:
    """`glm_ms.engine.train`. It imports MindFormers, which takes seconds, so only runs that train import it."""
    return importlib.import_module("glm_ms.engine.train")


def import_libraries(settings: Settings) -> None:
    """Imports what `run` needs besides this module; for the start of a program, where imports are quiet."""
    if settings.is_training():
        training_module()


def run(settings: Settings) -> None:
    """Runs train, finetune, eval, predict or export with settings whose device has been checked.

    In a parallel run every rank calls it. A rank that fails ends its process at once, so that the program that started
    the ranks sees it and ends the others; so does a run that is interrupted. Raises ValueError, with a message for the
    user, for weights, data or settings that cannot be used.
    """
    try:
        _run(settings)
    except BaseException as error:
        if settings.use_parallel or isinstance(error, (KeyboardInterrupt, SystemExit)):
            end_process_after(error)
        raise


def _run(settings: Settings) -> None:
    restore_signal_handlers()
    _check_prompts(settings)
    be_patient(settings)
    (training_module() if settings.is_training() else device).set_device(settings)
    ranks = ranks_of(settings)
    ranks.agree("settings", _shared(settings.to_dict()))

    def say(line: str) -> None:
        """Standard error: a pipe of predictions must not contain remarks."""
        if ranks.first:
            with suppress(OSError):  # a remark that cannot be shown ends no run
                print(line, file=sys.stderr, flush=True)

    def show(text: str) -> None:
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise WriteError(f"standard output: {error.strerror}; the answers are in {answers}") from error

    answers = Path(settings.output_dir) / ANSWERS_FILE
    ms.set_seed(settings.seed)
    tokenizer = build_tokenizer(settings.processor.tokenizer)
    for note in filter(None, [*settings.notes, overflow_mode_note(soc_version())]):
        say(note)
    if settings.is_training():
        _train(settings, tokenizer, say)
        return
    model = build_model(settings, tokenizer.vocab_size, say)
    fuse(settings, model, say)
    if settings.run_mode == "eval":
        scores = evaluate(settings, model, tokenizer, say)
        for name, value in scores.items() if ranks.first else ():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    elif settings.run_mode == "export":
        for path in export(settings, model, say):
            say(f"exported: {path}")
    else:
        predict(settings, model, tokenizer, show, say)
        say(f"answers: {answers}")


def _train(settings: Settings, tokenizer: SentencePieceTokenizer, say: Say) -> None:
    last = training_module().train(settings, tokenizer, say)
    if last is None:
        flag = "--load_adapter" if settings.model.pet_config.pet_type else "--load_checkpoint"
        say(f"the run is finished; to train further, start a new run with {flag} {settings.output_dir}")
    else:
        say(f"step {last.step}: loss {last.loss:.6f}")
    for line in summary(settings):
        say(line)


def _check_prompts(settings: Settings) -> None:
    if settings.use_parallel and settings.run_mode == "predict" and settings.predict_data == "-":
        raise SettingsError(
            f"{settings.where('predict_data')}: predict_data: -: the ranks of msrun get no standard input; put the "
            "prompts into a .txt or .jsonl file, or run one process with --use_parallel False"
        )
    if settings.run_mode == "predict" and os.path.isfile(settings.predict_data):
        read_prompts(settings.predict_data, lambda _: None)  # its errors come before the weights are loaded


def _shared(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    """`section.key` -> value of the settings that all ranks must share: all except places of files and cards."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found.update(_shared(value, f"{section}{key}."))
        elif key not in _PER_SERVER:
            found[f"{section}{key}"] = value
    return found
