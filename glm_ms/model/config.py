"""Architecture of a ChatGLM2 / ChatGLM3 network: `GLMConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from glm_ms.spelling import argument
from glm_ms.storage.errors import FileError
from glm_ms.storage.integrity import check_listed
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import exponent_number, read_object
from glm_ms.storage.suggest import did_you_mean
from glm_ms.storage.yaml_tree import read_yaml

FLOAT_TYPES = ("float32", "float16", "bfloat16")
# Fields of `GLMConfig` that do not change the function, so that they may differ from a config.json beside weights.
FREE_FIELDS = frozenset(
    {"seq_length", "param_init_type", "compute_dtype", "hidden_dropout", "attention_dropout",
     "eos_token_id", "pad_token_id"}
)  # fmt: skip

# Keys of a Hugging Face config.json without effect here: bookkeeping of files, and switches of the reference code
# between equal ways of computing. `apply_query_key_layer_scaling` divides by the layer number and multiplies back;
# `attention_softmax_in_fp32` and `fp32_residual_connection` differ only below float32. Whether weights are quantized
# is seen in their tensors, and compared with `quantization` and `quantization_bit` there (`glm_ms.quant.checkpoint`).
_HF_KEYS_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map", "transformers_version",
        "torch_dtype", "dtype", "use_cache", "original_rope", "bias_dropout_fusion", "apply_query_key_layer_scaling",
        "attention_softmax_in_fp32", "fp32_residual_connection", "classifier_dropout", "return_dict",
        "output_attentions", "output_hidden_states", "bos_token_id", "tokenizer_class",
        "prefix_projection", "quantization", "quantization_bit", "vocab_size", "chunk_size_feed_forward",
        "problem_type",
        "max_length", "is_encoder_decoder", "is_decoder", "torchscript", "use_bfloat16", "id2label", "label2id",
    }
)  # fmt: skip
# Keys of ChatGLM-6B, which has the same `model_type`.
_FIRST_GENERATION = frozenset({"position_encoding_2d", "inner_hidden_size", "gmask_token_id"})


class ConfigError(FileError):
    """A configuration cannot be used; the message names file, key and remedy, `field` the field of `GLMConfig`."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


# Joint linear layers of a block -> their parts in the order of their rows.
JOINT_PARTS = {"self_attention.query_key_value": ("query", "key", "value"), "mlp.dense_h_to_4h": ("gate", "up")}


