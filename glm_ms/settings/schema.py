"""Every key of a configuration: one dataclass for each section, `Settings` for the whole, and the flags.

A field carries its default, its documentation and its allowed values. Reading, checking, the command line,
`docs/settings.md` and writing back all use these declarations. Key names follow MindFormers' YAML files.
"""

# ruff: noqa: RUF009 - `key` is `dataclasses.field` with documentation
# No `from __future__ import annotations`: the annotations are read at run time, also by Python 3.9.
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Optional, Union, get_type_hints

import yaml

from glm_ms.data.formats import FORMATS, formats_with_max_seq_length
from glm_ms.families import family_of, tokenizer_names
from glm_ms.metrics import METRICS, score_names
from glm_ms.model.config import FLOAT_TYPES, GLMConfig
from glm_ms.ops.cpu.storage import STORAGE
from glm_ms.parallel.config import ParallelConfig
from glm_ms.peft import ADAPTERS, MAX_LORA_ALPHA
from glm_ms.quant import Quantization, quantization
from glm_ms.settings.errors import Problem, SettingsError
from glm_ms.settings.optimizers import OPTIMIZERS, SCHEDULES

AUTO = "auto"
TRAINING_MODES = ("train", "finetune")
EVAL_STEPS = 100  # updates between evaluations, if the configuration does not say it
# The vocabulary is padded to a multiple of this, which splits evenly over cards and suits matrix units.
VOCAB_MULTIPLE = 64
# Run mode -> the key that --batch_size sets.
BATCH_SIZE_KEYS = {
    **dict.fromkeys(TRAINING_MODES, "runner_config.batch_size"),
    "eval": "eval_dataset.batch_size",
    **dict.fromkeys(("predict", "export"), "predict_batch_size"),
}
_WIDEST = 131072  # sizes beyond it are mistakes, which would only fail when memory is asked for
# More is a mistake in any factor, norm or exponent.
_LARGEST = 10**20
_VOCAB_KEY = "model.model_config.padded_vocab_size"
_NETWORK, _DROPOUT = GLMConfig, {"at_least": 0, "below": 1}
# Keys that decide whether others have an effect, and with which values; see `used_with` in `key`.
_ADAPTERS = ("pet_type", lambda name: [kind for kind, adapter in ADAPTERS.items() if name in adapter.keys])
_FIXED_ROWS = ("data_loader.type", lambda _: formats_with_max_seq_length())
_SCALED = ("type", ("DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"))
_DYNAMIC = ("type", ("DynamicLossScaleUpdateCell",))
_COSINE, _POLYNOMIAL = ("type", ("CosineWithWarmUpLR",)), ("type", ("PolynomialWithWarmUpLR",))
_SAMPLED = ("do_sample", (True,))
_TO_LR_END = ("type", ("CosineWithWarmUpLR", "PolynomialWithWarmUpLR"))


