"""The task trainer of MindFormers' `Trainer(args="<YAML of glm_ms>", task="text_generation")`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers import MindFormerConfig
from mindformers.tools.utils import get_real_rank
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore.dataset import Dataset
from mindspore.train import Callback

from glm_ms.engine.batches import DatasetRows
from glm_ms.engine.evaluate import evaluate
from glm_ms.engine.mindformers_internals import quiet_terminal
from glm_ms.engine.predict import predict
from glm_ms.engine.report.summary import summary
from glm_ms.engine.train import Given, set_device, train
from glm_ms.engine.weights import (
    adapter_config,
    build_model,
    check_adapter_found,
    check_vocabulary,
    different_fields,
    fuse,
    lora_alpha,
)
from glm_ms.families import build_tokenizer
from glm_ms.generation import GLMForCausalLM
from glm_ms.mindformers_api.generation import set_generation
from glm_ms.mindformers_api.model import MindFormersGLM
from glm_ms.mindformers_api.run_yaml import OWN_SECTION, settings_of
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer, ChatPrompt
from glm_ms.peft import is_adapter_folder
from glm_ms.program import restore_signal_handlers
from glm_ms.settings import Problem, Settings, SettingsError, machine_problems
from glm_ms.settings.checks import check
from glm_ms.settings.schema import AUTO, TRAINING_MODES, is_sharded
from glm_ms.storage.errors import CheckpointError, DataError
from glm_ms.storage.run_folder import resolve_checkpoint
from glm_ms.tokenizer import SentencePieceTokenizer

TEXT = "text_generation_text"  # MindFormers' pipelines use this key
PROMPT_COLUMN = "prompt"
_TRAIN_FILE = "train_dataset.data_loader.dataset_dir"


class GLMTextGenerationTrainer(CausalLanguageModelingTrainer):
    """Trains, evaluates and predicts as `run_glm.py` does with the same YAML. `scores` are of the last evaluation.

    The stock trainer ignores `load_checkpoint` of the YAML (except in `train`), needs Ascend operators, and evaluates
    with a wrapper that cannot generate. So each job here is that of glm_ms.

    Weights, in this order: those of the call (`finetune_checkpoint=`, `eval_checkpoint=`, `predict_checkpoint=`); those
    of a given model; those that this trainer has just trained; `load_checkpoint` of the YAML. A line names them.
    """

    def __init__(self, model_name: str | None = None) -> None:
        super().__init__(model_name)
        quiet_terminal()
        self.scores: dict[str, Any] = {}
        # Settings that name the weights trained last without a given model.
        self._trained: dict[str, str] = {}
        # The model of the last job, and what it was built from.
        self._built: tuple[Any, GLMForCausalLM] | None = None

    def train(
        self,
        config: MindFormerConfig,
        network: MindFormersGLM | None = None,
        dataset: Any = None,
        wrapper: Any = None,
        optimizer: Any = None,
        callbacks: Sequence[Callback] | None = None,
        compute_metrics: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        """Trains; see `glm_ms.engine.train.train`.

        Args:
            config: read from a YAML of glm_ms.
            network: a model to train; None builds the one of the YAML.
            dataset: a MindSpore data set that replaces `train_dataset` of the YAML, see `DatasetRows`.
            callbacks: called after those of glm_ms.
            wrapper, optimizer, compute_metrics, eval_dataset: must be None; the YAML determines these objects.

        Raises:
            ValueError: unusable settings, weights, records or arguments.
            FloatingPointError: the run has diverged.
        """
        _refuse(optimizers=optimizer, wrapper=wrapper, compute_metrics=compute_metrics, eval_dataset=eval_dataset)
        mode = config.run_mode if config.run_mode in TRAINING_MODES else TRAINING_MODES[-1]
        settings = settings_of(config, run_mode=mode)
        weights_given = _apply_checkpoint(settings, config)
        if network is not None:
            _plan_training(network, settings, weights_given)
        rows = None if dataset is None else _rows_of(dataset, settings)
        tokenizer = _begin(settings, check_train_file=rows is None)
        core = None if network is None else _fill(network, settings)
        train(settings, tokenizer, _say, Given(core, rows, tuple(callbacks or ())))
        trained = "load_checkpoint" if settings.model.pet_config.pet_type is None else "load_adapter"
        self.network, self._trained, self._built = network, {}, None
        if network is None:
            self._trained = {"load_checkpoint": settings.load_checkpoint, trained: settings.output_dir}
        else:
            network.core.network.set_train(False)
            setattr(network, "weights_from" if trained == "load_checkpoint" else "adapter_from", settings.output_dir)
        for line in summary(settings):
            _say(line)

    def evaluate(
        self,
        config: MindFormerConfig,
        network: MindFormersGLM | None = None,
        dataset: Any = None,
        callbacks: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Evaluates `metric` of the YAML on its `eval_dataset` and prints the scores.

        MindFormers' Trainer returns nothing. `scores` and `eval_scores.json` in the output folder have the numbers.
        """
        _refuse(eval_dataset=dataset, compute_metrics=compute_metrics, eval_callbacks=callbacks or None)
        settings = settings_of(config, run_mode="eval")
        model, tokenizer = self._prepare(settings, config, network)
        self.scores = evaluate(settings, model, tokenizer, _say)
        for name, value in self.scores.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        return self.scores

    def predict(
        self,
        config: MindFormerConfig,
        input_data: Any = None,
        network: MindFormersGLM | None = None,
        tokenizer: ChatGLMTokenizer | None = None,
        **kwargs: Any,
    ) -> list[dict[str, list[str]]]:
        """Answers plain prompts, put into the chat template: {"text_generation_text": answers} for each prompt.

        Args:
            input_data: a text, a list of texts, a .txt or .jsonl file, or a data set with a column `prompt`.
            network, tokenizer: replace those of the YAML.
            kwargs: `batch_size`, `seed`, `max_length` (prompt included), and keys of `generation` in the YAML.
        """
        settings = settings_of(config, run_mode="predict")
        with tempfile.TemporaryDirectory() as folder:
            settings.predict_data = _predict_data(input_data, settings, Path(folder))
            if tokenizer is not None:
                _set_tokenizer(settings, tokenizer)
            set_generation(settings, kwargs)
            model, core_tokenizer = self._prepare(settings, config, network)
            results = predict(settings, model, core_tokenizer, lambda _: None, _say)
        return [{TEXT: list(result.answers)} for result in results]

    def _prepare(
        self, settings: Settings, config: MindFormerConfig, network: MindFormersGLM | None
    ) -> tuple[GLMForCausalLM, SentencePieceTokenizer]:
        """Checks an evaluation or prediction; returns its model and tokenizer."""
        path, _ = _take_checkpoint(config)
        if config[OWN_SECTION].named:  # no file in which the user could set it
            settings.use_parallel = False
        if network is None:
            for key, value in self._trained.items():
                setattr(settings, key, value)
        else:
            if settings.resume:
                raise SettingsError(
                    "Trainer(model=...): resume: True: the results in output_dir may be of another model; set False"
                )
            settings.load_checkpoint = network.weights_from or settings.load_checkpoint
            settings.load_adapter = network.adapter_from or settings.load_adapter
            _check_network(network, settings)
        if path:
            adapter = is_adapter_folder(resolve_checkpoint(path))
            setattr(settings, "load_adapter" if adapter else "load_checkpoint", path)
        tokenizer = _begin(settings)
        # build_model says its lines itself, but not for a model that an earlier job has built.
        check_vocabulary(settings, _say if network is not None else lambda _: None)
        if network is None:
            model = self._build(settings, tokenizer)
        else:
            model = _load_missing_weights(network, settings)
            fuse(settings, model, _say)
        return model, tokenizer

    def _build(self, settings: Settings, tokenizer: SentencePieceTokenizer) -> GLMForCausalLM:
        """The model of the settings. Jobs with the same weights in a row load and compile it once."""
        found = [resolve_checkpoint(path) for path in (settings.load_checkpoint, settings.load_adapter) if path]
        versions = [(path, path.stat().st_mtime_ns) for path in found]
        key = (versions, settings.load_adapter, settings.seed, settings.to_dict()["model"])
        if self._built is not None and self._built[0] == key:
            _say(f"weights: {settings.load_checkpoint or 'random'}, loaded by an earlier job")
        else:
            self._built = (key, build_model(settings, tokenizer.vocab_size, _say))
            fuse(settings, self._built[1], _say)
        return self._built[1]


