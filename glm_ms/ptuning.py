"""P-Tuning v2 by one call, with the arguments of `ptuning/main.py` of ChatGLM2-6B; the engine is that of run_glm.py."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from glm_ms.families import read_config
from glm_ms.pretrained import find_tokenizer, load_with_tokenizer
from glm_ms.quant import Quantization, quantization
from glm_ms.settings import SettingsError, load_settings
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.storage.readers import read_object
from glm_ms.storage.run_folder import PREDICTIONS_FILE, SCORES_FILE, list_checkpoints, resolve_checkpoint, step_folder
from glm_ms.tokenizer.base import CHAT

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM
    from glm_ms.model.config import GLMConfig
    from glm_ms.tokenizer import SentencePieceTokenizer

GENERATED_FILE = "generated_predictions.txt"
_ENDLESS = 10**6  # epochs: `max_steps` ends the training
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclasses.dataclass
class Arguments:
    """Arguments of `ptuning`; names, meaning and defaults are those of the original and of its Seq2SeqTrainer.

    Files have a JSON object a line. The last ones have no counterpart in the original.
    """

    model_name_or_path: str  # the base: see `glm_ms.load_pretrained`; nothing is downloaded
    output_dir: str
    prompt_column: str
    response_column: str
    do_train: bool = False
    do_predict: bool = False
    train_file: str | None = None
    validation_file: str | None = None  # of do_train: its perplexity is measured at the end
    test_file: str | None = None  # of do_predict; None: validation_file
    history_column: str | None = None
    ptuning_checkpoint: str | None = None  # the prefix of do_predict; None: the newest one in output_dir
    pre_seq_len: int | None = None  # positions of the prefix; None: all weights are trained, as in the original
    prefix_projection: bool = False
    max_source_length: int = 1024
    max_target_length: int = 128
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 3
    max_steps: int = -1  # updates; above 0 they replace num_train_epochs
    learning_rate: float = 5e-5  # falls to 0 in a line
    warmup_steps: int = 0
    weight_decay: float = 0.0
    logging_steps: int = 500
    save_steps: int = 500
    save_total_limit: int | None = None
    seed: int = 42
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    preprocessing_num_workers: int = 2
    ignore_pad_token_for_loss: bool = True
    predict_with_generate: bool = True  # False: do_predict measures the perplexity
    overwrite_output_dir: bool = False
    overwrite_cache: bool = False  # either is right: a changed file is noticed
    quantization_bit: int | None = None  # 4 or 8: weights of linear layers become integers when they are loaded
    model_generation: int | None = None  # 2 or 3, where nothing beside the model tells
    device_target: str = "CPU"  # or "Ascend"


def ptuning(**arguments: Any) -> dict[str, Any]:
    """Trains a prefix with `do_train`, writes and scores answers with `do_predict`.

    A training saves its prefixes below `output_dir`, a prediction writes `generated_predictions.txt`, a JSON object
    with `labels` and `predict` for each record. The settings of the run are in `ptuning_train.yaml` and
    `ptuning_predict.yaml` there; run_glm.py takes them with --config.

    Args:
        arguments: see `Arguments`.

    Returns:
        The scores of do_predict; empty without it.

    Raises:
        TypeError: an unknown argument, or a required one is missing.
        ValueError: arguments, files or weights that cannot be used.
    """
    given = Arguments(**arguments)
    if not given.do_train and not given.do_predict:
        raise ValueError("do_train, do_predict: both are false, so there is nothing to do; set one")
    chosen_bits(given.quantization_bit)
    output = Path(given.output_dir)
    if given.do_train:
        if given.train_file is None:
            raise ValueError("train_file: missing; do_train reads it")
        if list_checkpoints(output) and not given.overwrite_output_dir:
            raise ValueError(f"output_dir: {output} has checkpoints; set overwrite_output_dir=True or name another one")
        _run(_training(given), output / "ptuning_train.yaml")
    if not given.do_predict:
        return {}
    _run(_prediction(given), output / "ptuning_predict.yaml")
    if given.predict_with_generate:
        _write_generated(output)
    return read_object(output / SCORES_FILE)


def load_ptuning_checkpoint(
    model_name_or_path: str | Path,
    ptuning_checkpoint: str | Path | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    quantization_bit: int | None = None,
    model_generation: int | None = None,
) -> tuple[SentencePieceTokenizer, GLMConfig, GLMForCausalLM]:
    """Tokenizer, configuration and model, with the prefix of a checkpoint if one is given.

    Args:
        model_name_or_path, model_generation, quantization_bit: as in `Arguments`.
        ptuning_checkpoint: folder of a prefix, or of its run, which means the newest one.
        pre_seq_len, prefix_projection: those of the checkpoint, if they are given.

    Raises:
        ValueError: a file that cannot be used, or a prefix of another length or kind.
    """
    bits = chosen_bits(quantization_bit)
    path = None if ptuning_checkpoint is None else _checkpoint(ptuning_checkpoint)
    model, tokenizer = load_with_tokenizer(
        model_name_or_path, adapter=path, generation=model_generation, quantization=bits
    )
    wanted = {"pre_seq_len": pre_seq_len, "prefix_projection": prefix_projection or None}
    config = None if model.adapter is None else model.adapter.config
    for name, value in wanted.items():
        found = getattr(config, name, None)
        if value is not None and value != found:
            raise ValueError(f"{name} = {value}: the prefix in {path} has {found}; give that, or leave it out")
    return tokenizer, model.config, model


def chosen_bits(bits: int | None) -> Quantization | None:
    """The quantization of `quantization_bit`; QuantizationError, a ValueError, for other values than None, 4 and 8."""
    return None if bits is None else quantization(bits)


def _training(given: Arguments) -> dict[str, Any]:
    """The settings of run_mode finetune."""
    settings = _common(given)
    settings.update(
        run_mode="finetune",
        train_dataset={
            **_dataset(given, given.train_file, shuffle=True),
            "num_samples": given.max_train_samples,
            "num_parallel_workers": given.preprocessing_num_workers,
            "drop_remainder": False,
        },
        runner_config={
            "epochs": _ENDLESS if given.max_steps > 0 else given.num_train_epochs,
            "max_steps": given.max_steps if given.max_steps > 0 else None,
            "batch_size": given.per_device_train_batch_size,
            "gradient_accumulation_steps": given.gradient_accumulation_steps,
        },
        optimizer={"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": given.weight_decay},
        lr_schedule={
            "type": "LinearWithWarmUpLR",
            "learning_rate": given.learning_rate,
            "warmup_steps": given.warmup_steps,
        },
        checkpoint={"save_steps": given.save_steps, "keep_max": given.save_total_limit or _ENDLESS},
        logging={"log_steps": given.logging_steps},
    )
    if given.pre_seq_len is not None:
        settings["model"]["pet_config"] = _prefix(given)
    if given.device_target == "Ascend":  # small float16 gradients would vanish
        settings["runner_wrapper"] = {"scale_sense": {"type": "DynamicLossScaleUpdateCell"}}
    if given.validation_file is not None:
        held_out = {**_dataset(given, given.validation_file, shuffle=False), "num_samples": given.max_eval_samples}
        settings.update(
            do_eval=True,
            eval_step_interval=given.max_steps if given.max_steps > 0 else -1,
            eval_epoch_interval=-1 if given.max_steps > 0 else given.num_train_epochs,
            eval_dataset={**held_out, "batch_size": given.per_device_eval_batch_size},
            metric={"type": ["PerplexityMetric"]},
        )
    return settings


def _prediction(given: Arguments) -> dict[str, Any]:
    """The settings of run_mode eval."""
    settings, file = _common(given), given.test_file or given.validation_file
    if file is None:
        raise ValueError("test_file: missing; do_predict reads it, or validation_file")
    longest = settings["model"]["model_config"]["seq_length"]
    settings.update(
        run_mode="eval",
        eval_dataset={
            **_dataset(given, file, shuffle=False),
            "num_samples": given.max_predict_samples,
            "batch_size": given.per_device_eval_batch_size,
        },
        metric={"type": ["ADGENMetric" if given.predict_with_generate else "PerplexityMetric"]},
        generation={  # as the original calls `predict`
            "max_length": longest,
            "max_new_tokens": longest,
            "do_sample": True,
            "top_p": 0.7,
            "temperature": 0.95,
        },
    )
    if given.pre_seq_len is not None or given.ptuning_checkpoint is not None:
        settings["load_adapter"] = str(_checkpoint(given.ptuning_checkpoint or given.output_dir))
    if given.pre_seq_len is not None:
        settings["model"]["pet_config"] = _prefix(given)
    return settings


def _common(given: Arguments) -> dict[str, Any]:
    family, vocab_file, options = find_tokenizer(given.model_name_or_path, given.model_generation)
    network = dataclasses.asdict(read_config(resolve_checkpoint(given.model_name_or_path)))
    dtype = "float16" if given.device_target == "Ascend" else "float32"
    network.update(
        seq_length=given.max_source_length + given.max_target_length + 1, param_init_type=dtype, compute_dtype=dtype
    )
    return {
        "seed": given.seed,
        "output_dir": given.output_dir,
        "load_checkpoint": str(given.model_name_or_path),
        "context": {"device_target": given.device_target},
        "model": {"model_config": network, "quantization_bit": given.quantization_bit},
        "processor": {
            "tokenizer": {
                "type": family.tokenizer.__name__,
                "vocab_file": str(vocab_file),
                "template": options.get("template", CHAT),
            }
        },
    }


def _prefix(given: Arguments) -> dict[str, Any]:
    return {"pet_type": "ptuning2", "pre_seq_len": given.pre_seq_len, "prefix_projection": given.prefix_projection}


def _dataset(given: Arguments, file: str | None, shuffle: bool) -> dict[str, Any]:
    return {
        "data_loader": {
            "type": "ADGenDataLoader",
            "dataset_dir": file,
            "shuffle": shuffle,
            "origin_columns": [given.prompt_column, given.response_column],
            "history_column": given.history_column,
        },
        "max_source_length": given.max_source_length,
        "max_target_length": given.max_target_length,
        "ignore_pad_token_for_loss": given.ignore_pad_token_for_loss,
    }


def _run(values: dict[str, Any], path: Path) -> None:
    """Writes settings and carries them out, as run_glm.py does."""
    from glm_ms.engine.process import quiet_imports

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output_dir: {path.parent}: cannot be made: {error.strerror}") from None
    replace_text(path, yaml.safe_dump(values, allow_unicode=True, sort_keys=False))
    settings = load_settings(path)
    with quiet_imports(log_folder=settings.output_dir):
        from glm_ms.engine.run import import_libraries, run

        import_libraries(settings)
    run(settings)


def _write_generated(output: Path) -> None:
    """`generated_predictions.txt`: an object with the reference and the prediction of each record, in their order."""
    lines = []
    for raw in raw_values(output / PREDICTIONS_FILE):
        value = parse_value(raw, output / PREDICTIONS_FILE)
        lines.append(json.dumps({"labels": value["reference"], "predict": value["prediction"]}, ensure_ascii=False))
    replace_text(output / GENERATED_FILE, "\n".join(lines))
    print(f"predictions beside labels: {output / GENERATED_FILE}", file=sys.stderr)


def _checkpoint(path: str | Path) -> Path:
    """A path as the original names its checkpoints, `OUTPUT/checkpoint-100`, for the one of a run here."""
    path = Path(path)
    step = _CHECKPOINT.fullmatch(path.name)
    if step is not None and not path.exists() and (ours := step_folder(path.parent, int(step[1]))).is_dir():
        return ours
    return path