def key(default: Any, doc: str, **rules: Any) -> Any:
    """Declares a key. `default` counts if the YAML does not have it; a list or a dataclass type is made anew each time.

    Rules: `at_least`, `above`, `at_most`, `below` bound numbers; `pattern` (with `example`) is the regular expression
    of a text; `choices` are the allowed texts, or a function that returns them; `length` are the allowed lengths of a
    list; `or_one` allows a single value in place of a list; `path` says what may be the value of a key that names a
    file or folder; `used_with` = (key of the same section, values, or a function of the key's name that returns them):
    with other values of that key, this one has no effect.
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, (list, type)):
        return field(default_factory=default.copy if isinstance(default, list) else default, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: dataclasses.Field) -> Any:
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
    mode: Literal[0, 1] = key(0, "0: graph (compiled), 1: PyNative (for debugging, many times slower)")
    device_target: Literal["CPU", "Ascend"] = key("CPU", "target device")
    device_id: int = key(0, "card, for a run on a single card", at_least=0)
    max_device_memory: Optional[str] = key(
        None, "memory limit of MindSpore on an Ascend card; null: MindSpore's default",
        pattern=r"\d+(\.\d+)?GB", example="58GB"
    )  # fmt: skip
    use_fused_kernels: Union[Literal["auto"], bool] = key(
        AUTO, "Ascend kernels for norm, rotation, attention, quantized products; auto: those that agree with the "
        "portable operators on this card in the sizes of this run, compared once; True: all, see tools/check_device.py"
    )  # fmt: skip


@dataclass
class ParallelSettings:
    parallel_mode: Literal[0, 1] = key(0, "0: data parallel, 1: semi-automatic (sharding strategies)")
    full_batch: bool = key(False, "every card reads the whole global batch (semi-automatic mode only)")
    enable_parallel_optimizer: bool = key(False, "shard parameters and optimizer state over the cards")


@dataclass
class ParallelConfigSettings:
    data_parallel: int = key(1, "parts of the batch", at_least=1)
    model_parallel: int = key(1, "parts of each weight", at_least=1)
    pipeline_stage: int = key(1, "pipeline stages of the layers", at_least=1)
    micro_batch_num: int = key(1, "micro batches in flight with pipeline_stage > 1", at_least=1)
    vocab_emb_dp: bool = key(True, "copy the embedding to every card (False: split it by vocabulary)")
    gradient_aggregation_group: int = key(4, "gradients that share one communication", at_least=1)
    use_seq_parallel: bool = key(False, "split norms and dropout by sequence (needs model_parallel > 1)")


@dataclass
class RecomputeSettings:
    recompute: bool = key(False, "recompute every transformer block: less memory, about a third more time")
    mp_comm_recompute: bool = key(True, "also recompute sums over model-parallel cards (False: keep them)")
    parallel_optimizer_comm_recompute: bool = key(
        False, "gather the weights of sharded optimizers again (False: keep them whole on every card)"
    )


@dataclass
class ModelConfigSettings:
    type: Literal["GLMConfig"] = key("GLMConfig", "kind of configuration")
    num_layers: int = key(_NETWORK.num_layers, "transformer blocks")
    padded_vocab_size: Union[int, Literal["auto"]] = key(
        _NETWORK.padded_vocab_size, "rows of embedding and output layer; auto: fitted to the tokenizer"
    )
    hidden_size: int = key(_NETWORK.hidden_size, "width of the hidden states")
    ffn_hidden_size: int = key(_NETWORK.ffn_hidden_size, "width of each SwiGLU half")
    kv_channels: int = key(_NETWORK.kv_channels, "width of an attention head")
    num_attention_heads: int = key(_NETWORK.num_attention_heads, "query heads")
    seq_length: int = key(_NETWORK.seq_length, "longest sequence, in tokens")
    multi_query_attention: bool = key(_NETWORK.multi_query_attention, "query heads share key/value groups")
    multi_query_group_num: int = key(_NETWORK.multi_query_group_num, "key/value groups with multi_query_attention")
    rope_ratio: float = key(_NETWORK.rope_ratio, "factor of the rotary base 10000 (32K models: 50)")
    rmsnorm: bool = key(_NETWORK.rmsnorm, "RMSNorm (False: LayerNorm)")
    layernorm_epsilon: float = key(_NETWORK.layernorm_epsilon, "added to the variance in a norm")
    apply_residual_connection_post_layernorm: bool = key(
        _NETWORK.apply_residual_connection_post_layernorm, "the residual branch starts after the norm"
    )
    post_layer_norm: bool = key(_NETWORK.post_layer_norm, "a final norm follows the last block")
    add_bias_linear: bool = key(_NETWORK.add_bias_linear, "linear layers have a bias")
    add_qkv_bias: bool = key(_NETWORK.add_qkv_bias, "the projection to queries, keys and values has a bias")
    hidden_dropout: float = key(_NETWORK.hidden_dropout, "dropout on hidden states")
    attention_dropout: float = key(_NETWORK.attention_dropout, "dropout on attention weights")
    param_init_type: str = key(_NETWORK.param_init_type, "storage type of the parameters", choices=FLOAT_TYPES)
    compute_dtype: str = key(
        _NETWORK.compute_dtype, "type of matrix products; norms, softmax and loss use float32", choices=FLOAT_TYPES
    )
    eos_token_id: int = key(_NETWORK.eos_token_id, "token that ends an answer")
    pad_token_id: int = key(_NETWORK.pad_token_id, "token of padding")


@dataclass
class ArchSettings:
    type: Literal["GLMForCausalLM"] = key("GLMForCausalLM", "network class")


@dataclass
class PetSettings:
    pet_type: Optional[str] = key(
        None, "lora: low-rank adapters, ptuning2: a learnt prefix of keys and values; null: train all weights",
        choices=ADAPTERS
    )  # fmt: skip
    lora_rank: int = key(8, "rows of A and columns of B", at_least=1, at_most=_WIDEST, used_with=_ADAPTERS)
    lora_alpha: float = key(
        32.0, "B A is scaled by lora_alpha / lora_rank", above=0, at_most=MAX_LORA_ALPHA, used_with=_ADAPTERS
    )
    lora_dropout: float = key(0.1, "dropout on the input of A", **_DROPOUT, used_with=_ADAPTERS)
    target_modules: Union[list[str], str] = key(
        ".*query_key_value", "modules: a regex on the whole name, or a list of endings", used_with=_ADAPTERS
    )
    pre_seq_len: int = key(128, "positions of the prefix", at_least=1, at_most=_WIDEST, used_with=_ADAPTERS)
    prefix_projection: bool = key(False, "an MLP between embedding and prefix", used_with=_ADAPTERS)
    projection_dim: Optional[int] = key(
        None, "width of that MLP; null: hidden_size", at_least=1, at_most=_WIDEST, used_with=_ADAPTERS
    )
    dropout_prob: float = key(0.1, "dropout on the prefix", **_DROPOUT, used_with=_ADAPTERS)


@dataclass
class ModelSettings:
    model_config: ModelConfigSettings = key(
        ModelConfigSettings, "sizes and switches of the network; names and defaults are those of `glm_ms.GLMConfig`"
    )
    arch: ArchSettings = key(ArchSettings, "the network class")
    pet_config: PetSettings = key(PetSettings, "parameter-efficient finetuning")
    quantization_bit: Optional[Literal[4, 8]] = key(
        None, "round the weights of linear layers to 4 or 8 bits when they are loaded; null: as they are in the files"
    )
    quantization_group: Optional[Literal[32, 64, 128]] = key(
        None, "with quantization_bit: 4, inputs that share a scale; null: 32"
    )
    kv_cache: Optional[str] = key(
        None, "type of keys and values in generation, of the C++ kernels of a CPU; null: compute_dtype",
        choices=tuple(STORAGE)
    )  # fmt: skip
    init: Literal["checkpoint", "random"] = key(
        "checkpoint", "an empty load_checkpoint is an error (checkpoint; not in run_mode train) or allowed (random)"
    )


@dataclass
class TokenizerSettings:
    type: str = key("ChatGLM3Tokenizer", "tokenizer class", choices=tokenizer_names)
    vocab_file: str = key("", "path of tokenizer.model", path="a path")
    template: Literal["chat", "plain"] = key(
        "chat", "prompts in the chat template of the tokenizer class, or plain text as base models continue it"
    )
    allow_other_vocab: bool = key(False, "accept weights or an adapter of a run with another vocab_file")


@dataclass
class ProcessorSettings:
    tokenizer: TokenizerSettings = key(TokenizerSettings, "the tokenizer")


@dataclass
class RunnerSettings:
    epochs: int = key(1, "passes over the training data", at_least=1, at_most=10**6)
    batch_size: int = key(8, "training rows per step and data-parallel part", at_least=1)
    max_steps: Optional[int] = key(None, "stop after this many steps; null: after `epochs`", at_least=1)
    gradient_accumulation_steps: int = key(1, "steps whose gradients make one update", at_least=1)


@dataclass
class LossScaleSettings:
    type: Optional[Literal["DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"]] = key(
        None, "the scale follows overflows, or is fixed; null: no scaling"
    )
    loss_scale_value: float = key(65536.0, "first scale", above=0, used_with=_SCALED)
    scale_factor: int = key(2, "factor of a change of the scale", at_least=2, used_with=_DYNAMIC)
    scale_window: int = key(1000, "updates until the scale grows", at_least=1, used_with=_DYNAMIC)


@dataclass
class WrapperSettings:
    type: Literal["GLMTrainOneStep"] = key("GLMTrainOneStep", "training step")
    use_clip_grad: bool = key(True, "clip the global norm of the gradients")
    max_grad_norm: float = key(1.0, "largest global norm with use_clip_grad", above=0, at_most=_LARGEST)
    scale_sense: LossScaleSettings = key(LossScaleSettings, "loss scaling, against float16 gradients that become zero")


@dataclass
class OptimizerSettings:
    type: str = key("GLMAdamW", "AdamW with decoupled weight decay", choices=OPTIMIZERS)
    betas: list[float] = key([0.9, 0.999], "decay rates of both moments", length=(2,), **_DROPOUT)
    eps: float = key(1e-8, "added to the root of the second moment", above=0, at_most=_LARGEST)
    weight_decay: float = key(0.01, "decoupled decay, on every trainable parameter", at_least=0, at_most=_LARGEST)


@dataclass
class LRScheduleSettings:
    type: str = key("LinearWithWarmUpLR", "decay after the warm-up", choices=SCHEDULES)
    learning_rate: float = key(
        5e-5, "highest learning rate, reached at the end of the warm-up", at_least=0, at_most=_LARGEST
    )
    lr_end: float = key(0.0, "learning rate of the last step", at_least=0, at_most=_LARGEST, used_with=_TO_LR_END)
    warmup_steps: int = key(0, "steps of linear rise from 0", at_least=0)
    warmup_ratio: Optional[float] = key(None, "the same as a share of all steps", at_least=0, at_most=1)
    power: float = key(1.0, "exponent of the decay", above=0, at_most=_LARGEST, used_with=_POLYNOMIAL)
    num_cycles: float = key(
        0.5, "cosine waves; 0.5 falls once from top to end", above=0, at_most=_LARGEST, used_with=_COSINE
    )
    total_steps: int = key(-1, "steps of the decay; -1: all steps of the run", at_least=-1)


@dataclass
class DataLoaderSettings:
    type: str = key(
        "ADGenDataLoader",
        "format: prompt and answer (ADGen); conversations as in finetune_hf.py of ChatGLM3 (Conversation); "
        "conversations with tools and loss flags, one JSON object per line (ToolAlpaca)",
        choices=FORMATS,
    )
    dataset_dir: str = key("", "the .json / .jsonl file, or its folder", path="a path")
    shuffle: bool = key(True, "a new order in every epoch, drawn from `seed`")
    origin_columns: list[str] = key(
        ["content", "summary"], "columns of prompt and answer, and optionally of the history", length=(2, 3)
    )
    history_column: Optional[str] = key(None, "column of earlier rounds: a list of [prompt, answer], or of messages")
    input_column: Optional[str] = key(None, "column of text that follows the prompt on a new line (Alpaca's `input`)")
    system_column: Optional[str] = key(None, "column of a system message (ChatGLM3)")
    tools_column: Optional[str] = key(None, "column of the list of tools (ChatGLM3)")


@dataclass
class EvalDataLoaderSettings(DataLoaderSettings):
    shuffle: Literal[False] = key(False, "evaluation reads the records in the order of the file")


@dataclass
class _DatasetSettings:
    data_loader: DataLoaderSettings = key(DataLoaderSettings, "format and place of the records")
    max_source_length: int = key(64, "tokens of the prompt, special tokens included", at_least=1)
    max_target_length: int = key(127, "tokens of the answer", at_least=1)
    max_seq_length: Optional[int] = key(
        None, "tokens of a row; null: model.model_config.seq_length", at_least=4, used_with=_FIXED_ROWS
    )
    ignore_pad_token_for_loss: bool = key(True, "padding has no loss")
    num_samples: Optional[int] = key(None, "use only the first records, this many; null: all", at_least=1)


@dataclass
class TrainDatasetSettings(_DatasetSettings):
    num_parallel_workers: int = key(2, "workers that prepare rows; at most one per core", at_least=1)
    drop_remainder: bool = key(True, "drop the last batch of an epoch if it is not full")
    cache_dir: Optional[str] = key(
        None, "folder of prepared rows, kept by content; null: prepare on demand", path="a folder, or null for no cache"
    )


@dataclass
class EvalDatasetSettings(_DatasetSettings):
    data_loader: EvalDataLoaderSettings = key(EvalDataLoaderSettings, "format and place of the evaluation records")
    batch_size: int = key(8, "rows or prompts at a time, for every metric", at_least=1)


@dataclass
class MetricSettings:
    type: list[str] = key(["ADGENMetric"], "metrics of run_mode eval", or_one=True, choices=METRICS)


@dataclass
class GenerationSettings:
    max_new_tokens: int = key(128, "longest answer in tokens", at_least=1)
    max_length: Optional[int] = key(None, "longest prompt and answer together; null: no limit", at_least=2)
    do_sample: bool = key(False, "draw from the distribution (False: greedy or beam search)")
    temperature: float = key(1.0, "divides the logits", above=0, at_most=_LARGEST, used_with=_SAMPLED)
    top_k: int = key(0, "keep the k most likely tokens; 0: all", at_least=0, used_with=_SAMPLED)
    top_p: float = key(1.0, "keep the smallest set with this probability", above=0, at_most=1, used_with=_SAMPLED)
    min_p: float = key(
        0.0, "remove tokens less likely than min_p times the likeliest one", at_least=0, at_most=1, used_with=_SAMPLED
    )
    repetition_penalty: float = key(
        1.0, "above 1 makes tokens that occurred less likely; 1: none", above=0, at_most=_LARGEST
    )
    presence_penalty: float = key(
        0.0, "subtracted from the scores of tokens that the answer has already", at_least=-2, at_most=2
    )
    frequency_penalty: float = key(0.0, "subtracted from these scores once for each occurrence", at_least=-2, at_most=2)
    logit_bias: Optional[list[str]] = key(
        None, "numbers in [-100, 100] added to the scores of token ids, as `id:number`",
        pattern=r"\d{1,9}:[-+]?\d{1,3}(\.\d{1,9})?", example="[100:-5, 7:2.5]"
    )  # fmt: skip
    min_new_tokens: int = key(0, "shortest answer in tokens, the end token not counted", at_least=0)
    num_beams: int = key(1, "beams of the beam search; 1: none", at_least=1, at_most=1024)
    length_penalty: float = key(
        1.0, "beam scores are divided by length to this power", at_least=-_LARGEST, at_most=_LARGEST
    )
    early_stopping: bool = key(False, "stop when num_beams answers are finished")
    num_return_sequences: int = key(1, "answers per prompt", at_least=1, at_most=1024)
    prompt_lookup_num_tokens: int = key(
        10, "most tokens of a step that are taken from earlier text and verified: faster, same answers; 0: none",
        at_least=0, at_most=1024
    )  # fmt: skip


@dataclass
class CheckpointSettings:
    save_steps: Optional[int] = key(500, "save after every so many steps; null: only at the end", at_least=1)
    keep_max: int = key(3, "newest checkpoints to keep", at_least=1)
    best_metric: Optional[str] = key(
        None, "also keep the checkpoint that evaluates best (do_eval) by this score; null: none", choices=score_names
    )


@dataclass
class LoggingSettings:
    log_steps: int = key(1, "a line of numbers after every so many steps", at_least=1)
    tensorboard: bool = key(True, "also write TensorBoard files into output_dir")


@dataclass
class Settings:
    """A whole, checked configuration. `glm_ms.settings.load_settings` builds it."""

    seed: int = key(0, "start of every random sequence", at_least=0, at_most=2**32 - 1)
    run_mode: Literal["train", "finetune", "eval", "predict", "export"] = key("finetune", "what to do")
    output_dir: str = key("./output", "folder for checkpoints, logs and predictions", path="a folder")
    load_checkpoint: str = key(
        "", "initial weights: folder, .safetensors, .ckpt, or output folder of a run", path="a path"
    )
    load_adapter: str = key("", "adapter for load_checkpoint: folder, file, or output folder of its run", path="a path")
    resume_training: Union[bool, str] = key(
        False,
        "True: continue from the newest checkpoint in output_dir; or the path of a checkpoint",
        path="True, False or a checkpoint",
    )
    resume: bool = key(
        False, "run_mode eval and predict: keep the results in output_dir and compute those that are missing"
    )
    use_parallel: bool = key(False, "several cards or processes, started by msrun")
    context: ContextSettings = key(ContextSettings, "device and execution mode of MindSpore")
    parallel: ParallelSettings = key(ParallelSettings, "mode of a distributed run")
    parallel_config: ParallelConfigSettings = key(ParallelConfigSettings, "parts of each dimension of the work")
    recompute_config: RecomputeSettings = key(
        RecomputeSettings, "compute activations again in the backward pass in place of keeping them"
    )
    model: ModelSettings = key(ModelSettings, "the network and its initial weights")
    processor: ProcessorSettings = key(ProcessorSettings, "text to ids and back")
    runner_config: RunnerSettings = key(RunnerSettings, "length of training")
    runner_wrapper: WrapperSettings = key(WrapperSettings, "the training step")
    optimizer: OptimizerSettings = key(OptimizerSettings, "the optimizer. The learning rate is in `lr_schedule`")
    lr_schedule: LRScheduleSettings = key(LRScheduleSettings, "learning rate over steps")
    train_dataset: TrainDatasetSettings = key(
        TrainDatasetSettings, "training records (batch size: see `runner_config`)"
    )
    eval_dataset: EvalDatasetSettings = key(
        EvalDatasetSettings, "evaluation records. A last batch that is not full is evaluated too"
    )
    metric: MetricSettings = key(MetricSettings, "metrics of evaluations")
    do_eval: bool = key(False, "evaluate on eval_dataset during training and at its end")
    eval_step_interval: int = key(
        -1, f"updates between evaluations (do_eval); -1: none; without any interval: {EVAL_STEPS}", at_least=-1
    )
    eval_epoch_interval: int = key(1, "epochs between evaluations (do_eval); -1: none", at_least=-1)
    generation: GenerationSettings = key(GenerationSettings, "text generation in eval and predict")
    predict_data: str = key("", "a prompt, a .txt / .jsonl file of prompts, or - for standard input")
    predict_batch_size: int = key(1, "prompts generated at a time; rows of exported graphs", at_least=1)
    checkpoint: CheckpointSettings = key(CheckpointSettings, "checkpoints of training")
    logging: LoggingSettings = key(LoggingSettings, "reports of training")

    # No keys: lines for the user about adjustments, path of the YAML, dotted key -> place of its value.
    notes: list[str] = field(default_factory=list, compare=False)
    source: str = field(default="", compare=False)
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def where(self, dotted: str) -> str:
        """Place of the value of a key (`"runner_config.epochs"`), for errors."""
        return self.origins.get(dotted, self.source or "settings")

    def is_training(self) -> bool:
        """Whether `run_mode` updates weights."""
        return self.run_mode in TRAINING_MODES

    def batch_size(self) -> int:
        """Rows or prompts at a time in the present `run_mode`."""
        return self.get(BATCH_SIZE_KEYS[self.run_mode])

    def get(self, dotted: str) -> Any:
        """The value of a key (`"runner_config.epochs"`)."""
        return functools.reduce(getattr, dotted.split("."), self)

    def glm_config(self) -> GLMConfig:
        """The network's configuration. Raises SettingsError before `resolve_vocab_size` has replaced `auto`."""
        values = dataclasses.asdict(self.model.model_config)
        if values["padded_vocab_size"] == AUTO:
            raise SettingsError(
                f"{self.where(_VOCAB_KEY)}: {_VOCAB_KEY}: auto has not been resolved; "
                "call resolve_vocab_size(settings, vocab_size) with the size of the tokenizer first"
            )
        del values["type"]  # the family decides about the class
        if rounds_products(self):
            values["compute_dtype"] = "float32"
        config = family_of(self.processor.tokenizer.type).config
        return config.from_dict(values, source=self.source or "settings")

    def to_dict(self) -> dict[str, Any]:
        """Every key as nested plain values."""
        return {item.name: _plain(getattr(self, item.name)) for item in keys_of(Settings)}

    def to_yaml(self) -> str:
        """The effective settings as YAML text; loading it gives equal settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def keys_of(section: type) -> list[dataclasses.Field]:
    """The fields of a settings dataclass that are keys of the YAML."""
    return [item for item in dataclasses.fields(section) if "doc" in item.metadata]


@functools.cache
def leaf_keys(section: type = Settings, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Dotted name -> field of every key that has a value, sections flattened, in order. Not to be changed."""
    leaves: dict[str, dataclasses.Field] = {}
    hints = get_type_hints(section)
    for item in keys_of(section):
        if dataclasses.is_dataclass(hints[item.name]):
            leaves.update(leaf_keys(hints[item.name], f"{prefix}{item.name}."))
        else:
            leaves[prefix + item.name] = item
    return leaves