def _say(line: str) -> None:
    """Prints a line for the user to standard error, on the first rank, as `run_glm.py` does."""
    if get_real_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def _refuse(**given: Any) -> None:
    """Raises SettingsError for objects given to the Trainer whose choice is part of the YAML."""
    for name, value in given.items():
        if value is not None:
            raise SettingsError(
                f"Trainer({name}=...): not supported with glm_ms; the YAML determines optimizer, lr_schedule, "
                "runner_wrapper, eval_dataset and metric"
            )


def _begin(settings: Settings, check_train_file: bool = True) -> SentencePieceTokenizer:
    """Checks and adjusts the settings as `run_glm.py` does, sets the device and builds the tokenizer.

    `check_train_file` is False if the caller gives the training data.
    """
    problems = [problem for problem in check(settings) if check_train_file or problem.key != _TRAIN_FILE]
    if settings.use_parallel and not settings.is_training():
        message = f"True: {settings.run_mode} runs in one process; set False"
        problems.append(Problem("use_parallel", message, where=settings.where("use_parallel")))
    problems = problems or machine_problems(settings)  # which adapts settings that have no problems
    if problems:
        raise SettingsError(problems)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    restore_signal_handlers()
    set_device(settings)
    ms.set_seed(settings.seed)
    for note in settings.notes:
        _say(note)
    return build_tokenizer(settings.processor.tokenizer)


