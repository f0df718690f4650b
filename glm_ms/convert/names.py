"""Names and shapes of parameters: Hugging Face <-> glm_ms, joint weights and their parts, what a `GLMConfig` expects.

glm_ms uses the names of MindFormers' released glm2_6b.ckpt and glm3_6b.ckpt, which are those of the original model
except the embedding; `families` has the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import numpy as np

from glm_ms.convert.adapter_files import adapter_name
from glm_ms.families import FAMILIES, family_of
from glm_ms.model.config import JOINT_PARTS, GLMConfig

# A constant that Hugging Face checkpoints store although it follows from the config.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"

# Other content of training checkpoints of MindSpore and MindFormers: optimizer state is a prefix and the name of a
# parameter, counters and scales are single names.
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
    """The glm_ms name of a parameter stored under its Hugging Face, MindFormers or glm_ms name, in any family.

    Also of an adapter's tensor under its MindFormers name.
    """
    for family in FAMILIES.values():
        known = family.parameter_names.get(name) or family.aliases.get(name)
        if known:
            return known
    return adapter_name(name)


def to_hf_name(name: str, config: GLMConfig) -> str:
    """The Hugging Face name of a parameter of glm_ms, in the family of a configuration."""
    names = family_of(config).parameter_names
    return next((hf for hf, glm in names.items() if glm == name), name)


def is_parameter(name: str) -> bool:
    """Whether the network of some configuration has a parameter of this glm_ms name."""
    return re.sub(r"\.layers\.\d+\.", ".layers.0.", name) in _every_parameter()


@cache
def _every_parameter() -> frozenset[str]:
    biased = GLMConfig(num_layers=1, add_bias_linear=True, rmsnorm=False)
    return frozenset(expected_shapes(biased))


def is_training_state(name: str) -> bool:
    """Whether a stored name is optimizer state or a training counter rather than a weight."""
    return name in _TRAINING_NAMES or name.startswith(_TRAINING_PREFIXES)


def split_joint(name: str, value: np.ndarray, config: GLMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Name and rows of the parts of a joint weight (query-key-value, gate and up), as sharded networks have them.

    Other parameters are given as they are. `value` is [rows, ...].
    """
    module, _, kind = name.rpartition(".")
    parts = next((parts for joint, parts in config.joint_parts.items() if module.endswith(joint)), None)
    if parts is None:
        yield name, value
        return
    begin = 0
    for part, rows in parts.items():
        yield f"{module}.{part}.{kind}", value[begin : begin + rows]
        begin += rows


def joint_of(name: str) -> tuple[str, int, int]:
    """Joint parameter of a part, index of the part and number of parts; (name, 0, 1) for other parameters."""
    module, _, kind = name.rpartition(".")
    joint, _, part = module.rpartition(".")
    parts = _parts_of(joint)
    return (f"{joint}.{kind}", parts.index(part), len(parts)) if part in parts else (name, 0, 1)


def part_names(name: str) -> list[str]:
    """Names of the parts of a joint parameter, in the order of its rows; empty for other parameters."""
    module, _, kind = name.rpartition(".")
    return [f"{module}.{part}.{kind}" for part in _parts_of(module)]


def _parts_of(module: str) -> tuple[str, ...]:
    return next((tuple(parts) for ending, parts in JOINT_PARTS.items() if module.endswith(ending)), ())


def expected_shapes(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network, by glm_ms name and in its order, with its shape; dense weights are [out, in]."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    embedding = (config.padded_vocab_size, hidden)
    dense_bias, norm_bias = config.add_bias_linear, not config.rmsnorm
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.embedding_table": embedding}

    def add(module: str, *weight: int, bias: bool) -> None:
        shapes[f"{module}.weight"] = weight
        if bias:
            shapes[f"{module}.bias"] = weight[:1]

    for layer in range(config.num_layers):
        block = f"transformer.encoder.layers.{layer}"
        attention = f"{block}.self_attention"
        add(f"{block}.input_layernorm", hidden, bias=norm_bias)
        add(f"{attention}.query_key_value", config.qkv_size, hidden, bias=dense_bias or config.add_qkv_bias)
        add(f"{attention}.dense", hidden, config.query_size, bias=dense_bias)
        add(f"{block}.post_attention_layernorm", hidden, bias=norm_bias)
        add(f"{block}.mlp.dense_h_to_4h", 2 * ffn, hidden, bias=dense_bias)
        add(f"{block}.mlp.dense_4h_to_h", hidden, ffn, bias=dense_bias)
    if config.post_layer_norm:
        add("transformer.encoder.final_layernorm", hidden, bias=norm_bias)
    shapes["transformer.output_layer.weight"] = embedding
    return shapes


def inverse_frequencies(config: GLMConfig) -> np.ndarray:
    """The `inv_freq` buffer of a Hugging Face checkpoint, float32, [rotary_dim / 2].

    The base is 10000 for every `rope_ratio`: the original code scales it later. As there, the power is rounded to
    float32 before the division. It is computed in float64 so that every machine gives the same bits.
    """
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    powers = (10000.0 ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers
