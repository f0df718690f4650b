"""Names and shapes of the parameters: Hugging Face <-> glm_ms, and what a `GLMConfig` asks for.

glm_ms calls parameters as MindFormers' released glm2_6b.ckpt and glm3_6b.ckpt do, which are the names of the
original model but for the embedding. This module holds the whole difference.
"""

from __future__ import annotations

import numpy as np

from glm_ms.families import FAMILIES, family_of
from glm_ms.model.config import GLMConfig

# A constant that released Hugging Face checkpoints carry although it follows from the config.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"

# What MindSpore and MindFormers training checkpoints hold besides the weights. Optimizer state repeats the
# parameter's name behind one of these words; counters and scales stand alone.
_TRAINING_PREFIXES = (
    "adam_m.", "adam_v.", "moment1.", "moment2.", "moments.", "vhat.", "exp_avg.", "exp_avg_sq.",
    "max_exp_avg_sq.", "accum.", "stat.", "lamb_m.", "lamb_v.", "accu_grads.",
)  # fmt: skip
_TRAINING_NAMES = frozenset(
    {
        "global_step", "epoch_num", "step_num", "global_batch_size", "loss_scale", "scale_sense",
        "current_iterator_step", "last_overflow_iterator_step", "beta1_power", "beta2_power", "momentum",
        "learning_rate", "weight_decay", "afactor_step", "state_step",
        "loss_scale_good_steps", "loss_scale_overflows",
    }
)  # fmt: skip


def to_glm_name(name: str) -> str:
    """The glm_ms name of a parameter stored under its Hugging Face, MindFormers or glm_ms name, in any family."""
    for family in FAMILIES.values():
        known = family.parameter_names.get(name) or family.aliases.get(name)
        if known:
            return known
    return name


def to_hf_name(name: str, config: GLMConfig) -> str:
    """The Hugging Face name of a parameter of glm_ms, in the family of a configuration."""
    names = family_of(config).parameter_names
    return next((hf for hf, glm in names.items() if glm == name), name)


def is_training_state(name: str) -> bool:
    """Whether a stored name is optimizer state or a training counter rather than a weight."""
    return name in _TRAINING_NAMES or name.startswith(_TRAINING_PREFIXES)


def expected_shapes(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network, by glm_ms name, with its shape; dense weights are [out, in].

    The order is that of the network: embedding, blocks, final norm, output layer.
    """
    embedding = (config.padded_vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.embedding_table": embedding}
    for layer in range(config.num_layers):
        shapes.update(_block_shapes(config, f"transformer.encoder.layers.{layer}"))
    if config.post_layer_norm:
        shapes.update(_norm_shapes(config, "transformer.encoder.final_layernorm"))
    shapes["transformer.output_layer.weight"] = embedding
    return shapes


def inverse_frequencies(config: GLMConfig) -> np.ndarray:
    """The `inv_freq` buffer of a Hugging Face checkpoint, float32, [rotary_dim / 2].

    Base 10000 whatever `rope_ratio` is: the original code scales the base later. The power is rounded to
    float32 before it is inverted, as there; taking it in float64 first makes the result the same everywhere.
    """
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    powers = (10000.0 ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def _block_shapes(config: GLMConfig, block: str) -> dict[str, tuple[int, ...]]:
    dense_bias = config.add_bias_linear
    return {
        **_norm_shapes(config, f"{block}.input_layernorm"),
        **_dense_shapes(
            f"{block}.self_attention.query_key_value",
            config.qkv_size,
            config.hidden_size,
            dense_bias or config.add_qkv_bias,
        ),
        **_dense_shapes(f"{block}.self_attention.dense", config.hidden_size, config.query_size, dense_bias),
        **_norm_shapes(config, f"{block}.post_attention_layernorm"),
        **_dense_shapes(
            f"{block}.mlp.dense_h_to_4h", 2 * config.ffn_hidden_size, config.hidden_size, dense_bias
        ),
        **_dense_shapes(f"{block}.mlp.dense_4h_to_h", config.hidden_size, config.ffn_hidden_size, dense_bias),
    }


def _dense_shapes(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def _norm_shapes(config: GLMConfig, name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (config.hidden_size,)}
    if not config.rmsnorm:
        shapes[f"{name}.bias"] = (config.hidden_size,)
    return shapes
