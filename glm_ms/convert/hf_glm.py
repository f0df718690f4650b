"""A folder for `GlmForCausalLM` of transformers, vLLM and SGLang, which load it without code of the model.

Source of the names and of the configuration: transformers, `models/glm`. The network is that of ChatGLM2 and ChatGLM3
with separate projections of queries, keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.convert.chat_template import chat_template
from glm_ms.convert.fast_tokenizer import special_spellings, tokenizer_json
from glm_ms.convert.writers import Parameters, Shapes, write_folder
from glm_ms.model.config import GLMConfig
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import SentencePieceTokenizer

_BLOCKS = "transformer.encoder.layers."
_NAMES = {
    "transformer.embedding.embedding_table": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_NAMES_IN_BLOCK = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
_QKV = "self_attention.query_key_value."
# Field of `GLMConfig` -> its only value in that network.
_ONLY = {
    "rmsnorm": True, "add_bias_linear": False, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
}  # fmt: skip


def check_network(config: GLMConfig, source: str | Path, program: str) -> None:
    """Raises CheckpointError for a network with other parts than those of the released models.

    The message names `source` and the program that has no such network.
    """
    other = [f"{name}: {str(not value).lower()}" for name, value in _ONLY.items() if getattr(config, name) != value]
    if other:
        raise CheckpointError(
            f"{source}: {', '.join(other)}: {program} has no such network; the released ChatGLM2 and ChatGLM3 "
            "models fit"
        )


def check_vocabulary(config: GLMConfig, tokenizer: SentencePieceTokenizer, source: str | Path) -> None:
    """Raises CheckpointError for a tokenizer with more ids than the network."""
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise CheckpointError(
            f"{tokenizer.vocab_file}: has {tokenizer.vocab_size} ids, but {source} has padded_vocab_size = "
            f"{config.padded_vocab_size}; give the tokenizer of the model"
        )


def check_config(config: GLMConfig, tokenizer: SentencePieceTokenizer, source: str | Path) -> None:
    """Raises CheckpointError for an architecture that `GlmForCausalLM` lacks, or a tokenizer that does not fit."""
    check_network(config, source, "GlmForCausalLM")
    check_vocabulary(config, tokenizer, source)
    text_files(config, "float32", tokenizer)  # a vocabulary that cannot be exported is refused before weights are read


def write_hf_glm_folder(
    path: Path, config: GLMConfig, tokenizer: SentencePieceTokenizer, shapes: Shapes, dtype: str,
    parameters: Parameters, max_shard_size: int, extra_files: Iterable[Path], overwrite: bool
) -> None:  # fmt: skip
    """Writes the folder, as `write_hf_folder`; the names of `shapes` and `parameters` are those of glm_ms."""
    split = dict[str, tuple[int, ...]]()
    for name, shape in shapes.items():
        nothing = np.broadcast_to(np.float32(0), shape)
        split.update({part: rows.shape for part, rows in glm_tensors(name, nothing, config)})
    parts = (part for name, value in parameters for part in glm_tensors(name, value, config))
    write_folder(
        path, split, dtype, parts, text_files(config, dtype, tokenizer), max_shard_size, extra_files, overwrite
    )


def glm_tensors(name: str, value: np.ndarray, config: GLMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter of glm_ms as `GlmForCausalLM` has it: one tensor, or the three parts of query_key_value.

    `value` is [rows, ...]; its parts are views where the rows of a part follow each other.
    """
    if name in _NAMES:
        yield _NAMES[name], value
        return
    layer, _, inner = name.removeprefix(_BLOCKS).partition(".")
    if not inner.startswith(_QKV):
        yield f"model.layers.{layer}.{_NAMES_IN_BLOCK[inner]}", value
        return
    for part, rows in zip("qkv", qkv_parts(value, config)):
        yield f"model.layers.{layer}.self_attn.{part}_proj.{inner.removeprefix(_QKV)}", rows


def qkv_parts(value: np.ndarray, config: GLMConfig) -> list[np.ndarray]:
    """Rows of queries, keys and values: in this order, or without multi-query attention head by head."""
    if config.multi_query_attention:
        kv_size = config.num_kv_heads * config.kv_channels
        return np.split(value, [config.query_size, config.query_size + kv_size])
    heads = value.reshape(config.num_attention_heads, 3, config.kv_channels, *value.shape[1:])
    return [heads[:, part].reshape(config.query_size, *value.shape[1:]) for part in range(3)]


def config_json(config: GLMConfig, dtype: str, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of `config.json`."""
    return {
        "architectures": ["GlmForCausalLM"], "model_type": "glm", "torch_dtype": dtype,
        "vocab_size": config.padded_vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.kv_channels, "hidden_act": "silu", "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout, "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.layernorm_epsilon, "rope_theta": 10000.0 * config.rope_ratio,
        "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "use_cache": True,
        "bos_token_id": None, "eos_token_id": tokenizer.stop_token_ids, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def text_files(config: GLMConfig, dtype: str, tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    """Name -> text of every file beside the weights."""
    special = [text for text, index in special_spellings(tokenizer).items() if index >= tokenizer.sp.GetPieceSize()]
    documents: dict[str, dict[str, Any]] = {
        "config.json": config_json(config, dtype, tokenizer),
        "generation_config.json": {
            "eos_token_id": tokenizer.stop_token_ids, "pad_token_id": tokenizer.pad_token_id, "do_sample": False
        },
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_length,
            "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "unk_token": tokenizer.unk_token,
            "additional_special_tokens": special, "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side, "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
        "special_tokens_map.json": {
            "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "unk_token": tokenizer.unk_token,
            "additional_special_tokens": special,
        },
    }  # fmt: skip
    # Not chat_template.jinja, which older versions of transformers and vLLM do not read.
    if template := chat_template(tokenizer):
        documents["tokenizer_config.json"]["chat_template"] = template
    return {name: json.dumps(value, ensure_ascii=False, indent=2) + "\n" for name, value in documents.items()}