class Flag(NamedTuple):
    """A command line flag; its help is `about` and the documentation of the key."""

    key: Optional[str]  # None: --batch_size, whose key depends on the run mode
    value: str  # placeholder in the help
    bare: bool = False  # the flag alone means True
    former: str = ""  # another spelling, as in run_mindformer.py or glm-ms chat, which is accepted too
    about: str = ""


_RECORDS = "{}_dataset.data_loader.dataset_dir"
FLAGS = {
    "run_mode": Flag("run_mode", "{train,finetune,eval,predict,export}"),
    "load_checkpoint": Flag("load_checkpoint", "PATH"),
    "load_adapter": Flag("load_adapter", "PATH"),
    "train_dataset": Flag(_RECORDS.format("train"), "PATH", False, "train_dataset_dir", "training records: "),
    "eval_dataset": Flag(_RECORDS.format("eval"), "PATH", False, "eval_dataset_dir", "evaluation records: "),
    "predict_data": Flag("predict_data", "TEXT"),
    "kv_cache": Flag("model.kv_cache", f"{{{','.join(STORAGE)}}}", False, "kv-cache"),
    "device_target": Flag("context.device_target", "{CPU,Ascend}"),
    "device_id": Flag("context.device_id", "N"),
    "use_parallel": Flag("use_parallel", "BOOL", bare=True),
    "output_dir": Flag("output_dir", "PATH"),
    "resume_training": Flag("resume_training", "BOOL|PATH", bare=True),
    "resume": Flag("resume", "BOOL", bare=True),
    "do_eval": Flag("do_eval", "BOOL", bare=True),
    "epochs": Flag("runner_config.epochs", "N"),
    "batch_size": Flag(
        None, "N", about="batch size of the run mode: training rows, eval rows, prompts, or rows of exported graphs"
    ),
    "seed": Flag("seed", "N"),
}


