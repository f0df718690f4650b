"""The sections of a configuration: one dataclass each, a field for every key.

A field carries its default, a line of documentation and its allowed range. Reading, checking, the command
line and writing back all work from these declarations. Key names follow MindFormers' YAML files.
"""

# ruff: noqa: RUF009 - `key` is `dataclasses.field` with documentation
# No `from __future__ import annotations`: the annotations are read at run time, also by Python 3.9.
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union, get_type_hints

from glm_ms.metrics import METRICS, score_names
from glm_ms.model.config import GLMConfig


def key(default: Any, doc: str, **rules: Any) -> Any:
    """Declares a key.

    Args:
        default: value where the YAML says nothing; a list or a dataclass type is made anew each time.
        doc: one line for the reader of `--help_keys`.
        rules: `at_least`, `above`, `at_most`, `below` bound numbers; `pattern` (with `example`) holds a
            string to a regular expression; `length` fixes a list's length; `or_one` lets a single value
            stand for a list of one; `choices()` are the texts that a table of the package allows.
    """
    metadata = {"doc": doc, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ContextSettings:
    """`context`: where and how MindSpore runs."""

    mode: Literal[0, 1] = key(0, "0: graph (compiled), 1: PyNative (for debugging, many times slower)")
    device_target: Literal["CPU", "Ascend"] = key("CPU", "kind of device")
    device_id: int = key(0, "which card of this machine, for a run on a single card", at_least=0)
    max_device_memory: Optional[str] = key(
        None,
        "memory MindSpore may take on an Ascend card; null: its own default",
        pattern=r"\d+(\.\d+)?GB",
        example="58GB",
    )
    use_fused_kernels: bool = key(
        False,
        "Ascend's own kernels for norm, rotation and attention; check them first with tools/check_device.py",
    )


@dataclass
class ParallelSettings:
    """`parallel`: how the cards of a distributed run work together."""

    parallel_mode: Literal[0, 1] = key(0, "0: data parallel, 1: semi-automatic (sharding strategies)")
    full_batch: bool = key(False, "every card reads the whole global batch (semi-automatic mode only)")
    enable_parallel_optimizer: bool = key(False, "shard parameters and optimizer state over the cards")


@dataclass
class ParallelConfigSettings:
    """`parallel_config`: how many ways each dimension of the work is split."""

    data_parallel: int = key(1, "ways the batch is split", at_least=1)
    model_parallel: int = key(1, "ways each weight is split", at_least=1)
    pipeline_stage: int = key(1, "stages the layers are split into", at_least=1)
    micro_batch_num: int = key(1, "micro batches in flight with pipeline_stage > 1", at_least=1)
    vocab_emb_dp: bool = key(True, "the embedding is copied to every card (False: split by vocabulary)")
    gradient_aggregation_group: int = key(4, "gradients that share one communication", at_least=1)
    use_seq_parallel: bool = key(False, "split norms and dropout by sequence (needs model_parallel > 1)")


@dataclass
class RecomputeSettings:
    """`recompute_config`: activations are computed again in the backward pass instead of being kept."""

    recompute: bool = key(False, "recompute every transformer block: less memory, about a third more time")
    mp_comm_recompute: bool = key(
        True, "sums over model-parallel cards are recomputed too (False: their results are kept)"
    )
    parallel_optimizer_comm_recompute: bool = key(
        False,
        "weights gathered for sharded optimizers are gathered again (False: kept, whole, on every card)",
    )


def _model_config_fields() -> list[Any]:
    hints = get_type_hints(GLMConfig)
    hints["padded_vocab_size"] = Union[int, Literal["auto"]]
    fields = [("type", Literal["GLMConfig"], key("GLMConfig", "kind of configuration"))]
    for item in dataclasses.fields(GLMConfig):
        fields.append((item.name, hints[item.name], key(item.default, "see glm_ms.GLMConfig")))
    return fields


# `model.model_config`: the fields of GLMConfig under their own names, so that they stand in one place only.
# `padded_vocab_size` may also be "auto": fitted to the tokenizer, see glm_ms.settings.vocabulary.
ModelConfigSettings = dataclasses.make_dataclass("ModelConfigSettings", _model_config_fields())


@dataclass
class ArchSettings:
    """`model.arch`: the network class."""

    type: Literal["GLMForCausalLM"] = key("GLMForCausalLM", "network class")


@dataclass
class PetSettings:
    """`model.pet_config`: what is trained in place of the weights. PET_KEYS says which keys a type knows."""

    pet_type: Optional[Literal["lora", "ptuning2"]] = key(
        None, "lora: low-rank adapters, ptuning2: a learnt prefix of keys and values; null: all weights"
    )
    lora_rank: int = key(8, "rows of A and columns of B (lora)", at_least=1)
    lora_alpha: float = key(32.0, "the product B A is scaled by lora_alpha / lora_rank (lora)", above=0)
    lora_dropout: float = key(0.1, "dropout on the input of A (lora)", at_least=0, below=1)
    target_modules: Union[list[str], str] = key(
        ".*query_key_value",
        "modules that get adapters: a regex on the whole name, or a list of endings (lora)",
    )
    pre_seq_len: int = key(128, "positions of the prefix (ptuning2)", at_least=1)
    prefix_projection: bool = key(False, "an MLP between embedding and prefix (ptuning2)")
    projection_dim: Optional[int] = key(
        None, "width of that MLP; null: hidden_size, as in the original (ptuning2)", at_least=1
    )
    dropout_prob: float = key(0.1, "dropout on the prefix (ptuning2)", at_least=0, below=1)


PET_KEYS = {
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "target_modules"),
    "ptuning2": ("pre_seq_len", "prefix_projection", "projection_dim", "dropout_prob"),
}