def _take_checkpoint(config: MindFormerConfig) -> tuple[str | None, Any]:
    """Removes and returns the checkpoint (`finetune_checkpoint=` ...) and `resume_training=` of a call, or None: in the
    configuration, where the Trainer stores them, they would also apply to its next calls."""
    path, resume = config.get("load_checkpoint") or None, config.get("resume_training")
    config.update(load_checkpoint=None, resume_training=None, checkpoint={}, use_legacy_format=True)
    return path, resume


def _apply_checkpoint(settings: Settings, config: MindFormerConfig) -> bool:
    """Replaces the checkpoint of the settings by that of a training call; returns whether it gives initial weights."""
    path, resume = _take_checkpoint(config)
    if resume not in (None, True, False):
        remedy = "must be True or False; give the checkpoint as resume_from_checkpoint"
        raise SettingsError(f"resume_training = {resume!r}: {remedy}")
    if resume is not None:
        settings.resume_training = path or True if resume else False
    if path and not resume:
        settings.load_checkpoint = path
    return bool(path and not resume)


def _check_network(network: MindFormersGLM, settings: Settings) -> None:
    """Raises SettingsError if a given model is another network than that of the YAML, or has a smaller seq_length."""
    core = network.core.config
    wanted = settings.model.model_config
    if wanted.padded_vocab_size == AUTO:
        wanted.padded_vocab_size = core.padded_vocab_size
    different = different_fields(settings.glm_config(), core, "the model")
    if core.seq_length < wanted.seq_length:
        different.append(f"model.model_config.seq_length: {wanted.seq_length}, in the model {core.seq_length}")
    if different:
        raise SettingsError(f"{settings.source} and the model given are different networks: {'; '.join(different)}")


def _plan_training(network: MindFormersGLM, settings: Settings, weights_given: bool) -> None:
    """Adapts the settings of a training to a given model; CheckpointError for an adapter that they do not train.

    `load_checkpoint` becomes the path of the model's weights, unless the call gives others (`weights_given`).
    """
    if is_sharded(settings):
        raise SettingsError(
            "Trainer(model=...): a sharded run loads the slices of its own network on every rank; give no model, and "
            "set load_checkpoint in the YAML"
        )
    _check_network(network, settings)
    adapter_not_trained = network.core.adapter is not None and settings.model.pet_config.pet_type is None
    if settings.load_adapter or adapter_not_trained:
        raise CheckpointError(
            "Trainer(model=...): the model has an adapter or load_adapter names one; to continue training an adapter, "
            "give no model and set load_checkpoint and load_adapter in the YAML"
        )
    if not weights_given:
        settings.load_checkpoint = network.weights_from or settings.load_checkpoint
    if not settings.load_checkpoint:
        settings.model.init = "random"  # the caller wants the weights that the model has