@dataclass
class GLMConfig:
    """Sizes and switches of the network. Names and defaults are those of the released ChatGLM configs.

    Args:
        padded_vocab_size: rows of the embedding and of the output layer.
        ffn_hidden_size: width of each SwiGLU half.
        kv_channels: width of one attention head.
        seq_length: longest sequence, in tokens.
        multi_query_attention: queries share `multi_query_group_num` keys and values; qkv rows are [q | k | v].
            When false every head has its own key and value and qkv rows are interleaved head by head.
        rope_ratio: scales the rotary base, 10000 * rope_ratio (32K models: 50).
        rmsnorm: RMSNorm when true, LayerNorm (with bias) when false.
        apply_residual_connection_post_layernorm: the residual branch starts after the norm.
        post_layer_norm: a final norm follows the last block.
        add_bias_linear, add_qkv_bias: the dense layers, the qkv projection have a bias.
        param_init_type: storage type of the parameters, one of `FLOAT_TYPES`.
        compute_dtype: type of the matrix products; norms, softmax and loss are float32 always.

    Raises:
        ConfigError: a size is not positive or is too large, a number is not finite, or sizes do not fit each other.
    """

    model_type: ClassVar[str] = "chatglm"  # of a config.json

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    rope_ratio: float = 1.0
    rmsnorm: bool = True
    layernorm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    param_init_type: str = "float32"
    compute_dtype: str = "float32"
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for names, fits, rule in _RULES:
            for name in names:
                if not fits(getattr(self, name)):
                    raise ConfigError(f"{name} = {getattr(self, name)!r}: {rule}", name)
        if self.multi_query_attention and self.num_attention_heads % self.multi_query_group_num:
            raise ConfigError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"multi_query_group_num = {self.multi_query_group_num}",
                "num_attention_heads",
            )

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads: the groups of multi-query attention, else one per query head."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_size(self) -> int:
        """Rows of the joint query-key-value projection."""
        return self.query_size + 2 * self.num_kv_heads * self.kv_channels

    @property
    def joint_parts(self) -> dict[str, dict[str, int]]:
        """Joint linear layer of a block -> part -> rows."""
        kv_size = self.num_kv_heads * self.kv_channels
        rows = {"query": self.query_size, "key": kv_size, "value": kv_size,
                "gate": self.ffn_hidden_size, "up": self.ffn_hidden_size}  # fmt: skip
        return {joint: {part: rows[part] for part in parts} for joint, parts in JOINT_PARTS.items()}

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated: the first half."""
        return self.kv_channels // 2

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return dataclasses.asdict(self)

    def to_hf_dict(self) -> dict[str, Any]:
        """The keys of a Hugging Face `config.json` for this architecture."""
        fields = self.to_dict()
        fields["torch_dtype"] = fields.pop("param_init_type")
        del fields["compute_dtype"]
        if fields["rope_ratio"] == 1:  # older reference code does not know the key
            del fields["rope_ratio"]
        files = {"model_type": self.model_type, "architectures": ["ChatGLMModel"], "tie_word_embeddings": False}
        return {**files, **fields}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> GLMConfig:
        """Builds a config from field names and values; a `type` key, if there is one, must be the name of the class.

        Raises:
            ConfigError: an unknown key or an unusable value; the message begins with `source`.
        """
        values = dict(values)
        kind = values.pop("type", cls.__name__)
        if kind != cls.__name__:
            raise ConfigError(f"{source}: type = {kind!r}: expected {cls.__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{source}: unknown key {key!r}{did_you_mean(key, known)}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_pretrained(cls, path: str | Path, with_prefix: bool = False) -> GLMConfig:
        """Reads a Hugging Face folder or its `config.json`, or the `model.model_config` section of a YAML.

        `with_prefix` allows `pre_seq_len`, for a caller that also loads the P-Tuning prefix.

        Raises:
            ConfigError: the file is missing, broken, of another model type, or has unknown keys.
            CheckpointError: it differs from the manifest beside it.
        """
        if problem := path_problem(path):
            raise ConfigError(problem)
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give a folder with config.json, a .json or a .yaml")
        if path.suffix in (".yaml", ".yml"):
            return cls.from_dict(_yaml_model_section(path), source=str(path))
        return cls._from_hf(path, with_prefix)

    @classmethod
    def _from_hf(cls, path: Path, with_prefix: bool) -> GLMConfig:
        check_listed(path, added=True)
        values = read_object(path, ConfigError)
        foreign = sorted(_FIRST_GENERATION & values.keys())
        if foreign:
            raise ConfigError(
                f"{path}: {', '.join(foreign)}: the config of ChatGLM-6B, the first generation, which is another "
                "network; use ChatGLM2-6B or ChatGLM3-6B"
            )
        model_type = values.pop("model_type", None)
        if model_type != cls.model_type:
            raise ConfigError(f"{path}: model_type = {model_type!r}: expected {cls.model_type!r}")
        if values.pop("tie_word_embeddings", False):
            raise ConfigError(f"{path}: tie_word_embeddings = true: ChatGLM has a separate output layer")
        if values.pop("pre_seq_len", None) and not with_prefix:
            raise ConfigError(
                f"{path}: pre_seq_len is set, so this belongs to a P-Tuning prefix, and no weights of one are beside "
                f"it; give a prefix as {argument('adapter')}, and the model it was trained on as weights"
            )
        dtype = values.get("torch_dtype", values.get("dtype"))
        values = {key: value for key, value in values.items() if key not in _HF_KEYS_WITHOUT_EFFECT}
        if dtype is not None:
            values["param_init_type"] = str(dtype).replace("torch.", "")
        return cls.from_dict(values, source=str(path))


# The largest sizes: far beyond every released model, so that a typing error is refused before memory is asked for.
_LARGEST = {
    "num_layers": 1 << 10, "padded_vocab_size": 1 << 24, "hidden_size": 1 << 17, "ffn_hidden_size": 1 << 20,
    "kv_channels": 1 << 12, "num_attention_heads": 1 << 12, "seq_length": 1 << 20, "multi_query_group_num": 1 << 12,
}  # fmt: skip
# Fields, which of their values fit, the rule in words.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (tuple(_LARGEST), lambda value: value >= 1, "must be at least 1"),
    *(((name,), largest.__ge__, f"must be at most {largest}") for name, largest in _LARGEST.items()),
    (("eos_token_id", "pad_token_id"), lambda value: 0 <= value < 1 << 31, "must be an id of the vocabulary"),
    (("kv_channels",), lambda value: value % 4 == 0, "must be a multiple of 4 (rotary pairs)"),
    (("param_init_type", "compute_dtype"), FLOAT_TYPES.__contains__, f"must be one of {', '.join(FLOAT_TYPES)}"),
    (("hidden_dropout", "attention_dropout"), lambda value: 0 <= value < 1, "must be in [0, 1)"),
    (("layernorm_epsilon",), lambda value: 0 < value < 1, "must be above 0 and below 1"),
    (("rope_ratio",), lambda value: 1e-4 < value <= 1e6, "must be above 1e-4 and at most 1e6"),
)


def _check_type(field: dataclasses.Field, value: Any) -> None:
    """Compares a value with its annotation; an int is a float, a bool is not a number."""
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[str(field.type)]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ConfigError(f"{field.name} = {value!r}: expected {field.type}, found {type(value).__name__}", field.name)


def _yaml_model_section(path: Path) -> dict[str, Any]:
    section = read_yaml(path, ConfigError).plain()
    for key in ("model", "model_config"):
        if not isinstance(section, dict) or key not in section:
            raise ConfigError(f"{path}: has no section model.model_config")
        section = section[key]
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: model.model_config must be a mapping")
    if section.get("padded_vocab_size") == "auto":
        raise ConfigError(
            f"{path}: model.model_config.padded_vocab_size: auto: known only with the tokenizer "
            "of a run; give the config.json beside the weights, or a number"
        )
    return {key: exponent_number(value) for key, value in section.items()}
