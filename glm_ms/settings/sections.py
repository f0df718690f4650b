"""The sections of a configuration: one dataclass each, a field for every key.

A field carries its default, its documentation, its and its allowed values. Reading, checking, the
command line, `docs/settings.md` and writing back all use these declarations. Key names follow MindFormers' YAML files.
"""

# ruff: noqa: RUF009 - `key` is `dataclasses.field` with documentation
# No `from __future__ import annotations`: the annotations are read at run time, also by Python 3.9.
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from glm_ms.data.formats import FORMATS, formats_with_max_seq_length
from glm_ms.families import tokenizer_names
from glm_ms.metrics import METRICS, score_names
from glm_ms.model.config import FLOAT_TYPES, GLMConfig
from glm_ms.peft import ADAPTERS
from glm_ms.settings.optimizers import OPTIMIZERS, SCHEDULES


def key(default: Any, doc: str, **rules: Any) -> Any:
    """Declares a key.

    Args:
        default: value if the YAML does not have the key; a list or a dataclass type is made anew each time.
        doc: one line of documentation.
        rules: `at_least`, `above`, `at_most`, `below` bound numbers; `pattern` (with `example`) is the regular
            expression of a text; `choices` are the allowed texts, or a function that returns them; `length` fixes a
            list's length; `or_one` allows a single value in place of a list; `used_with` = (key of the same section,
            values, or a function of the key's name that returns them): with other values of that key, this one has no
            effect.
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: dataclasses.Field) -> Any:
    """The default of a key."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def allowed(item: dataclasses.Field) -> tuple[str, ...]:
    """The allowed texts of a key declared with `choices`."""
    choices = item.metadata["choices"]
    return tuple(choices() if callable(choices) else choices)


def used_with(item: dataclasses.Field) -> tuple[str, tuple[str, ...]]:
    """The deciding key and its values of a key declared with `used_with`."""
    other, values = item.metadata["used_with"]
    return other, tuple(values(item.name) if callable(values) else values)


@dataclass
class ContextSettings:
    """`context`: device and execution mode of MindSpore."""

    mode: Literal[0, 1] = key(0, "0: graph (compiled), 1: PyNative (for debugging, many times slower)")
    device_target: Literal["CPU", "Ascend"] = key("CPU", "target device")
    device_id: int = key(0, "card, for a run on a single card", at_least=0)
    max_device_memory: Optional[str] = key(
        None, "memory limit of MindSpore on an Ascend card; null: MindSpore's default",
        pattern=r"\d+(\.\d+)?GB", example="58GB",
    )  # fmt: skip
    use_fused_kernels: bool = key(
        False, "Ascend kernels for norm, rotation, attention; see tools/check_device.py"
    )


@dataclass
class ParallelSettings:
    """`parallel`: mode of a distributed run."""

    parallel_mode: Literal[0, 1] = key(0, "0: data parallel, 1: semi-automatic (sharding strategies)")
    full_batch: bool = key(False, "every card reads the whole global batch (semi-automatic mode only)")
    enable_parallel_optimizer: bool = key(False, "shard parameters and optimizer state over the cards")


@dataclass
class ParallelConfigSettings:
    """`parallel_config`: number of parts that each dimension of the work is split into."""

    data_parallel: int = key(1, "parts of the batch", at_least=1)
    model_parallel: int = key(1, "parts of each weight", at_least=1)
    pipeline_stage: int = key(1, "pipeline stages of the layers", at_least=1)
    micro_batch_num: int = key(1, "micro batches in flight with pipeline_stage > 1", at_least=1)
    vocab_emb_dp: bool = key(True, "copy the embedding to every card (False: split it by vocabulary)")
    gradient_aggregation_group: int = key(4, "gradients that share one communication", at_least=1)
    use_seq_parallel: bool = key(False, "split norms and dropout by sequence (needs model_parallel > 1)")


@dataclass
class RecomputeSettings:
    """`recompute_config`: compute activations again in the backward pass in place of keeping them."""

    recompute: bool = key(False, "recompute every transformer block: less memory, about a third more time")
    mp_comm_recompute: bool = key(True, "also recompute sums over model-parallel cards (False: keep them)")
    parallel_optimizer_comm_recompute: bool = key(
        False, "gather the weights of sharded optimizers again (False: keep them, whole, on every card)"
    )


_DROPOUT = {"at_least": 0, "below": 1}


