"""A GGUF file of the network, which llama.cpp runs as architecture `chatglm`, with vocabulary and chat template.

Source of keys and names: llama.cpp, `gguf-py/gguf/constants.py` and `src/models/chatglm.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glm_ms.convert.chat_template import chat_template
from glm_ms.convert.fast_tokenizer import check_settings, special_spellings
from glm_ms.convert.gguf_file import ALIGNMENT, TYPES, Value, file_size, write_gguf
from glm_ms.convert.hf_glm import check_network, check_vocabulary, qkv_parts
from glm_ms.convert.writers import Parameters, Shapes, check_space
from glm_ms.model.config import GLMConfig
from glm_ms.storage.atomic import atomic_output
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import SentencePieceTokenizer

ENDING = ".gguf"
_ARCHITECTURE = "chatglm"
_QUANTISATION_VERSION = 2
_BLOCKS = "transformer.encoder.layers."
_NAMES = {
    "transformer.embedding.embedding_table": "token_embd.weight",
    "transformer.encoder.final_layernorm.weight": "output_norm.weight",
    "transformer.output_layer.weight": "output.weight",
}
_NAMES_IN_BLOCK = {
    "input_layernorm": "attn_norm", "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip
# Kinds of tokens in `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
# Tokens that end an answer besides </s>, and the key that tells llama.cpp so.
_ENDINGS = {"<|user|>": "tokenizer.ggml.eot_token_id", "<|observation|>": "tokenizer.ggml.eom_token_id"}


def check_gguf(config: GLMConfig, tokenizer: SentencePieceTokenizer | None, source: str | Path) -> None:
    """Raises CheckpointError for a network that llama.cpp's `chatglm` lacks, or a tokenizer that does not fit."""
    check_network(config, source, "llama.cpp")
    if config.query_size != config.hidden_size:
        raise CheckpointError(
            f"{source}: num_attention_heads x kv_channels = {config.query_size} and hidden_size = "
            f"{config.hidden_size}: llama.cpp has this network with equal sizes only"
        )
    if tokenizer is not None:
        check_vocabulary(config, tokenizer, source)
        check_settings(tokenizer, "a GGUF file")


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a parameter of glm_ms."""
    if name in _NAMES:
        return _NAMES[name]
    layer, _, inner = name.removeprefix(_BLOCKS).partition(".")
    module, _, kind = inner.rpartition(".")
    return f"blk.{layer}.{_NAMES_IN_BLOCK[module]}.{kind}"


def gguf_tensors(shapes: Shapes, kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name in the file -> shape and type of every tensor: matrices have type `kind`, vectors F32.

    A matrix whose rows are no whole blocks of a quantised type has F16, as llama.cpp's own quantiser does.
    """

    def of(shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        return kind if shape[-1] % TYPES[kind].block == 0 else "F16"

    return {gguf_name(name): (tuple(shape), of(shape)) for name, shape in shapes.items()}


def gguf_arrays(parameters: Parameters, config: GLMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the file, array) of every parameter; rows of query_key_value are those of queries, keys, values."""
    for name, value in parameters:
        if "query_key_value" in name and not config.multi_query_attention:
            value = np.concatenate(qkv_parts(value, config))
        yield gguf_name(name), value
        del value


def gguf_metadata(config: GLMConfig, kind: str, tokenizer: SentencePieceTokenizer | None) -> dict[str, Value]:
    """The metadata of a file; without a tokenizer llama.cpp runs ids only."""
    values: dict[str, Value] = {
        "general.architecture": _ARCHITECTURE, "general.name": "ChatGLM", "general.alignment": ALIGNMENT,
        "general.file_type": TYPES[kind].file_type, "general.quantization_version": _QUANTISATION_VERSION,
    }  # fmt: skip
    sizes: dict[str, Value] = {
        "vocab_size": config.padded_vocab_size, "context_length": config.seq_length,
        "embedding_length": config.hidden_size, "feed_forward_length": config.ffn_hidden_size,
        "block_count": config.num_layers, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.kv_channels,
        "attention.value_length": config.kv_channels,
        "attention.layer_norm_rms_epsilon": float(config.layernorm_epsilon),
        "rope.dimension_count": config.rotary_dim, "rope.freq_base": 10000.0 * config.rope_ratio,
    }  # fmt: skip
    values.update({f"{_ARCHITECTURE}.{key}": value for key, value in sizes.items()})
    return {**values, **({"tokenizer.ggml.model": "no_vocab"} if tokenizer is None else _vocabulary(config, tokenizer))}


def _vocabulary(config: GLMConfig, tokenizer: SentencePieceTokenizer) -> dict[str, Value]:
    sp, special = tokenizer.sp, special_spellings(tokenizer)
    names = {index: text for text, index in special.items()}
    pieces = sp.GetPieceSize()
    texts, scores, kinds = [], [], []
    for index in range(config.padded_vocab_size):
        texts.append(names.get(index) or (sp.IdToPiece(index) if index < pieces else f"[PAD{index}]"))
        scores.append(float(sp.GetScore(index)) if index < pieces else 0.0)
        kinds.append(_CONTROL if index in names else _kind(tokenizer, index) if index < pieces else _UNUSED)
    kinds[sp.unk_id()] = _UNKNOWN
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "chatglm-spm", "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id, "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": tokenizer.adds_space,
    }  # fmt: skip
    values.update({key: special[token] for token, key in _ENDINGS.items() if token in special})
    if template := chat_template(tokenizer):
        values["tokenizer.chat_template"] = template
    return values


def _kind(tokenizer: SentencePieceTokenizer, index: int) -> int:
    return _BYTE if tokenizer.sp.IsByte(index) else _UNUSED if tokenizer.sp.IsUnused(index) else _NORMAL


def write_gguf_model(
    path: Path, config: GLMConfig, kind: str, shapes: Shapes, parameters: Parameters,
    tokenizer: SentencePieceTokenizer | None, overwrite: bool = False
) -> None:  # fmt: skip
    """Writes a whole file or none; names and shapes are those of glm_ms, arrays float32.

    Raises:
        CheckpointError: the output exists or cannot be written, or a parameter differs from `shapes` or its type.
    """
    metadata, tensors = gguf_metadata(config, kind, tokenizer), gguf_tensors(shapes, kind)
    with atomic_output(path, overwrite=overwrite, parents=True) as work:
        check_space(work.parent, path, file_size(metadata, tensors))
        write_gguf(work, metadata, tensors, gguf_arrays(parameters, config))
