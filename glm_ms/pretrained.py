"""`load_pretrained`: a checkpoint of any kind to a model ready to run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mindspore as ms

from glm_ms.convert.reader import load_parameters, open_checkpoint
from glm_ms.families import read_config
from glm_ms.generation import GLMForCausalLM
from glm_ms.model.config import GLMConfig
from glm_ms.peft import is_adapter_folder
from glm_ms.peft.adapter import adapter_with
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import resolve_checkpoint


def load_pretrained(
    path: str | Path,
    config: GLMConfig | str | Path | None = None,
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
) -> GLMForCausalLM:
    """Loads a model. On a CPU its weights are float32, the only type that is fast there; elsewhere as the config says.

    Args:
        path: Hugging Face folder (safetensors, or .bin shards), MindSpore `.ckpt` or `.safetensors`, or the
            output folder of a training run (its newest checkpoint).
        config: architecture, or the folder, `config.json` or YAML to read it from. None: `config.json` in `path`.
        adapter: LoRA or P-Tuning adapter to attach; see `GLMForCausalLM.load_adapter`. None: the adapter that the
            files of the weights contain, if they do.
        lora_alpha: see `GLMForCausalLM.load_adapter`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its tensors do not fit the config.
        AdapterError: the adapter cannot be used.
        ConfigError: the config cannot be used.
    """
    path = resolve_checkpoint(path)
    if is_adapter_folder(path):
        raise CheckpointError(
            f"{path}: an adapter, not weights; give load_pretrained the base it was trained on, and this as adapter="
        )
    if config is None:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no config.json here; give load_pretrained(..., config=) a GLMConfig, config.json or YAML"
            )
        config = path
    with open_checkpoint(path) as reader:
        if not isinstance(config, GLMConfig):
            config = read_config(config, with_prefix=bool(reader.adapter_names()))
        if ms.get_context("device_target") == "CPU":
            config = dataclasses.replace(config, param_init_type="float32", compute_dtype="float32")
        # NumPy has no bfloat16: such weights pass through float32, one tensor at a time.
        dtype = "float16" if config.param_init_type == "float16" else "float32"
        model = GLMForCausalLM.from_parameters(config, load_parameters(reader, config, dtype, with_adapter=True))
        adapter = adapter_with(reader, adapter)
    if adapter is not None:
        model.load_adapter(adapter, lora_alpha)
    return model
