"""What the jobs of `GLMTextGenerationTrainer` share: checks before they begin, and models that were given to them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mindspore as ms
from mindformers import MindFormerConfig
from mindformers.tools.utils import get_real_rank
from mindspore.dataset import Dataset

from glm_ms.convert import CheckpointError
from glm_ms.data import DataError
from glm_ms.engine.dataset_rows import DatasetRows
from glm_ms.engine.process import restore_signal_handlers
from glm_ms.engine.weights import adapter_config, different_fields
from glm_ms.mindformers_api.model import GLMForCausalLM
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer
from glm_ms.peft.store import is_adapter_folder
from glm_ms.settings import Problem, Settings, SettingsError, check_machine
from glm_ms.settings.checks import check
from glm_ms.settings.schema import AUTO
from glm_ms.storage.run_folder import resolve_checkpoint

if TYPE_CHECKING:
    from glm_ms import generation
    from glm_ms.tokenizer import SentencePieceTokenizer

_RECORDS = "train_dataset.data_loader.dataset_dir"


def say(line: str) -> None:
    """A remark for the user: standard error of the first process, as in `run_glm.py`."""
    if get_real_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def refuse(given: dict[str, Any]) -> None:
    """Raises SettingsError for an object handed to the Trainer that the YAML decides on here."""
    for name, value in given.items():
        if value is not None:
            raise SettingsError(
                f"Trainer({name}=...): not supported with glm_ms, whose YAML says what is used (optimizer, "
                "lr_schedule, runner_wrapper, eval_dataset, metric)"
            )


def begin(settings: Settings, with_records: bool = True) -> SentencePieceTokenizer:
    """Checks a job as `run_glm.py` does, sets the device and builds the tokenizer.

    Args:
        settings: adjusted in place, with a line to the user for each note.
        with_records: the training records are those of the YAML.

    Raises:
        SettingsError: with every problem found.
        VocabularyError: the tokenizer's file cannot be used.
    """
    from glm_ms.engine.from_settings import build_tokenizer
    from glm_ms.engine.run import set_device

    problems = [problem for problem in check(settings) if with_records or problem.key != _RECORDS]
    if settings.use_parallel and not settings.is_training():
        message = f"True: {settings.run_mode} runs in one process"
        problems.append(Problem("use_parallel", message, where=settings.where("use_parallel")))
    if problems:
        raise SettingsError(problems)
    check_machine(settings)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    restore_signal_handlers()
    set_device(settings)
    ms.set_seed(settings.seed)
    for note in settings.notes:
        say(note)
    return build_tokenizer(settings)


def take_checkpoint(config: MindFormerConfig) -> tuple[str | None, Any]:
    """What a call names as `finetune_checkpoint=` and the like, and its `resume_training=`; None where it does not.

    The Trainer passes both in its configuration and leaves them there for the calls that follow: they are taken out.
    """
    path, resume = config.get("load_checkpoint") or None, config.get("resume_training")
    config.update(load_checkpoint=None, resume_training=None, checkpoint={}, use_legacy_format=True)
    return path, resume


def apply_checkpoint(settings: Settings, path: str | None, resume: Any) -> bool:
    """Lets the checkpoint of a training call come before the YAML's.

    Args:
        settings: changed in place.
        path, resume: see `take_checkpoint`.

    Returns:
        Whether the call names weights to begin with.

    Raises:
        SettingsError: `resume` is not True or False.
    """
    if resume not in (None, True, False):
        raise SettingsError(
            f"resume_training = {resume!r}: must be True or False; name it as resume_from_checkpoint"
        )
    if resume:
        settings.resume_training = path or True
    elif resume is False:
        settings.resume_training = False
    if path and not resume:
        settings.load_checkpoint = path
    return bool(path and not resume)


def check_network(network: GLMForCausalLM, settings: Settings) -> None:
    """Holds a model that was given to the YAML's architecture.

    Raises:
        SettingsError: they are different networks, or the model is shorter than the YAML asks.
    """
    core = network.core.config
    wanted = settings.model.model_config
    if wanted.padded_vocab_size == AUTO:
        wanted.padded_vocab_size = core.padded_vocab_size
    different = different_fields(settings.glm_config(), core, "the model")
    if core.seq_length < wanted.seq_length:
        different.append(
            f"model.model_config.seq_length: {wanted.seq_length}, in the model {core.seq_length}"
        )
    if different:
        raise SettingsError(
            f"{settings.source} and the model given are different networks: {'; '.join(different)}"
        )


def name_weights(settings: Settings, path: str) -> None:
    """Makes a checkpoint the `load_checkpoint` of a job, or its `load_adapter` if it holds an adapter alone.

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    adapter = is_adapter_folder(resolve_checkpoint(path))
    setattr(settings, "load_adapter" if adapter else "load_checkpoint", path)