@dataclass
class ModelSettings:
    """`model`: the network and the weights it begins with."""

    model_config: ModelConfigSettings = key(ModelConfigSettings, "sizes and switches of the network")
    arch: ArchSettings = key(ArchSettings, "network class")
    pet_config: PetSettings = key(PetSettings, "parameter-efficient training: LoRA, P-Tuning v2")
    init: Literal["checkpoint", "random"] = key(
        "checkpoint", "what an empty load_checkpoint means: checkpoint: an error (but in train), random: fine"
    )


@dataclass
class TokenizerSettings:
    """`processor.tokenizer`."""

    type: Literal["ChatGLM2Tokenizer", "ChatGLM3Tokenizer"] = key("ChatGLM3Tokenizer", "tokenizer class")
    vocab_file: str = key("", "path of tokenizer.model")


@dataclass
class ProcessorSettings:
    """`processor`."""

    tokenizer: TokenizerSettings = key(TokenizerSettings, "text to ids and back")


@dataclass
class RunnerSettings:
    """`runner_config`: the length and rhythm of training."""

    epochs: int = key(1, "passes over the training data", at_least=1)
    batch_size: int = key(8, "training rows per step and data-parallel share", at_least=1)
    max_steps: Optional[int] = key(
        None, "stop early, after this many steps; null: after `epochs`", at_least=1
    )
    gradient_accumulation_steps: int = key(1, "steps whose gradients make one update", at_least=1)


@dataclass
class LossScaleSettings:
    """`runner_wrapper.scale_sense`: keeps small float16 gradients from vanishing."""

    type: Optional[Literal["DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"]] = key(
        None, "the scale moves with overflows, or is fixed; null: no scaling"
    )
    loss_scale_value: float = key(65536.0, "first scale", above=0)
    scale_factor: int = key(
        2, "the scale is divided by it after an overflow, and multiplied (dynamic)", at_least=2
    )
    scale_window: int = key(1000, "updates without overflow before the scale grows (dynamic)", at_least=1)


@dataclass
class WrapperSettings:
    """`runner_wrapper`: one training step."""

    type: Literal["GLMTrainOneStep"] = key("GLMTrainOneStep", "training step")
    use_clip_grad: bool = key(True, "clip the global norm of the gradients")
    max_grad_norm: float = key(1.0, "largest global norm with use_clip_grad", above=0)
    scale_sense: LossScaleSettings = key(LossScaleSettings, "loss scaling, for compute_dtype float16")


@dataclass
class OptimizerSettings:
    """`optimizer`. The learning rate stands in `lr_schedule`."""

    type: Literal["GLMAdamW"] = key("GLMAdamW", "AdamW: decoupled weight decay, bias correction")
    betas: list[float] = key([0.9, 0.999], "decay rates of both moments", length=2, at_least=0, below=1)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = key(0.01, "decoupled decay, on every trainable parameter", at_least=0)


@dataclass
class LRScheduleSettings:
    """`lr_schedule`: learning rate over steps. LR_SCHEDULE_KEYS says which keys a type knows."""

    type: Literal[
        "LinearWithWarmUpLR", "CosineWithWarmUpLR", "ConstantWarmUpLR", "PolynomialWithWarmUpLR"
    ] = key("LinearWithWarmUpLR", "shape of the decay after the warm-up")
    learning_rate: float = key(5e-5, "highest learning rate, reached at the end of the warm-up", at_least=0)
    lr_end: float = key(0.0, "learning rate of the last step (cosine, polynomial)", at_least=0)
    warmup_steps: int = key(0, "steps of linear rise from 0", at_least=0)
    warmup_ratio: Optional[float] = key(None, "the same as a share of all steps", at_least=0, at_most=1)
    power: float = key(1.0, "exponent of the decay (polynomial)", above=0)
    num_cycles: float = key(0.5, "cosine waves; 0.5 falls once from top to end (cosine)", above=0)
    total_steps: int = key(-1, "steps the decay is spread over; -1: all of the run", at_least=-1)