@dataclass
class ModelConfigSettings:
    """`model.model_config`: sizes and switches of the network; names and defaults are those of `glm_ms.GLMConfig`."""

    type: Literal["GLMConfig"] = key("GLMConfig", "kind of configuration")
    num_layers: int = key(GLMConfig.num_layers, "transformer blocks")
    padded_vocab_size: Union[int, Literal["auto"]] = key(
        GLMConfig.padded_vocab_size, "rows of embedding and output layer; auto: fitted to the tokenizer"
    )
    hidden_size: int = key(GLMConfig.hidden_size, "width of the hidden states")
    ffn_hidden_size: int = key(GLMConfig.ffn_hidden_size, "width of each SwiGLU half")
    kv_channels: int = key(GLMConfig.kv_channels, "width of an attention head")
    num_attention_heads: int = key(GLMConfig.num_attention_heads, "query heads")
    seq_length: int = key(GLMConfig.seq_length, "longest sequence, in tokens")
    multi_query_attention: bool = key(GLMConfig.multi_query_attention, "query heads share key/value groups")
    multi_query_group_num: int = key(
        GLMConfig.multi_query_group_num, "key/value groups with multi_query_attention"
    )
    rope_ratio: float = key(GLMConfig.rope_ratio, "factor of the rotary base 10000 (32K models: 50)")
    rmsnorm: bool = key(GLMConfig.rmsnorm, "RMSNorm (False: LayerNorm)")
    layernorm_epsilon: float = key(GLMConfig.layernorm_epsilon, "added to the variance in a norm")
    apply_residual_connection_post_layernorm: bool = key(
        GLMConfig.apply_residual_connection_post_layernorm, "the residual branch starts after the norm"
    )
    post_layer_norm: bool = key(GLMConfig.post_layer_norm, "a final norm follows the last block")
    add_bias_linear: bool = key(GLMConfig.add_bias_linear, "linear layers have a bias")
    add_qkv_bias: bool = key(GLMConfig.add_qkv_bias, "the projection to queries, keys and values has a bias")
    hidden_dropout: float = key(GLMConfig.hidden_dropout, "dropout on hidden states")
    attention_dropout: float = key(GLMConfig.attention_dropout, "dropout on attention weights")
    param_init_type: str = key(
        GLMConfig.param_init_type, "storage type of the parameters", choices=FLOAT_TYPES
    )
    compute_dtype: str = key(
        GLMConfig.compute_dtype,
        "type of matrix products; norms, softmax and loss use float32",
        choices=FLOAT_TYPES,
    )
    eos_token_id: int = key(GLMConfig.eos_token_id, "token that ends an answer")
    pad_token_id: int = key(GLMConfig.pad_token_id, "token of padding")


@dataclass
class ArchSettings:
    """`model.arch`: the network class."""

    type: Literal["GLMForCausalLM"] = key("GLMForCausalLM", "network class")


_ADAPTERS = ("pet_type", lambda name: [kind for kind, adapter in ADAPTERS.items() if name in adapter.keys])


@dataclass
class PetSettings:
    """`model.pet_config`: parameter-efficient finetuning."""

    pet_type: Optional[str] = key(
        None, "lora: low-rank adapters, ptuning2: a learnt prefix of keys and values; null: train all weights",
        choices=lambda: ADAPTERS,
    )  # fmt: skip
    lora_rank: int = key(8, "rows of A and columns of B", at_least=1, used_with=_ADAPTERS)
    lora_alpha: float = key(32.0, "B A is scaled by lora_alpha / lora_rank", above=0, used_with=_ADAPTERS)
    lora_dropout: float = key(0.1, "dropout on the input of A", **_DROPOUT, used_with=_ADAPTERS)
    target_modules: Union[list[str], str] = key(
        ".*query_key_value", "modules: a regex on the whole name, or a list of endings", used_with=_ADAPTERS
    )
    pre_seq_len: int = key(128, "positions of the prefix", at_least=1, used_with=_ADAPTERS)
    prefix_projection: bool = key(False, "an MLP between embedding and prefix", used_with=_ADAPTERS)
    projection_dim: Optional[int] = key(
        None, "width of that MLP; null: hidden_size", at_least=1, used_with=_ADAPTERS
    )
    dropout_prob: float = key(0.1, "dropout on the prefix", **_DROPOUT, used_with=_ADAPTERS)


