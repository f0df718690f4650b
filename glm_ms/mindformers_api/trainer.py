"""The task trainer behind MindFormers' `Trainer(args="<YAML of this project>", task="text_generation")`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers import MindFormerConfig
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore.train import Callback

from glm_ms.mindformers_api import job
from glm_ms.mindformers_api import prompts as mf_prompts
from glm_ms.mindformers_api.job import say
from glm_ms.mindformers_api.model import GLMForCausalLM
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer
from glm_ms.mindformers_api.yaml import settings_of
from glm_ms.settings import Settings
from glm_ms.settings.schema import TRAINING_MODES
from glm_ms.storage.run_folder import resolve_checkpoint

if TYPE_CHECKING:
    from glm_ms import generation
    from glm_ms.tokenizer import SentencePieceTokenizer

TEXT = "text_generation_text"  # where MindFormers' pipelines put their texts


class GLMTextGenerationTrainer(CausalLanguageModelingTrainer):
    """Trains, evaluates and predicts as `run_glm.py` does with the same YAML.

    The stock trainer ignores `load_checkpoint` of the YAML (but in `train`), needs Ascend operators and evaluates with
    a wrapper that cannot generate; so each job here is this project's own.

    Which weights: those named in the call (`finetune_checkpoint=`, `eval_checkpoint=`, `predict_checkpoint=`); else
    those of a given model; else those just trained by this trainer; else `load_checkpoint` of the YAML. A line says
    which.

    Attributes:
        scores: of the last evaluation, by name.
    """

    def __init__(self, model_name: str | None = None) -> None:
        super().__init__(model_name)
        self.scores: dict[str, Any] = {}
        # Keys of the settings after a training without a given model; what the last job built, and from what.
        self._trained: dict[str, str] | None = None
        self._built: tuple[Any, generation.GLMForCausalLM] | None = None

    def train(
        self,
        config: MindFormerConfig | None = None,
        network: GLMForCausalLM | None = None,
        dataset: Any = None,
        wrapper: Any = None,
        optimizer: Any = None,
        callbacks: Sequence[Callback] | None = None,
        **kwargs: Any,
    ) -> None:
        """Trains; see `glm_ms.engine.train.train`.

        Args:
            config: made of a YAML of this project.
            network: a model to train, in place of one built as the YAML says.
            dataset: a MindSpore data set in place of `train_dataset` of the YAML, see `DatasetRows`.
            wrapper, optimizer: None: the YAML says which.
            callbacks: MindSpore callbacks, called after ours.
            kwargs: what the Trainer adds.

        Raises:
            ValueError: settings, weights or records that cannot be used.
            FloatingPointError: the run has diverged.
        """
        from glm_ms.engine.report.summary import summary
        from glm_ms.engine.train import Given, train

        others = {name: kwargs.get(name) for name in ("compute_metrics", "eval_dataset")}
        job.refuse({"optimizers": optimizer, "wrapper": wrapper, **others})
        mode = config.run_mode if config.run_mode in TRAINING_MODES else TRAINING_MODES[-1]
        settings = settings_of(config, run_mode=mode)
        asked = job.apply_checkpoint(settings, *job.take_checkpoint(config))
        if network is not None:
            job.plan_training(network, settings, asked)
        rows = None if dataset is None else job.rows_of(dataset, settings)
        tokenizer = job.begin(settings, with_records=rows is None)
        core = None if network is None else job.before_training(network, settings)
        train(settings, tokenizer, say, Given(core, rows, tuple(callbacks or ())))
        self.network, self._trained, self._built = network, None, None
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
        config: MindFormerConfig | None = None,
        network: GLMForCausalLM | None = None,
        dataset: Any = None,
        callbacks: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Measures `metric` of the YAML on its `eval_dataset`, prints the scores and keeps them in `scores`.

        The Trainer returns nothing; `eval_scores.json` in the output folder holds the same numbers.

        Raises:
            ValueError: settings, weights or records that cannot be used.
        """
        from glm_ms.engine.evaluate import evaluate

        job.refuse(
            {"eval_dataset": dataset, "compute_metrics": compute_metrics, "eval_callbacks": callbacks or None}
        )
        settings = settings_of(config, run_mode="eval")
        model, tokenizer = self._model(settings, config, network)
        self.scores = evaluate(settings, model, tokenizer, say)
        for name, value in self.scores.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        return self.scores

    def predict(
        self,
        config: MindFormerConfig | None = None,
        input_data: Any = None,
        network: GLMForCausalLM | None = None,
        tokenizer: ChatGLMTokenizer | None = None,
        **kwargs: Any,
    ) -> list[dict[str, list[str]]]:
        """Answers prompts; a plain text is put into the chat prompt of the model.

        Args:
            config: made of a YAML of this project.
            input_data: a text, a list of texts, a .txt or .jsonl file, or a data set with a column `prompt`.
            network: a model, in place of the one the YAML says.
            tokenizer: in place of the one of the YAML.
            kwargs: `batch_size`, `seed`, `max_length` (prompt included), and options of `generation` in the YAML.

        Returns:
            {"text_generation_text": answers} for each prompt; `predict_results.jsonl` holds the same.

        Raises:
            ValueError: settings, weights, prompts or options that cannot be used.
        """
        from glm_ms.engine.predict import predict

        settings = settings_of(config, run_mode="predict")
        with tempfile.TemporaryDirectory() as folder:
            settings.predict_data = mf_prompts.predict_data(input_data, settings, Path(folder))
            if tokenizer is not None:
                job.use_tokenizer(settings, tokenizer)
            mf_prompts.set_generation(settings, kwargs)
            model, own_tokenizer = self._model(settings, config, network)
            results = predict(settings, model, own_tokenizer, lambda _: None, say)
        return [{TEXT: list(result.answers)} for result in results]

    def _model(
        self, settings: Settings, config: MindFormerConfig, network: GLMForCausalLM | None
    ) -> tuple[generation.GLMForCausalLM, SentencePieceTokenizer]:
        """Model and tokenizer of an evaluation or prediction, after all checks."""
        from glm_ms.storage.atomic import replace_text

        asked, _ = job.take_checkpoint(config)
        if network is not None:
            job.name_own_weights(settings, network)
        for key, path in (self._trained or {}).items() if network is None else ():
            setattr(settings, key, path)
        if asked:
            job.name_weights(settings, asked)
        if network is not None:
            job.check_network(network, settings)
        tokenizer = job.begin(settings)
        model = (
            self._built_model(settings, tokenizer) if network is None else job.with_weights(network, settings)
        )
        path = Path(settings.output_dir) / f"{settings.run_mode}_settings.yaml"
        replace_text(path, settings.to_yaml())
        return model, tokenizer

    def _built_model(
        self, settings: Settings, tokenizer: SentencePieceTokenizer
    ) -> generation.GLMForCausalLM:
        """The model of the settings; one job after another on the same weights reads and compiles them once."""
        from glm_ms.engine.weights import build_model

        files = [_state_of(path) for path in (settings.load_checkpoint, settings.load_adapter)]
        key = (files, settings.seed, settings.to_dict()["model"])
        if self._built is not None and self._built[0] == key:
            say(f"weights: {settings.load_checkpoint or 'random'}, as loaded before")
            return self._built[1]
        self._built = (key, build_model(settings, tokenizer.vocab_size, say))
        return self._built[1]


def _state_of(path: str) -> tuple[Path, int] | None:
    """The checkpoint that a path stands for now, with the time of its last change; None for no path."""
    if not path:
        return None
    found = resolve_checkpoint(path)
    return found, found.stat().st_mtime_ns