def parts_in_use(settings: Settings) -> tuple[str, ...]:
    """The data sets that the run reads, of "train" and "eval"."""
    train, evaluate = settings.is_training(), settings.run_mode == "eval"
    return ("train",) * train + ("eval",) * (evaluate or (train and settings.do_eval))


def unused_keys(settings: Settings, section: str) -> Iterator[Problem]:
    """Keys of a section that are set, but have no effect with the value of another key."""
    for dotted, item in leaf_keys().items():
        path = dotted.rpartition(".")[0]
        if path != section or "used_with" not in item.metadata:
            continue
        other, values = used_with(item)
        chosen = settings.get(f"{path}.{other}")
        if chosen not in values and settings.get(dotted) != default_of(item):
            state = f"with {chosen}" if chosen else f"without {other}"
            message = f"has no effect {state}; remove it, or use {other}: {' or '.join(values)}"
            yield Problem(dotted, message, (f"{path}.{other}",))


def bias_pairs(logit_bias: Optional[list[str]]) -> list[tuple[int, float]]:
    """Ids and numbers of `generation.logit_bias`."""
    pairs = (text.split(":") for text in logit_bias or ())
    return [(int(token), float(bias)) for token, bias in pairs]


def is_sharded(settings: Settings) -> bool:
    """Whether sharding strategies split the weights, and not only the batch."""
    return settings.use_parallel and settings.parallel.parallel_mode == 1