@dataclass
class ModelSettings:
    """`model`: the network and its initial weights."""

    model_config: ModelConfigSettings = key(ModelConfigSettings, "sizes and switches of the network")
    arch: ArchSettings = key(ArchSettings, "network class")
    pet_config: PetSettings = key(PetSettings, "parameter-efficient finetuning: LoRA, P-Tuning v2")
    init: Literal["checkpoint", "random"] = key(
        "checkpoint",
        "an empty load_checkpoint is an error (checkpoint; not in run_mode train) or allowed (random)",
    )


@dataclass
class TokenizerSettings:
    """`processor.tokenizer`: the tokenizer."""

    type: str = key("ChatGLM3Tokenizer", "tokenizer class", choices=tokenizer_names)
    vocab_file: str = key("", "path of tokenizer.model")


@dataclass
class ProcessorSettings:
    """`processor`: text to ids and back."""

    tokenizer: TokenizerSettings = key(TokenizerSettings, "the tokenizer")


@dataclass
class RunnerSettings:
    """`runner_config`: length of training."""

    epochs: int = key(1, "passes over the training data", at_least=1)
    batch_size: int = key(8, "training rows per step and data-parallel part", at_least=1)
    max_steps: Optional[int] = key(None, "stop after this many steps; null: after `epochs`", at_least=1)
    gradient_accumulation_steps: int = key(1, "steps whose gradients make one update", at_least=1)


_SCALED = ("type", ("DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"))
_DYNAMIC = ("type", ("DynamicLossScaleUpdateCell",))


@dataclass
class LossScaleSettings:
    """`runner_wrapper.scale_sense`: loss scaling, which keeps small float16 gradients from becoming zero."""

    type: Optional[Literal["DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"]] = key(
        None, "the scale follows overflows, or is fixed; null: no scaling"
    )
    loss_scale_value: float = key(65536.0, "first scale", above=0, used_with=_SCALED)
    scale_factor: int = key(2, "factor of a change of the scale", at_least=2, used_with=_DYNAMIC)
    scale_window: int = key(1000, "updates until the scale grows", at_least=1, used_with=_DYNAMIC)


@dataclass
class WrapperSettings:
    """`runner_wrapper`: the training step."""

    type: Literal["GLMTrainOneStep"] = key("GLMTrainOneStep", "training step")
    use_clip_grad: bool = key(True, "clip the global norm of the gradients")
    max_grad_norm: float = key(1.0, "largest global norm with use_clip_grad", above=0)
    scale_sense: LossScaleSettings = key(LossScaleSettings, "loss scaling, for compute_dtype float16")


@dataclass
class OptimizerSettings:
    """`optimizer`: the optimizer. The learning rate is in `lr_schedule`."""

    type: str = key("GLMAdamW", "AdamW with decoupled weight decay", choices=lambda: OPTIMIZERS)
    betas: list[float] = key([0.9, 0.999], "decay rates of both moments", length=2, **_DROPOUT)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = key(0.01, "decoupled decay, on every trainable parameter", at_least=0)


_COSINE, _POLYNOMIAL = ("type", ("CosineWithWarmUpLR",)), ("type", ("PolynomialWithWarmUpLR",))
_TO_LR_END = ("type", ("CosineWithWarmUpLR", "PolynomialWithWarmUpLR"))


@dataclass
class LRScheduleSettings:
    """`lr_schedule`: learning rate over steps."""

    type: str = key("LinearWithWarmUpLR", "decay after the warm-up", choices=lambda: SCHEDULES)
    learning_rate: float = key(5e-5, "highest learning rate, reached at the end of the warm-up", at_least=0)
    lr_end: float = key(0.0, "learning rate of the last step", at_least=0, used_with=_TO_LR_END)
    warmup_steps: int = key(0, "steps of linear rise from 0", at_least=0)
    warmup_ratio: Optional[float] = key(None, "the same as a share of all steps", at_least=0, at_most=1)
    power: float = key(1.0, "exponent of the decay", above=0, used_with=_POLYNOMIAL)
    num_cycles: float = key(0.5, "cosine waves; 0.5 falls once from top to end", above=0, used_with=_COSINE)
    total_steps: int = key(-1, "steps of the decay; -1: all steps of the run", at_least=-1)


