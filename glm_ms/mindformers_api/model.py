"""`GLMForCausalLM` as MindFormers knows a model: the network and everything else are those of this project."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models.modeling_utils import PreTrainedModel
from mindspore import Parameter, Tensor, ops

from glm_ms import generation
from glm_ms.convert import CheckpointError, convert_dtype, load_parameters, open_checkpoint
from glm_ms.convert.writers import write_file
from glm_ms.engine.weights import check_config_beside
from glm_ms.mindformers_api.auto import GLMConfig, made_folder
from glm_ms.mindformers_api.generation import default_generation, generation_arguments
from glm_ms.model.config import GLMConfig as Architecture
from glm_ms.model.loss import NextTokenLoss
from glm_ms.pretrained import load_pretrained
from glm_ms.storage.run_folder import resolve_checkpoint

WEIGHTS_FILE = "model.safetensors"
# Keyword arguments of from_pretrained that tell where and how to download; nothing is downloaded here.
_OF_DOWNLOADS = (
    "cache_dir", "force_download", "ignore_mismatched_sizes", "local_files_only", "proxies", "resume_download",
    "revision", "token", "trust_remote_code", "_commit_hash", "_from_auto", "_from_pipeline", "code_revision",
)  # fmt: skip


class GLMForCausalLM(PreTrainedModel):
    """A MindFormers model around a `glm_ms.generation.GLMForCausalLM`; parameters have the released names.

    Args:
        config: architecture. Its `checkpoint_name_or_path` and `load_adapter` are loaded; without the former the
            weights are random.
        core: a model to wrap, in place of building one.
        weights_from: where the weights of `core` come from.

    Attributes:
        core: the model of this project, whose `network` this cell runs.
        weights_from: where the weights come from; empty for random ones.
        adapter_from: where the adapter of `core` comes from; empty without one.

    Raises:
        CheckpointError, ConfigError: weights or configuration that cannot be used.
    """

    config_class = GLMConfig

    def __init__(
        self, config: GLMConfig, core: generation.GLMForCausalLM | None = None, weights_from: str = ""
    ) -> None:
        # MindFormers calls __init__ once more when its parallel or recompute settings change; weights must survive.
        if "core" in self.__dict__:
            return
        super().__init__(config, auto_prefix=False)
        self.weights_from = weights_from if core is not None else config.checkpoint_name_or_path or ""
        self.adapter_from = config.load_adapter if core is None else ""
        self.core = _build(config) if core is None else core
        self.network = self.core.network
        self.loss = NextTokenLoss()
        self.set_train(False)
        self.generation_config = default_generation(
            _generation_options(config), config.eos_token_id, config.pad_token_id
        )

    @classmethod
    def can_generate(cls) -> bool:
        """It can."""
        return True

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """All int32 [B, S]; without mask nothing is padding, positions count the tokens that are none.

        Returns:
            logits, float32 [B, S, V]; with labels (-100 where a token carries no loss, shifted inside) the mean loss
            over the labelled tokens, float32 scalar.
        """
        if attention_mask is None:
            attention_mask = ops.ones_like(input_ids)
        if position_ids is None:
            position_ids = ops.maximum(ops.cumsum(attention_mask, 1) - 1, 0).astype(ms.int32) * attention_mask
        slots = ops.arange(ops.shape(input_ids)[1]).astype(ms.int32)
        logits = self.network(input_ids, attention_mask, position_ids, slots)
        if labels is None:
            return logits
        total, count = self.loss(logits, labels)
        return total / ops.maximum(count, 1.0)

    def generate(
        self,
        input_ids: Any,
        generation_config: Any = None,
        logits_processor: Any = None,
        streamer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> list[np.ndarray] | dict[str, list[np.ndarray]]:
        """MindFormers' `generate`, by this project's cached decoding.

        Args:
            input_ids: ids of one prompt or of several; see `mf_generation.unpadded` for padding.
            generation_config: options in place of the model's own `generation_config`.
            logits_processor: None; scores are processed by the options.
            streamer: gets the prompt and then every token, of a single sequence.
            seed: of sampling.
            kwargs: single options, by their names here or in MindFormers (`max_length`, `return_dict_in_generate`).

        Returns:
            The ids of every sequence, prompt included and padding not, int32 [tokens] each; with
            `return_dict_in_generate` as {"sequences": ...}.

        Raises:
            ValueError: an option that is unknown or does not fit.
        """
        if logits_processor:
            raise ValueError(
                "logits_processor: not supported; use temperature, top_k, top_p, repetition_penalty"
            )
        base = self.generation_config if generation_config is None else generation_config
        given = {**kwargs, "seed": seed}
        for name in ("eos_token_id", "pad_token_id"):
            if not getattr(base, name, None):  # MindFormers' GenerationConfig() names none
                given.setdefault(name, getattr(self.generation_config, name))
        prompts, options, as_dictionary = generation_arguments(input_ids, base, given, self.config.seq_length)
        if streamer is None:
            sequences = self.core.generate(prompts, **options)
        else:
            sequences = [self._stream(prompts, options, streamer)]
        arrays = [np.array(sequence, np.int32) for sequence in sequences]
        return {"sequences": arrays} if as_dictionary else arrays

    def _stream(self, prompts: list[list[int]], options: dict[str, Any], streamer: Any) -> list[int]:
        if len(prompts) > 1 or options.get("num_return_sequences", 1) > 1:
            raise ValueError("streamer: shows one sequence; give one prompt and num_return_sequences = 1")
        sequence = list(prompts[0])
        streamer.put(list(sequence))
        for tokens in self.core.stream(prompts, **options):
            sequence.append(int(tokens[0]))
            streamer.put([sequence[-1]])
        streamer.end()
        return sequence

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_dir: str, *_: Any, **kwargs: Any) -> GLMForCausalLM:
        """Loads a model from anything `glm_ms.load_pretrained` reads.

        Args:
            pretrained_model_name_or_dir: Hugging Face folder, `.ckpt` or `.safetensors`, output folder of a run.
            kwargs: `config`: a GLMConfig, or a path that holds one; other keys replace values of the configuration.

        Raises:
            CheckpointError, ConfigError: weights or configuration that cannot be used.
        """
        path = str(kwargs.pop("pretrained_model_name_or_path", None) or pretrained_model_name_or_dir)
        return cls.from_pretrained_experimental_mode(path, **kwargs)

    @classmethod
    def from_pretrained_experimental_mode(
        cls, pretrained_model_name_or_path: str, *_: Any, config: Any = None, **kwargs: Any
    ) -> GLMForCausalLM:
        """As `from_pretrained`; what AutoModel calls for folders with a config.json."""
        path = resolve_checkpoint(pretrained_model_name_or_path)
        kwargs = {key: value for key, value in kwargs.items() if key not in _OF_DOWNLOADS}
        if not isinstance(config, GLMConfig):
            source = config or (path if (path / "config.json").is_file() else None)
            if source is None:
                raise CheckpointError(f"{path}: no config.json here; give config=, a GLMConfig or a path")
            config = GLMConfig.from_pretrained(str(source), **kwargs)
        core = load_pretrained(path, config.architecture())
        return cls(config, core=core, weights_from=str(path))

    def load_checkpoint(self, config: GLMConfig) -> None:
        """Loads `config.checkpoint_name_or_path`; see `load_weights`."""
        if not config.checkpoint_name_or_path:
            raise CheckpointError(
                "checkpoint_name_or_path: empty; give a Hugging Face folder, .safetensors or .ckpt"
            )
        self.load_weights(config.checkpoint_name_or_path)

    def load_weights(self, path: str) -> None:
        """Overwrites all weights by those of a checkpoint of any kind; an adapter stays attached.

        Raises:
            CheckpointError: the weights cannot be read or do not fit.
        """
        folder, core = resolve_checkpoint(path), self.core
        with open_checkpoint(folder) as reader:
            check_config_beside(folder, core.config, self.config.name_or_path or type(self).__name__)
            dtype = "float16" if core.config.param_init_type == "float16" else "float32"
            core.load_parameters(load_parameters(reader, core.config, dtype))
        self.weights_from = str(path)

    def save_pretrained(self, save_directory: str, save_name: str = "mindspore_model", **kwargs: Any) -> None:
        """Writes `config.json` and `model.safetensors`; AutoModel and `glm_ms.load_pretrained` read the folder.

        Args:
            save_directory: folder; other files in it stay.
            save_name: without effect: the names are those of a Hugging Face folder.
            kwargs: for callers that pass them; nothing is pushed anywhere.

        Raises:
            ValueError: not a folder, an adapter is attached, or `push_to_hub` is asked for.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: not supported; save into a folder and upload it")
        if self.core.adapter is not None:
            raise ValueError(
                "save_pretrained: an adapter is attached, which a folder of weights cannot hold; its training run has "
                "saved it alone, and tools/merge_lora.py merges LoRA into the weights"
            )
        folder = made_folder(save_directory)
        parameters, dtype = self.core.parameters(), self.core.config.param_init_type
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}

        def arrays() -> Iterator[tuple[str, np.ndarray]]:
            for name, value in parameters.items():
                yield name, convert_dtype(_float32(value), "float32", dtype, name)

        write_file(folder / WEIGHTS_FILE, shapes, dtype, arrays(), overwrite=True)
        self.config.save_pretrained(str(folder), save_json=True)

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """MindFormers lists the parameters through this method."""
        return self.trainable_params() if only_trainable else list(self.get_parameters())