def _fill(network: MindFormersGLM, settings: Settings) -> GLMForCausalLM:
    """A given model with the weights of the settings and, if they train one, an adapter."""
    if settings.resume_training is False:
        _load_missing_weights(network, settings)
    adapter = adapter_config(settings)
    if adapter is None and network.core.adapter is not None:
        raise CheckpointError(
            f"{settings.load_checkpoint}: contains an adapter beside the weights; set model.pet_config.pet_type to "
            "continue training it, or merge it first (tools/merge_lora.py)"
        )
    if adapter is not None and network.core.adapter is None:
        network.core.add_adapter(adapter, settings.seed)
    fuse(settings, network.core, _say)
    return network.core


def _load_missing_weights(network: MindFormersGLM, settings: Settings) -> GLMForCausalLM:
    """Loads the weights and the adapter of the settings into a given model, unless it has them."""
    core = network.core
    if settings.load_checkpoint and settings.load_checkpoint != network.weights_from:
        network.load_weights(settings.load_checkpoint, lora_alpha(settings))
    _say(f"weights: {network.weights_from or 'random'}")
    if settings.load_adapter and settings.load_adapter != network.adapter_from:
        if core.adapter is not None:
            other = f"the model given already has an adapter, from {network.adapter_from}"
            raise CheckpointError(f"{settings.load_adapter}: {other}")
        _say(str(core.load_adapter(settings.load_adapter, lora_alpha(settings))))
        network.adapter_from = settings.load_adapter
    if not settings.is_training():
        check_adapter_found(settings, core)
    return core


def _rows_of(dataset: Any, settings: Settings) -> DatasetRows:
    """Rows of a given data set, which also determines batch size and order of the run; DataError if unusable."""
    if not isinstance(dataset, Dataset):
        wanted, kind = "the path of a file or a MindSpore data set", type(dataset).__name__
        raise DataError(f"Trainer(train_dataset=...): expected {wanted}, found {kind}")
    rows = DatasetRows(dataset)
    longest = settings.model.model_config.seq_length
    if rows.seq_length > longest:
        limit = f"model.model_config.seq_length = {longest}"
        raise DataError(f"train_dataset: rows of {rows.seq_length} tokens exceed {limit}")
    settings.runner_config.batch_size = rows.batch_size
    settings.train_dataset.data_loader.shuffle = False
    _say("train_dataset: batch size and order are those of the data set, the same in every epoch")
    return rows


def _set_tokenizer(settings: Settings, tokenizer: Any) -> None:
    """Replaces the tokenizer of the YAML by a given one, which must be one of glm_ms."""
    if not isinstance(tokenizer, ChatGLMTokenizer):
        raise SettingsError(
            f"Trainer(tokenizer=...): {type(tokenizer).__name__}: expected a tokenizer of glm_ms, as AutoTokenizer "
            "loads it from a GLM folder or YAML"
        )
    chosen: Any = settings.processor.tokenizer
    chosen.type, chosen.vocab_file = type(tokenizer.core).__name__, tokenizer.vocab_file
    chosen.template = tokenizer.core.template


def _predict_data(input_data: Any, settings: Settings, folder: Path) -> str:
    """The value of `predict_data` for the input of a call; the texts of a list or data set become a file in `folder`.

    The Trainer passes the records of `eval_dataset` if the call gives no input; so `predict_data` of the settings
    replaces a data set.
    """
    if isinstance(input_data, Dataset):
        if settings.predict_data:
            return settings.predict_data
        columns = input_data.get_col_names()
        if PROMPT_COLUMN not in columns:
            raise DataError(f"input_data: no column {PROMPT_COLUMN}; its columns are {', '.join(columns)}")
        iterator = input_data.create_dict_iterator(num_epochs=1, output_numpy=True)
        input_data = [text for item in iterator for text in item[PROMPT_COLUMN].reshape(-1).tolist()]
    for text in input_data if isinstance(input_data, list) else [input_data]:
        if not isinstance(text, str):
            raise DataError(f"input_data: expected texts, found {type(text).__name__}")
        if isinstance(text, ChatPrompt):
            raise DataError("input_data: a text of build_prompt; give plain texts, predict builds the prompts")
    if not isinstance(input_data, list):
        return input_data
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in input_data), encoding="utf-8")
    return str(path)