LR_SCHEDULE_KEYS = {
    "lr_end": ("CosineWithWarmUpLR", "PolynomialWithWarmUpLR"),
    "num_cycles": ("CosineWithWarmUpLR",),
    "power": ("PolynomialWithWarmUpLR",),
}


@dataclass
class DataLoaderSettings:
    """`*_dataset.data_loader`: which records."""

    type: Literal["ADGenDataLoader", "ConversationDataLoader", "ToolAlpacaDataLoader"] = key(
        "ADGenDataLoader",
        "records: prompt and answer; conversations as finetune_hf.py of ChatGLM3 reads them; conversations with "
        "tools and loss flags, one JSON object a line each",
    )
    dataset_dir: str = key("", "the .json / .jsonl file, or a folder that holds it")
    shuffle: bool = key(True, "a new order every epoch, drawn from `seed`")
    origin_columns: list[str] = key(["content", "summary"], "columns of prompt and answer", length=2)


@dataclass
class EvalDataLoaderSettings(DataLoaderSettings):
    """`eval_dataset.data_loader`."""

    shuffle: Literal[False] = key(False, "evaluation reads the records in the order of the file")


@dataclass
class _DatasetSettings:
    data_loader: DataLoaderSettings = key(DataLoaderSettings, "which records")
    max_source_length: int = key(64, "tokens of the prompt, special tokens included", at_least=1)
    max_target_length: int = key(127, "tokens of the answer", at_least=1)
    max_seq_length: Optional[int] = key(
        None, "tokens of a row (ToolAlpacaDataLoader); null: model.model_config.seq_length", at_least=4
    )
    ignore_pad_token_for_loss: bool = key(True, "padding carries no loss")
    num_samples: Optional[int] = key(None, "only the first so many records; null: all", at_least=1)


@dataclass
class TrainDatasetSettings(_DatasetSettings):
    """`train_dataset`. The batch size stands in `runner_config`."""

    num_parallel_workers: int = key(
        2, "workers that prepare rows; lowered to the cores there are", at_least=1
    )
    drop_remainder: bool = key(True, "leave out the last batch of an epoch if it is not full")
    cache_dir: Optional[str] = key(
        None,
        "prepared rows are kept here under a hash of file, tokenizer and settings; null: prepared on demand",
    )


@dataclass
class EvalDatasetSettings(_DatasetSettings):
    """`eval_dataset`. Every record counts, so a last batch that is not full is never dropped."""

    data_loader: EvalDataLoaderSettings = key(EvalDataLoaderSettings, "which records")
    batch_size: int = key(8, "rows or prompts at a time, for every metric", at_least=1)


@dataclass
class MetricSettings:
    """`metric`: a name or a list of names."""

    type: list[str] = key(
        ["ADGENMetric"], "what --run_mode eval measures", or_one=True, choices=lambda: tuple(METRICS)
    )


@dataclass
class GenerationSettings:
    """`generation`: how text is generated in eval and predict."""

    max_new_tokens: int = key(128, "longest answer in tokens", at_least=1)
    max_length: Optional[int] = key(
        None, "an answer also ends where it and its prompt have so many tokens; null: no such end", at_least=2
    )
    do_sample: bool = key(False, "draw from the distribution (False: greedy or beam search)")
    temperature: float = key(1.0, "divides the logits (do_sample)", above=0)
    top_k: int = key(0, "keep the k most likely tokens; 0: all (do_sample)", at_least=0)
    top_p: float = key(1.0, "keep the smallest set with this probability (do_sample)", above=0, at_most=1)
    repetition_penalty: float = key(1.0, "1: none; above 1 makes seen tokens less likely", above=0)
    num_beams: int = key(1, "beams of the beam search; 1: none", at_least=1)
    length_penalty: float = key(1.0, "beam scores are divided by length to this power")
    early_stopping: bool = key(False, "stop as soon as num_beams answers are finished")
    num_return_sequences: int = key(1, "answers per prompt", at_least=1)


@dataclass
class CheckpointSettings:
    """`checkpoint`: what training leaves behind."""

    save_steps: Optional[int] = key(500, "save every so many steps; null: only at the end", at_least=1)
    keep_max: int = key(3, "checkpoints kept, the newest ones", at_least=1)
    best_metric: Optional[str] = key(
        None,
        "the checkpoint with the best evaluation (do_eval) by this score is kept besides; null: none",
        choices=score_names,
    )


@dataclass
class LoggingSettings:
    """`logging`: what is written while training."""

    log_steps: int = key(1, "a line of numbers every so many steps", at_least=1)
    tensorboard: bool = key(True, "also write TensorBoard files into output_dir")
