"""The last lines of a training run: where its result is, and commands that use it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from glm_ms.metrics import LOSS, TEXT, takes
from glm_ms.quant.checkpoint import described_quantization
from glm_ms.settings import Settings, SettingsError, parse_args, read_settings
from glm_ms.settings.schema import is_sharded
from glm_ms.storage import run_folder
from glm_ms.storage.errors import CheckpointError

PROGRAM = "run_glm.py"
_PROMPT = "你好"
_PLACEHOLDER = "RECORDS.json"


def summary(settings: Settings) -> list[str]:
    """Lines for the user at the end of a run, whose output folder has `settings.yaml` and checkpoints.

    Every command is checked; the problems that prevent it from running are named beside it.
    """
    output_dir = result = Path(settings.output_dir)
    if is_sharded(settings):
        return _sharded(settings)
    kinds = {"lora": "LoRA adapter", "ptuning2": "P-Tuning adapter"}
    kind = kinds.get(settings.model.pet_config.pet_type or "", "weights")
    lines = [f"{kind} and training state: {path}" for _, path in run_folder.list_checkpoints(output_dir)[-1:]]
    with suppress(CheckpointError):
        step = run_folder.best_checkpoint(output_dir).name
        result = output_dir / run_folder.CHECKPOINTS / run_folder.BEST
        lines.append(f"{kind} with the best evaluation: {result} ({step})")
    for purpose, command in _commands(settings, result):
        lines.append(f"{purpose}: {shlex.join(command)}{_missing(command)}")
    return lines


def _sharded(settings: Settings) -> list[str]:
    """A sharded run: its slices must be merged first."""
    output_dir, merged = Path(settings.output_dir), f"{settings.output_dir}_merged"
    tool = _program().parent / "tools" / "transform_ckpt.py"
    merge = [
        "python", str(tool), "--src_ckpt_strategy", str(output_dir / run_folder.STRATEGIES), "--src_ckpt_dir",
        str(output_dir / run_folder.SLICES), "--dst_ckpt_dir", merged, "--prefix", "glm_",
    ]  # fmt: skip
    weights = _weights_flags(settings, Path(merged))
    evaluate = [*_run(settings, "eval"), *weights, *_evaluation_flags(settings)]
    return [
        f"slices of every card: {output_dir / run_folder.SLICES}",
        f"to merge: {shlex.join(merge)}",
        f"then to evaluate: {shlex.join(evaluate)}{_missing(evaluate)}",
    ]


def _commands(settings: Settings, result: Path) -> Iterator[tuple[str, list[str]]]:
    """(purpose, command) for each use of the result, which is an output folder or a checkpoint."""
    weights = _weights_flags(settings, result)
    # Answers of half the length leave room for a prompt.
    short = _answer_length(settings, max(settings.model.model_config.seq_length // 2, 1))
    yield "to evaluate", [*_run(settings, "eval"), *weights, *_evaluation_flags(settings)]
    yield "to predict", [*_run(settings, "predict"), *weights, "--predict_data", _PROMPT, *short]
    if settings.model.pet_config.pet_type == "lora" and not _is_quantized(settings):  # integers take no update
        base = settings.load_checkpoint
        config = run_folder.resolve_checkpoint(base) / "config.json"
        command = [
            "python", str(_program().parent / "tools" / "merge_lora.py"), "--base", base, "--adapter", str(result),
            "--output", f"{settings.output_dir}_merged",
        ]  # fmt: skip
        if not config.is_file():  # weights do not describe the network
            command += ["--config", str(Path(settings.output_dir) / run_folder.SETTINGS_FILE)]
        yield "to merge", command


def _is_quantized(settings: Settings) -> bool:
    """Whether the base of an adapter has weights of 8 or 4 bits, in its files or while it is loaded."""
    return bool(settings.model.quantization_bit) or (
        described_quantization(run_folder.resolve_checkpoint(settings.load_checkpoint)) is not None
    )


def _program() -> Path:
    """The path of the program as it was started, so that the commands work from the same folder."""
    started = Path(sys.argv[0])
    return started if started.name == PROGRAM else Path(PROGRAM)


def _run(settings: Settings, mode: str) -> list[str]:
    """The settings of the run contain vocabulary, network and data."""
    command = ["python", str(_program()), "--config", str(Path(settings.output_dir) / run_folder.SETTINGS_FILE)]
    command += ["--run_mode", mode]
    return [*command, "--use_parallel", "False"] if settings.use_parallel else command


def _weights_flags(settings: Settings, result: Path) -> list[str]:
    if settings.model.pet_config.pet_type is None:
        return ["--load_checkpoint", str(result)]
    return ["--load_checkpoint", settings.load_checkpoint, "--load_adapter", str(result)]


def _evaluation_flags(settings: Settings) -> list[str]:
    """Records and lengths that an evaluation needs and training does not."""
    data, train = settings.eval_dataset, settings.train_dataset
    flags = [] if data.data_loader.dataset_dir else ["--eval_dataset", _PLACEHOLDER]
    room, prompt = settings.model.model_config.seq_length, data.max_source_length
    if prompt + data.max_target_length + 1 > room and takes(LOSS, settings.metric.type):
        prompt = train.max_source_length
        target = train.max_target_length
        flags += [f"eval_dataset.max_source_length={prompt}", f"eval_dataset.max_target_length={target}"]
    return flags + (_answer_length(settings, room - prompt) if takes(TEXT, settings.metric.type) else [])


def _answer_length(settings: Settings, longest: int) -> list[str]:
    """The flag that shortens answers to at most `longest` tokens, if the configured length exceeds it."""
    generation = settings.generation
    fits = generation.max_length is not None or generation.max_new_tokens <= longest
    return [] if fits else [f"generation.max_new_tokens={longest}"]


def _missing(command: list[str]) -> str:
    """The problems that prevent a command of run_glm.py from running."""
    if not command[1].endswith(PROGRAM):
        return ""
    try:
        config, flags, overrides = parse_args(command[2:])
        problems = read_settings(config, overrides, flags)[1]
    except SettingsError as error:
        problems = error.problems
    return f"  (still needs: {'; '.join(map(str, problems))})" if problems else ""