def fitted_to_device(architecture: Architecture) -> Architecture:
    """float16 and bfloat16 become float32 on a CPU, the only type that is fast there."""
    if ms.get_context("device_target") != "CPU":
        return architecture
    return dataclasses.replace(architecture, param_init_type="float32", compute_dtype="float32")


def _build(config: GLMConfig) -> generation.GLMForCausalLM:
    if not config.checkpoint_name_or_path:
        if config.load_adapter:
            raise CheckpointError(
                f"load_adapter: {config.load_adapter}: needs the weights it was trained on, as load_checkpoint"
            )
        return generation.GLMForCausalLM(fitted_to_device(config.architecture()))
    path, architecture = resolve_checkpoint(config.checkpoint_name_or_path), config.architecture()
    check_config_beside(path, architecture, config.name_or_path or type(config).__name__)
    return load_pretrained(path, architecture, adapter=config.load_adapter or None)


def _generation_options(config: GLMConfig) -> dict[str, Any]:
    """Options of the YAML; where it names a tokenizer, an answer ends at that one's stop ids."""
    tokenizer = config.own_tokenizer()
    stop = {} if tokenizer is None else {"eos_token_id": list(tokenizer.stop_token_ids)}
    return {**stop, **config.generation}


def _float32(value: Parameter) -> np.ndarray:
    return value.value().astype(ms.float32).asnumpy()