def name_own_weights(settings: Settings, network: GLMForCausalLM) -> None:
    """Makes the weights and the adapter of a model that was given those of a job, where it has some."""
    settings.load_checkpoint = network.weights_from or settings.load_checkpoint
    settings.load_adapter = network.adapter_from or settings.load_adapter


def with_weights(network: GLMForCausalLM, settings: Settings) -> generation.GLMForCausalLM:
    """A model that was given, with the weights and the adapter of the settings.

    Raises:
        CheckpointError: they cannot be loaded, or the model has another adapter.
    """
    core = network.core
    if settings.load_checkpoint and settings.load_checkpoint != network.weights_from:
        network.load_weights(settings.load_checkpoint)
    say(f"weights: {network.weights_from or 'random'}")
    if settings.load_adapter and settings.load_adapter != network.adapter_from:
        if core.adapter is not None:
            raise CheckpointError(
                f"{settings.load_adapter}: the model given has an adapter already, from {network.adapter_from}"
            )
        say(str(core.load_adapter(settings.load_adapter)))
        network.adapter_from = settings.load_adapter
    return core


def plan_training(network: GLMForCausalLM, settings: Settings, asked: bool) -> None:
    """Fits settings of a training to a model that was given; nothing is changed in the model.

    Args:
        network: the model.
        settings: `load_checkpoint` becomes the model's own weights, if it has some.
        asked: the call names `load_checkpoint`, which then comes before the model's own weights.

    Raises:
        CheckpointError: its adapter does not go with the settings.
    """
    check_network(network, settings)
    alone = network.core.adapter is not None and settings.model.pet_config.pet_type is None
    if settings.load_adapter or alone:
        raise CheckpointError(
            "Trainer(model=...): the model has an adapter or load_adapter names one; to train an adapter on, leave the "
            "model out and name base and adapter in the YAML"
        )
    if not asked:
        settings.load_checkpoint = network.weights_from or settings.load_checkpoint
    if not settings.load_checkpoint:
        settings.model.init = "random"  # what the model holds is wanted


def before_training(network: GLMForCausalLM, settings: Settings) -> generation.GLMForCausalLM:
    """The model itself, with the weights of the settings and, if they ask for one, an adapter.

    Raises:
        CheckpointError: weights that cannot be loaded.
    """
    if settings.resume_training is False:
        with_weights(network, settings)
    adapter = adapter_config(settings)
    if adapter is not None and network.core.adapter is None:
        network.core.add_adapter(adapter, settings.seed)
    return network.core


def after_training(network: GLMForCausalLM, settings: Settings) -> None:
    """Notes in a model that was trained where its weights, or its adapter, now lie."""
    network.core.network.set_train(False)
    if settings.model.pet_config.pet_type is None:
        network.weights_from = settings.output_dir
    else:
        network.adapter_from = settings.output_dir


def rows_of(dataset: Any, settings: Settings) -> DatasetRows:
    """Rows of a data set that was given; batch size and order of the run become its own.

    Raises:
        DataError: not a MindSpore data set, or rows that cannot be used.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            "Trainer(train_dataset=...): expected the path of a file or a MindSpore data set, found "
            f"{type(dataset).__name__}"
        )
    rows = DatasetRows(dataset)
    if rows.seq_length > settings.model.model_config.seq_length:
        raise DataError(
            f"train_dataset: rows of {rows.seq_length} tokens exceed model.model_config.seq_length = "
            f"{settings.model.model_config.seq_length}"
        )
    settings.runner_config.batch_size = rows.batch_size
    settings.train_dataset.data_loader.shuffle = False
    say("train_dataset: batch size and order are those of the data set, the same in every epoch")
    return rows


def use_tokenizer(settings: Settings, tokenizer: Any) -> None:
    """Puts a tokenizer that was given in place of the YAML's.

    Raises:
        SettingsError: it is not one of this project.
    """
    if not isinstance(tokenizer, ChatGLMTokenizer):
        raise SettingsError(
            f"Trainer(tokenizer=...): {type(tokenizer).__name__}: expected what AutoTokenizer makes of a GLM folder or "
            "YAML"
        )
    chosen = settings.processor.tokenizer
    chosen.type, chosen.vocab_file = type(tokenizer.core).__name__, tokenizer.vocab_file
