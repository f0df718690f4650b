"""`MindFormersGLM`: a GLM as a MindFormers model. Network, decoding and files are those of glm_ms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models.modeling_utils import PreTrainedModel
from mindspore import Parameter, Tensor, ops

from glm_ms.convert.dtypes import convert_dtype
from glm_ms.convert.reader import has_adapter, load_parameters, open_checkpoint
from glm_ms.convert.writers import write_file
from glm_ms.engine.weights import check_config_beside
from glm_ms.generation import GLMForCausalLM
from glm_ms.mindformers_api.config import DOWNLOAD_OPTIONS, MindFormersGLMConfig, create_folder
from glm_ms.mindformers_api.generation import default_generation, generation_arguments
from glm_ms.mindformers_api.released import expected_files, is_name
from glm_ms.mindformers_api.run_yaml import yaml_in
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer
from glm_ms.model.config import GLMConfig
from glm_ms.model.loss import NextTokenLoss
from glm_ms.pretrained import load_pretrained
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import resolve_checkpoint

WEIGHTS_FILE = "model.safetensors"


class MindFormersGLM(PreTrainedModel):
    """A MindFormers model that wraps a `glm_ms.generation.GLMForCausalLM`. Parameters have the released names.

    Args:
        config: architecture. `checkpoint_name_or_path` and `load_adapter` are loaded; without the former the weights
            are random.
        core: an existing model to wrap, with weights of the path `weights_from`; None builds one.

    Attributes:
        core: the model of glm_ms, whose `network` this cell runs.
        weights_from, adapter_from: paths of weights and adapter; empty if the weights are random, without an adapter.
    """

    config_class = MindFormersGLMConfig

    def __init__(
        self, config: MindFormersGLMConfig, core: GLMForCausalLM | None = None, weights_from: str = ""
    ) -> None:
        # MindFormers calls __init__ again when its parallel or recompute settings change; keep the weights then.
        if "core" in self.__dict__:
            return
        super().__init__(config, auto_prefix=False)
        self.weights_from = weights_from if core is not None else config.checkpoint_name_or_path or ""
        self.adapter_from = config.load_adapter if core is None else ""
        self.core = _build(config) if core is None else core
        self.network = self.core.network
        self.loss = NextTokenLoss()
        self.set_train(False)
        # An answer ends at the ids of the YAML, or else at the stop ids of the tokenizer that the YAML names or that is
        # in the folder of the weights.
        tokenizer = config.build_tokenizer()
        stop = self.core.stop_token_ids if tokenizer is None else list(tokenizer.stop_token_ids)
        assumed = [config.eos_token_id]
        options = {"eos_token_id": stop or assumed, **config.generation}
        self.generation_config = default_generation(options, config.pad_token_id)
        self._assumed_stop = assumed

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """All int32 [B, S]. Default mask: no padding. Default positions: number of unmasked tokens before.

        Returns logits, float32 [B, S, V]; with labels (-100 for tokens without loss, shifted inside) the mean loss over
        the labelled tokens, float32 scalar.
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
        """MindFormers' `generate`, computed by the cached decoding of glm_ms.

        Args:
            input_ids: ids of one prompt or of several, padded on the left or right.
            generation_config: replaces the model's own `generation_config`.
            logits_processor: must be None.
            streamer: receives the prompt and then every token but the one that ends the answer; one sequence only.
            kwargs: single options by their glm_ms or MindFormers names; ValueError for unknown or invalid ones.

        Returns:
            Ids of every sequence with its prompt and without padding, int32 [tokens] each; with
            `return_dict_in_generate` as {"sequences": ...}.
        """
        if logits_processor:
            raise ValueError("logits_processor: not supported; use temperature, top_k, top_p, repetition_penalty")
        own = self.generation_config
        base = own if generation_config is None else generation_config
        given = {**kwargs, "seed": seed}
        stop = own.eos_token_id
        if stop is self._assumed_stop:  # the model does not know its tokenizer, but ids of our tokenizers do
            stop = getattr(input_ids, "stop_token_ids", stop)
        # MindFormers' GenerationConfig() sets neither of the two.
        ends = (None if base is own else getattr(base, "eos_token_id", None)) or stop
        defaults = {"eos_token_id": ends, "pad_token_id": getattr(base, "pad_token_id", None) or own.pad_token_id}
        given.update({name: value for name, value in defaults.items() if given.get(name) is None})
        prompts, options, as_dictionary = generation_arguments(input_ids, base, given, self.config.seq_length)
        if streamer is None:
            sequences = self.core.generate(prompts, **options)
        else:
            sequences = [self._stream(prompts, options, streamer)]
        arrays = [np.array(sequence, np.int32) for sequence in sequences]
        return {"sequences": arrays} if as_dictionary else arrays

    def chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        instruction: str = "",
        **options: Any,
    ) -> tuple[Any, list[Any]]:
        """One round of a conversation, as the `chat` of the released models.

        Args:
            tokenizer: of glm_ms.
            query: the new message, of `role`.
            history: earlier messages {"role", "content"}, or for ChatGLM2 also (question, answer) pairs; not changed.
            instruction: a system message for a conversation without history; ChatGLM3 only.
            options: as in `generate`; by default those of the model.

        Returns the answer, for a tool call of ChatGLM3 as a dictionary, and the new history. Raises ValueError for an
        unknown option, role or form of history.
        """
        if not isinstance(tokenizer, ChatGLMTokenizer):
            raise ValueError(f"chat: tokenizer: {type(tokenizer).__name__}: expected a tokenizer of glm_ms")
        core: Any = tokenizer.core
        messages = list(history or [])
        if instruction:
            if messages:
                raise ValueError("chat: instruction: only without history; put a system message into the history")
            messages = [{"role": "system", "content": instruction}]
        ids = core.build_chat_input(query, messages, role)["input_ids"]
        stop = list(core.stop_token_ids) if options.get("eos_token_id") is None else options["eos_token_id"]
        sequences = self.generate(ids, **{**options, "eos_token_id": stop})
        if isinstance(sequences, dict) or len(sequences) != 1:
            raise ValueError(
                "chat: gives one answer; num_return_sequences and return_dict_in_generate are not supported"
            )
        answer = [int(token) for token in sequences[0][len(ids) :]]
        if answer and answer[-1] in (stop if isinstance(stop, list) else [stop]):
            answer.pop()
        text = str(tokenizer.decode(answer))
        return core.add_answer(text, query, messages, role)

    def _stream(self, prompts: list[list[int]], options: dict[str, Any], streamer: Any) -> list[int]:
        if len(prompts) > 1 or options.get("num_return_sequences", 1) > 1:
            raise ValueError("streamer: shows one sequence; give one prompt and num_return_sequences = 1")
        eos = options.get("eos_token_id") or []
        stop = eos if isinstance(eos, (list, tuple)) else [eos]
        sequence = list(prompts[0])
        streamer.put(list(sequence))
        for tokens in self.core.stream(prompts, **options):
            sequence.append(int(tokens[0]))
            if sequence[-1] not in stop:
                streamer.put([sequence[-1]])
        streamer.end()
        return sequence

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_dir: str = "", *_: Any, config: Any = None, **kwargs: Any
    ) -> MindFormersGLM:
        """Loads a model from any path that `glm_ms.load_pretrained` reads, from the weights that a YAML names, or from
        those in the place of a released model, `released.expected_files`.

        `config` is a MindFormersGLMConfig or its path; None reads the config.json or the YAML of the folder. `kwargs`
        replace values of the configuration file. Raises CheckpointError or ConfigError.
        """
        given = str(kwargs.pop("pretrained_model_name_or_path", None) or pretrained_model_name_or_dir)
        kwargs = {key: value for key, value in kwargs.items() if key not in DOWNLOAD_OPTIONS}
        if is_name(given) or given.endswith((".yaml", ".yml")):
            if not isinstance(config, MindFormersGLMConfig):
                config = MindFormersGLMConfig.from_pretrained(str(config or given), **kwargs)
            if not config.checkpoint_name_or_path or not Path(config.checkpoint_name_or_path).exists():
                place = expected_files(given)[0] if is_name(given) else config.checkpoint_name_or_path
                missing = f"{place}: no such file, and nothing is downloaded; put the weights there" if place else ""
                raise CheckpointError(
                    f"{given}: {missing or 'load_checkpoint: names no weights'}, or give checkpoint_name_or_path=, a "
                    "Hugging Face folder, .safetensors or .ckpt"
                )
            return cls(config)
        path = resolve_checkpoint(given)
        if not isinstance(config, MindFormersGLMConfig):
            source = config or (path if (path / "config.json").is_file() else yaml_in(path) if path.is_dir() else None)
            if source is None:
                raise CheckpointError(f"{path}: no config.json here; give config=, a MindFormersGLMConfig or a path")
            config = MindFormersGLMConfig.from_pretrained(str(source), **kwargs)
        alpha = config.lora_alpha if has_adapter(path) else None
        core = load_pretrained(path, _trainable(config.architecture()), lora_alpha=alpha)
        return cls(config, core=core, weights_from=str(path))

    from_pretrained_experimental_mode = from_pretrained  # AutoModel calls this one for folders with a config.json

    def load_checkpoint(self, config: MindFormersGLMConfig) -> None:
        """MindFormers calls this; see `load_weights`."""
        if not config.checkpoint_name_or_path:
            raise CheckpointError("checkpoint_name_or_path: empty; give a Hugging Face folder, .safetensors or .ckpt")
        self.load_weights(config.checkpoint_name_or_path)

    def load_weights(self, path: str, lora_alpha: float | None = None) -> None:
        """Replaces all weights; an adapter stays attached. An adapter in the same files is attached, with `lora_alpha`
        of `GLMForCausalLM.load_adapter`, by default that of `pet_config`.

        Raises CheckpointError for weights of another network, and for an adapter if there is one already.
        """
        folder, core = resolve_checkpoint(path), self.core
        if core.quantization is not None:
            raise CheckpointError(f"{folder}: the model has quantized weights; build it again with from_pretrained")
        with open_checkpoint(folder) as reader:
            if reader.adapter_names() and core.adapter is not None:
                raise CheckpointError(f"{folder}: contains an adapter, and the model has one already; build it again")
            source = self.config.name_or_path or type(self).__name__
            check_config_beside(folder, core.config, source, bool(reader.adapter_names()))
            dtype = "float16" if core.config.param_init_type == "float16" else "float32"
            core.load_parameters(load_parameters(reader, core.config, dtype, with_adapter=True))
            if reader.adapter_names():
                core.load_adapter(reader.path, self.config.lora_alpha if lora_alpha is None else lora_alpha)
                self.adapter_from = str(path)
        self.weights_from = str(path)

    def save_pretrained(self, save_directory: str, save_name: str = "mindspore_model", **kwargs: Any) -> None:
        """Writes `config.json` and `model.safetensors`; AutoModel and `glm_ms.load_pretrained` read the folder.

        `save_name` has no effect. ValueError for a path that is not a folder, an attached adapter, `push_to_hub`.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: not supported; save into a folder and upload it")
        if self.core.adapter is not None:
            raise ValueError(
                "save_pretrained: an adapter is attached, and the folder would have the weights without it. The "
                "training run saved the adapter; tools/merge_lora.py merges LoRA into the weights"
            )
        if self.core.quantization is not None:
            raise ValueError("save_pretrained: the weights are quantized; glm-ms quantize writes such folders")
        folder = create_folder(save_directory)
        parameters, dtype = self.core.parameters(), self.core.config.param_init_type
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        arrays = (
            (name, convert_dtype(value.value().astype(ms.float32).asnumpy(), "float32", dtype, name))
            for name, value in parameters.items()
        )
        write_file(folder / WEIGHTS_FILE, shapes, dtype, arrays, overwrite=True)
        self.config.save_pretrained(str(folder), save_json=True)

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """MindFormers lists the parameters with this method."""
        return self.trainable_params() if only_trainable else list(self.get_parameters())


def _trainable(architecture: GLMConfig) -> GLMConfig:
    """On a CPU with weights of float32, as the model may be trained there."""
    if ms.get_context("device_target") != "CPU":
        return architecture
    return dataclasses.replace(architecture, param_init_type="float32", compute_dtype="float32")


def _build(config: MindFormersGLMConfig) -> GLMForCausalLM:
    architecture = _trainable(config.architecture())
    if config.checkpoint_name_or_path:
        path = resolve_checkpoint(config.checkpoint_name_or_path)
        check_config_beside(path, architecture, config.name_or_path or type(config).__name__, has_adapter(path))
        alpha = config.lora_alpha if config.load_adapter or has_adapter(path) else None
        return load_pretrained(path, architecture, config.load_adapter or None, alpha)
    if config.load_adapter:
        needed = "needs load_checkpoint, the weights it was trained on"
        raise CheckpointError(f"load_adapter: {config.load_adapter}: {needed}")
    return GLMForCausalLM(architecture)