@dataclass
class DataLoaderSettings:
    """`*_dataset.data_loader`: format and place of the records."""

    type: str = key(
        "ADGenDataLoader",
        "format: prompt and answer (ADGen); conversations as in finetune_hf.py of ChatGLM3 (Conversation); "
        "conversations with tools and loss flags, one JSON object per line (ToolAlpaca)",
        choices=lambda: FORMATS,
    )
    dataset_dir: str = key("", "the .json / .jsonl file, or its folder")
    shuffle: bool = key(True, "a new order in every epoch, drawn from `seed`")
    origin_columns: list[str] = key(["content", "summary"], "columns of prompt and answer", length=2)


@dataclass
class EvalDataLoaderSettings(DataLoaderSettings):
    """`eval_dataset.data_loader`: format and place of the evaluation records."""

    shuffle: Literal[False] = key(False, "evaluation reads the records in the order of the file")


@dataclass
class _DatasetSettings:
    data_loader: DataLoaderSettings = key(DataLoaderSettings, "format and place of the records")
    max_source_length: int = key(64, "tokens of the prompt, special tokens included", at_least=1)
    max_target_length: int = key(127, "tokens of the answer", at_least=1)
    max_seq_length: Optional[int] = key(
        None, "tokens of a row; null: model.model_config.seq_length", at_least=4,
        used_with=("data_loader.type", lambda _: formats_with_max_seq_length()),
    )  # fmt: skip
    ignore_pad_token_for_loss: bool = key(True, "padding has no loss")
    num_samples: Optional[int] = key(None, "use only the first records, this many; null: all", at_least=1)


@dataclass
class TrainDatasetSettings(_DatasetSettings):
    """`train_dataset`: training records. The batch size is in `runner_config`."""

    num_parallel_workers: int = key(2, "workers that prepare rows; at most one per core", at_least=1)
    drop_remainder: bool = key(True, "drop the last batch of an epoch if it is not full")
    cache_dir: Optional[str] = key(None, "folder of prepared rows, kept by content; null: prepare on demand")


@dataclass
class EvalDatasetSettings(_DatasetSettings):
    """`eval_dataset`: evaluation records. A last batch that is not full is evaluated too."""

    data_loader: EvalDataLoaderSettings = key(EvalDataLoaderSettings, "format and place of the records")
    batch_size: int = key(8, "rows or prompts at a time, for every metric", at_least=1)


@dataclass
class MetricSettings:
    """`metric`: metrics of evaluations."""

    type: list[str] = key(["ADGENMetric"], "metrics of run_mode eval", or_one=True, choices=lambda: METRICS)


@dataclass
class GenerationSettings:
    """`generation`: text generation in eval and predict."""

    max_new_tokens: int = key(128, "longest answer in tokens", at_least=1)
    max_length: Optional[int] = key(None, "longest prompt and answer together; null: no limit", at_least=2)
    do_sample: bool = key(False, "draw from the distribution (False: greedy or beam search)")
    temperature: float = key(1.0, "divides the logits (do_sample)", above=0)
    top_k: int = key(0, "keep the k most likely tokens; 0: all (do_sample)", at_least=0)
    top_p: float = key(1.0, "keep the smallest set with this probability (do_sample)", above=0, at_most=1)
    repetition_penalty: float = key(1.0, "above 1 makes tokens that occurred less likely; 1: none", above=0)
    num_beams: int = key(1, "beams of the beam search; 1: none", at_least=1)
    length_penalty: float = key(1.0, "beam scores are divided by length to this power")
    early_stopping: bool = key(False, "stop when num_beams answers are finished")
    num_return_sequences: int = key(1, "answers per prompt", at_least=1)


@dataclass
class CheckpointSettings:
    """`checkpoint`: checkpoints of training."""

    save_steps: Optional[int] = key(500, "save after every so many steps; null: only at the end", at_least=1)
    keep_max: int = key(3, "newest checkpoints to keep", at_least=1)
    best_metric: Optional[str] = key(
        None, "also keep the checkpoint with the best evaluation (do_eval) by this score; null: none",
        choices=score_names,
    )  # fmt: skip


@dataclass
class LoggingSettings:
    """`logging`: reports of training."""

    log_steps: int = key(1, "a line of numbers after every so many steps", at_least=1)
    tensorboard: bool = key(True, "also write TensorBoard files into output_dir")


def keys_used_with(section: type, value: str) -> tuple[str, ...]:
    """The keys of a section that have an effect with a value of its deciding key, such as "lora"."""
    ruled = [item for item in dataclasses.fields(section) if "used_with" in item.metadata]
    return tuple(item.name for item in ruled if value in used_with(item)[1])
