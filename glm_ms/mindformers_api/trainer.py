"""The task trainer of MindFormers' `Trainer(args="<YAML of glm_ms>", task="text_generation")`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindformers import MindFormerConfig
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore.train import Callback

from glm_ms.engine.evaluate import evaluate
from glm_ms.engine.mindformers_internals import quiet_terminal
from glm_ms.engine.predict import predict
from glm_ms.engine.report.summary import summary
from glm_ms.engine.train import Given, train
from glm_ms.engine.weights import build_model
from glm_ms.generation import GLMForCausalLM
from glm_ms.mindformers_api import job
from glm_ms.mindformers_api.job import say
from glm_ms.mindformers_api.model import MindFormersGLM
from glm_ms.mindformers_api.run_yaml import settings_of
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer
from glm_ms.peft.store import is_adapter_folder
from glm_ms.settings import Settings
from glm_ms.settings.schema import TRAINING_MODES
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.run_folder import resolve_checkpoint
from glm_ms.tokenizer import SentencePieceTokenizer

TEXT = "text_generation_text"  # MindFormers' pipelines use this key


class GLMTextGenerationTrainer(CausalLanguageModelingTrainer):
    """Trains, evaluates and predicts as `run_glm.py` does with the same YAML.

    The stock trainer ignores `load_checkpoint` of the YAML (except in `train`), needs Ascend operators, and evaluates
    with a wrapper that cannot generate. So each job here is that of glm_ms.

    Weights, in this order: those of the call (`finetune_checkpoint=`, `eval_checkpoint=`, `predict_checkpoint=`); those
    of a given model; those that this trainer has just trained; `load_checkpoint` of the YAML. A line names them.

    Attributes:
        scores: of the last evaluation, by name.
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
        **kwargs: Any,
    ) -> None:
        """Trains; see `glm_ms.engine.train.train`.

        Args:
            config: read from a YAML of glm_ms.
            network: a model to train; None builds the one of the YAML.
            dataset: a MindSpore data set that replaces `train_dataset` of the YAML, see `DatasetRows`.
            callbacks: MindSpore callbacks, called after those of glm_ms.

        Raises:
            ValueError: unusable settings, weights or records; objects whose choice is part of the YAML.
            FloatingPointError: the run has diverged.
        """
        others = {name: kwargs.get(name) for name in ("compute_metrics", "eval_dataset")}
        job.refuse({"optimizers": optimizer, "wrapper": wrapper, **others})
        mode = config.run_mode if config.run_mode in TRAINING_MODES else TRAINING_MODES[-1]
        settings = settings_of(config, run_mode=mode)
        weights_given = job.apply_checkpoint(settings, *job.take_checkpoint(config))
        if network is not None:
            job.plan_training(network, settings, weights_given)
        rows = None if dataset is None else job.rows_of(dataset, settings)
        tokenizer = job.begin(settings, check_train_file=rows is None)
        core = None if network is None else job.before_training(network, settings)
        train(settings, tokenizer, say, Given(core, rows, tuple(callbacks or ())))
        self.network, self._trained, self._built = network, {}, None
        if network is not None:
            job.after_training(network, settings)
        elif settings.model.pet_config.pet_type is None:
            self._trained = {"load_checkpoint": settings.output_dir}
        else:
            self._trained = {"load_checkpoint": settings.load_checkpoint, "load_adapter": settings.output_dir}
        for line in summary(settings):
            say(line)

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
        job.refuse({"eval_dataset": dataset, "compute_metrics": compute_metrics, "eval_callbacks": callbacks or None})
        settings = settings_of(config, run_mode="eval")
        model, tokenizer = self._prepare(settings, config, network)
        self.scores = evaluate(settings, model, tokenizer, say)
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
        """Answers prompts. Plain texts are put into the chat template.

        Args:
            input_data: a text, a list of texts, a .txt or .jsonl file, or a data set with a column `prompt`.
            network, tokenizer: replace those of the YAML.
            kwargs: `batch_size`, `seed`, `max_length` (prompt included), and keys of `generation` in the YAML.

        Returns:
            {"text_generation_text": answers} for each prompt, as in `predict_results.jsonl`.
        """
        settings = settings_of(config, run_mode="predict")
        with tempfile.TemporaryDirectory() as folder:
            settings.predict_data = job.predict_data(input_data, settings, Path(folder))
            if tokenizer is not None:
                job.set_tokenizer(settings, tokenizer)
            job.set_generation(settings, kwargs)
            model, core_tokenizer = self._prepare(settings, config, network)
            results = predict(settings, model, core_tokenizer, lambda _: None, say)
        return [{TEXT: list(result.answers)} for result in results]

    def _prepare(
        self, settings: Settings, config: MindFormerConfig, network: MindFormersGLM | None
    ) -> tuple[GLMForCausalLM, SentencePieceTokenizer]:
        """Checks an evaluation or prediction; returns its model and tokenizer."""
        path, _ = job.take_checkpoint(config)
        if network is None:
            for key, value in self._trained.items():
                setattr(settings, key, value)
        else:
            settings.load_checkpoint = network.weights_from or settings.load_checkpoint
            settings.load_adapter = network.adapter_from or settings.load_adapter
        if path:
            adapter = is_adapter_folder(resolve_checkpoint(path))
            setattr(settings, "load_adapter" if adapter else "load_checkpoint", path)
        if network is None:
            tokenizer = job.begin(settings)
            model = self._build(settings, tokenizer)
        else:
            job.check_network(network, settings)
            tokenizer = job.begin(settings)
            model = job.load_missing_weights(network, settings)
        settings_file = Path(settings.output_dir) / f"{settings.run_mode}_settings.yaml"
        replace_text(settings_file, settings.to_yaml())
        return model, tokenizer

    def _build(self, settings: Settings, tokenizer: SentencePieceTokenizer) -> GLMForCausalLM:
        """The model of the settings. Jobs with the same weights in a row load and compile it once."""
        files = [_version(path) for path in (settings.load_checkpoint, settings.load_adapter)]
        key = (files, settings.seed, settings.to_dict()["model"])
        if self._built is not None and self._built[0] == key:
            say(f"weights: {settings.load_checkpoint or 'random'}, loaded by an earlier job")
        else:
            self._built = (key, build_model(settings, tokenizer.vocab_size, say))
        return self._built[1]


def _version(path: str) -> tuple[Path, int] | None:
    """The checkpoint at a path and the time of its last change; None without a path."""
    if not path:
        return None
    found = resolve_checkpoint(path)
    return found, found.stat().st_mtime_ns