def rounds_products(settings: Settings) -> bool:
    """Whether the operands of the products of training are rounded to bfloat16 in a network of float32: CPUs have no
    other operators for bfloat16."""
    return settings.context.device_target == "CPU" and settings.model.model_config.compute_dtype == "bfloat16"


def parallel_of(settings: Settings, num_cards: Optional[int] = None) -> ParallelConfig:
    """The split of a run over cards; `num_cards` counts with `parallel_mode: 0`, None: `data_parallel`."""
    split = settings.parallel_config
    if not is_sharded(settings):
        return ParallelConfig(data_parallel=(num_cards or split.data_parallel) if settings.use_parallel else 1)
    return ParallelConfig(
        split.data_parallel, split.model_parallel, split.pipeline_stage, split.micro_batch_num, split.vocab_emb_dp,
        split.use_seq_parallel, settings.parallel.enable_parallel_optimizer
    )  # fmt: skip


def quantization_of(settings: Settings) -> Optional[Quantization]:
    """How weights are quantized when they are loaded; None: they stay as they are in the files."""
    bits, group = settings.model.quantization_bit, settings.model.quantization_group
    return None if bits is None else quantization(bits, group)


def training_length(settings: Settings) -> int:
    """Positions of a training row."""
    data = settings.train_dataset
    if FORMATS[data.data_loader.type].uses_max_seq_length:
        return data.max_seq_length or settings.model.model_config.seq_length
    return data.max_source_length + data.max_target_length + 1


def resolve_vocab_size(settings: Settings, vocab_size: int) -> int:
    """Replaces `padded_vocab_size: auto` by the size of the tokenizer, rounded up to a multiple of 64; returns it.

    `vocab_size` is the highest id, special tokens included, plus 1. Raises SettingsError if a fixed size is smaller.
    """
    size = settings.model.model_config.padded_vocab_size
    if isinstance(size, str):
        size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        settings.model.model_config.padded_vocab_size = size
    elif size < vocab_size:
        raise SettingsError(
            f"{settings.where(_VOCAB_KEY)}: {_VOCAB_KEY}: {size} is too small for the tokenizer "
            f"{settings.processor.tokenizer.vocab_file}, which has {vocab_size} ids; use {_VOCAB_KEY}=auto, "
            "or the tokenizer of the model"
        )
    return size


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in keys_of(type(value))}
    return list(value) if isinstance(value, list) else value
