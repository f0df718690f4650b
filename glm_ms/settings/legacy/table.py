"""MindFormers' names for ChatGLM2 and ChatGLM3, versions 1.0 to 1.3, and what they are here: the one table.

`LEGACY` has a row for every key of those configurations that is not a key here under the same name with the
same values. `glm_ms.settings.legacy.translate` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What becomes of one key.

    Attributes:
        key: its name here; None where it has no effect here.
        values: value there -> value here; others stay as they are, and are judged by the schema.
        remark: said behind a translated value.
        rank: of several keys of a file that become one and the same, the lowest rank counts.
        reason: why it has no effect here.
        neutral: the only values without effect; None: whatever the value.
        said: value -> what to tell the user about it; the run goes on.
        remedy: what to do about any other value, which is an error.
    """

    key: str | None = None
    values: Mapping[Any, Any] = field(default_factory=dict)
    remark: str = ""
    rank: int = 1
    reason: str = ""
    neutral: tuple[Any, ...] | None = None
    said: Mapping[Any, str] = field(default_factory=dict)
    remedy: str = ""


# Class names of those versions that no configuration of ours can hold: by them their files are known.
CONFIGS = {"ChatGLM2Config": "GLMConfig"}
NETWORKS = {"ChatGLM2ForConditionalGeneration": "GLMForCausalLM", "ChatGLM2WithPtuning2": "GLMForCausalLM"}
STEPS = {"MFTrainOneStepCell": "GLMTrainOneStep", "MFPipelineWithLossScaleCell": "GLMTrainOneStep"}
OPTIMIZERS = {
    "FP32StateAdamWeightDecay": "GLMAdamW",
    "FusedAdamWeightDecay": "GLMAdamW",
    "FusedCastAdamWeightDecay": "GLMAdamW",
}
TASKS = ("KeyWordGenDataset", "MultiTurnDataset")
LEGACY_CLASSES = frozenset(
    {*CONFIGS, *NETWORKS, *STEPS, *OPTIMIZERS, *TASKS, "CausalLanguageModelingTrainer"}
)
LEGACY_SECTIONS = frozenset(
    {
        "trainer",
        "callbacks",
        "eval_callbacks",
        "train_dataset_task",
        "eval_dataset_task",
        "moe_config",
        "infer",
    }
)
# Names of one and the same section. Of the first two MindFormers itself overwrites the left by the right.
SECTION_ALIASES = {
    "train_dataset_task.dataset_config": "train_dataset",
    "eval_dataset_task.dataset_config": "eval_dataset",
    "callbacks.CheckpointMointor": "callbacks.CheckpointMonitor",
}
# Where a file is silent its version's default counts, not ours. Only in sections that the file has.
LEGACY_DEFAULTS = {
    "model.model_config.param_init_type": "float16",
    "model.model_config.compute_dtype": "float16",
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
    "runner_wrapper.use_clip_grad": False,
}
# The default of `top_k` where a file says `do_sample: True` and nothing more.
LEGACY_TOP_K = 50
# `load_checkpoint: glm3_6b` was downloaded by these names; the endings are those of their finetuned variants.
ZOO_NAMES = r"(glm[23]_6b|glm3_6b_32k|codegeex2_6b|glm_6b)(_(lora|ptuning2|chat))?"

_LR_SCHEDULES = {
    "constant_with_warmup": "ConstantWarmUpLR",
    "linear": "LinearWithWarmUpLR",
    "cosine": "CosineWithWarmUpLR",
    "polynomial": "PolynomialWithWarmUpLR",
}
_ADAMW = "AdamW with bias correction, whose weight_decay also reaches norms and biases"


def _idle(reason: str, names: str) -> dict[str, Rule]:
    """Rows for keys without effect; `names` are parted by spaces."""
    return {name: Rule(reason=reason) for name in names.split()}


def _only(neutral: tuple[Any, ...], reason: str, remedy: str) -> Rule:
    return Rule(neutral=neutral, reason=reason, remedy=remedy)


def _under(prefix: str, rows: Mapping[str, Rule]) -> dict[str, Rule]:
    return {f"{prefix}.{name}": rule for name, rule in rows.items()}


_FLOAT32 = "norms, softmax and residuals are computed in float32"
_CACHE = "every generation has a key/value cache"
_KERNELS = "MindSpore chooses kernels and compiler; context.use_fused_kernels asks for Ascend's own"
_FEED = "how batches are fed does not change them"
_SHARDS = "whole checkpoints are loaded; tools/transform_ckpt.py makes them of slices"
_LABELS = "names and labels"
_PLATFORM = "storage of the online platform"
_PROFILER = "profiling and tuning"
_SWITCHED_OFF = "belongs to a switch that is off"
_TOKENS = "the special tokens are those of the tokenizer"
_DENSE = "the network has no experts"
_COMMUNICATION = "how cards communicate is chosen by MindSpore"

_TOP = {
    "src_strategy_path_or_dir": _only(
        ("", None),
        _SHARDS,
        "merge the slices first with tools/transform_ckpt.py, and name the result with --load_checkpoint",
    ),
    "only_save_strategy": _only((False,), _SHARDS, "there is no run that only writes strategies; remove it"),
    "layer_scale": _only((False,), _SWITCHED_OFF, "every layer has the same learning rate; set it to False"),
    "lr_scale": _only(
        (False,), _SWITCHED_OFF, "set it to False, and lr_schedule.learning_rate to the rate that is meant"
    ),
    "micro_batch_interleave_num": _only(
        (1,), _COMMUNICATION, "set it to 1, and runner_config.batch_size to fit"
    ),
    "profile": Rule(
        neutral=(False,), reason=_PROFILER, said={True: "there is no profiler; the run goes on without"}
    ),
    "trainer.type": _only(
        ("CausalLanguageModelingTrainer",), _LABELS, "only CausalLanguageModelingTrainer is known"
    ),
    "moe_config.expert_num": _only((1,), _DENSE, "ChatGLM2 and ChatGLM3 have no experts; set it to 1"),
    **_idle(_SHARDS, "auto_trans_ckpt"),
    **_idle(_PLATFORM, "remote_save_url eval_callbacks"),
    **_idle(_SWITCHED_OFF, "layer_decay lr_scale_factor"),
    **_idle(_PROFILER, "auto_tune filepath_prefix autotune_per_step init_start_profile"),
    **_idle(_PROFILER, "profile_start_step profile_stop_step profile_communication profile_memory"),
    **_idle(_LABELS, "trainer.model_name processor.type processor.return_tensors"),
    **_idle("nothing is exported", "infer"),
    **_under("moe_config", _idle(_DENSE, "capacity_factor aux_loss_factor num_experts_chosen")),
}

_CONTEXT = _idle(
    _KERNELS,
    "enable_graph_kernel graph_kernel_flags max_call_depth save_graphs save_graphs_path jit_config ascend_config "
    "memory_optimize_level memory_offload",
)

_PARALLEL = {
    # With parallel_mode 0; see glm_ms.settings.legacy.rules.
    "gradients_mean": Rule(reason="gradients are averaged"),
    **_idle(_COMMUNICATION, "loss_repeated_mean enable_alltoall search_mode parallel_optimizer_config"),
    **_idle(_SHARDS, "strategy_ckpt_config strategy_ckpt_save_file"),
}

_PARALLEL_CONFIG = {
    "expert_parallel": _only((1,), _DENSE, "ChatGLM2 and ChatGLM3 have no experts; set it to 1"),
    "context_parallel": _only((1,), _COMMUNICATION, "sequences are not split over cards; set it to 1"),
}

_RECOMPUTE = _idle(
    "whole blocks are recomputed, or none",
    "recompute_slice_activation select_recompute select_comm_recompute",
)

_PET_KEYS = (
    "pet_type lora_rank lora_alpha lora_dropout target_modules pre_seq_len prefix_projection projection_dim "
    "dropout_prob"
)

_MODEL_CONFIG = {
    "type": Rule("model.model_config.type", CONFIGS),
    "batch_size": Rule("predict_batch_size"),
    "quantization_bit": _only(
        (0, None), _SWITCHED_OFF, "quantized networks cannot be trained or run; set it to 0"
    ),
    # With pet_type ptuning2; see glm_ms.settings.legacy.rules.
    "pre_seq_len": Rule("model.pet_config.pre_seq_len", rank=2),
    "prefix_projection": Rule("model.pet_config.prefix_projection", rank=2),
    "repetition_penalty": Rule("generation.repetition_penalty"),
    "max_length": Rule("generation.max_length"),
    "max_decode_length": Rule("generation.max_length", rank=2),
    "max_new_tokens": Rule("generation.max_new_tokens"),
    "temperature": Rule("generation.temperature"),
    "top_k": Rule("generation.top_k"),
    "top_p": Rule("generation.top_p"),
    "do_sample": Rule("generation.do_sample"),
    "num_beams": Rule("generation.num_beams"),
    "checkpoint_name_or_path": Rule("load_checkpoint"),
    **_idle(
        _FLOAT32,
        "layernorm_compute_type softmax_compute_type rotary_dtype embedding_type attention_softmax_in_fp32 "
        "fp32_residual_connection apply_query_key_layer_scaling",
    ),
    **_idle(
        _CACHE,
        "use_past is_dynamic use_kvcache_op is_flexible_shape use_paged_attention block_size num_blocks "
        "is_sample_acceleration",
    ),
    **_idle(
        _KERNELS,
        "bias_dropout_fusion use_flash_attention use_prompt_flash_attention use_incre_flash_attention mask_type "
        "no_recompute_layers offset pp_interleave_num",
    ),
    **_idle(_TOKENS, "bos_token_id gmask_token_id"),
    **{f"pet_config.{name}": Rule(f"model.pet_config.{name}") for name in _PET_KEYS.split()},
}

_TOKENIZER = {
    name: _only(usual, _TOKENS, f"the special tokens of these models are fixed; set it to {usual[0]!r}")
    for name, usual in {
        "bos_token": ("<sop>", "<bos>"),
        "eos_token": ("<eop>", "</s>", "<eos>"),
        "end_token": ("</s>",),
        "mask_token": ("[MASK]",),
        "gmask_token": ("[gMASK]",),
        "pad_token": ("<pad>", "<unk>"),
        "unk_token": ("<unk>",),
    }.items()
}


def _dataset(part: str) -> dict[str, Rule]:
    """Rows of `train_dataset` or `eval_dataset`."""
    rows = {
        "data_loader.phase": _only(
            ("train",) if part == "train" else ("train", "eval"), "the run mode says it", "remove it"
        ),
        "data_loader.version": Rule(
            neutral=(2, None),
            reason="the tokenizer says it",
            said={3: "there the bare prompt stood before the answer, here ChatGLM3's own chat template"},
            remedy="versions 2 and 3 are rows of ChatGLM2 and ChatGLM3; the run takes the one of its tokenizer",
        ),
        "tokenizer.type": Rule("processor.tokenizer.type"),
        "tokenizer.vocab_file": Rule("processor.tokenizer.vocab_file"),
        **_under("tokenizer", _TOKENIZER),
        "repeat": _only((1,), _FEED, "set it to 1, and runner_config.epochs to the passes that are meant"),
        **_idle(
            _FEED,
            "input_columns output_columns python_multiprocessing numa_enable prefetch_size seed auto_tune "
            "filepath_prefix autotune_per_step profile",
        ),
    }
    if part == "train":
        rows["batch_size"] = Rule("runner_config.batch_size")
    else:
        rows.update(_idle(_FEED, "num_parallel_workers"))
        rows.update(_idle("every record is evaluated", "drop_remainder"))
    return _under(f"{part}_dataset", rows) | {
        f"{part}_dataset_task.type": _only(
            TASKS, "the data loader says it", f"known are {' and '.join(TASKS)}"
        )
    }


_TRAINING = {
    **_idle(_FEED, "runner_config.sink_mode runner_config.sink_size"),
    "runner_wrapper.type": Rule("runner_wrapper.type", STEPS),
    # A number; the section has our names. See glm_ms.settings.legacy.rules.
    "runner_wrapper.scale_sense": Rule("runner_wrapper.scale_sense.loss_scale_value"),
    "runner_wrapper.calculate_per_token_loss": _only(
        (False,), _SWITCHED_OFF, "the loss is the mean over the labelled tokens of a batch; remove it"
    ),
    "runner_wrapper.local_norm": Rule(reason=_LABELS),
    "optimizer.type": Rule(
        "optimizer.type", {**OPTIMIZERS, "AdamWeightDecay": "GLMAdamW", "AdamW": "GLMAdamW"}, _ADAMW
    ),
    "optimizer.beta1": Rule("optimizer.betas"),
    "optimizer.beta2": Rule("optimizer.betas"),
    "optimizer.learning_rate": Rule("lr_schedule.learning_rate"),
    "lr_schedule.type": Rule("lr_schedule.type", _LR_SCHEDULES),
    "lr_schedule.warmup_lr_init": _only((0, None), _SWITCHED_OFF, "the warm-up begins at 0; set it to 0"),
    "lr_schedule.warmup_epochs": _only(
        (None,),
        _SWITCHED_OFF,
        "give lr_schedule.warmup_steps, or lr_schedule.warmup_ratio as a share of all steps",
    ),
    "lr_schedule.decay_steps": _only((None,), _SWITCHED_OFF, "give lr_schedule.total_steps"),
}

_CALLBACKS = {
    **_idle("losses and learning rate are always shown", "MFLossMonitor"),
    "MFLossMonitor.per_print_times": Rule("logging.log_steps"),
    "CheckpointMonitor.save_checkpoint_steps": Rule("checkpoint.save_steps"),
    "CheckpointMonitor.keep_checkpoint_max": Rule("checkpoint.keep_max"),
    "CheckpointMonitor.save_checkpoint_seconds": _only(
        (0, None), _SWITCHED_OFF, "checkpoints are counted in steps; give save_checkpoint_steps"
    ),
    **_idle(_LABELS, "CheckpointMonitor CheckpointMonitor.prefix"),
    **_under(
        "CheckpointMonitor",
        _idle(_SHARDS, "integrated_save async_save save_network_params save_trainable_params"),
    ),
    **_idle(_PLATFORM, "ObsMonitor ObsMonitor.keep_last"),
    **_idle("TensorBoard files are written with logging.tensorboard", "SummaryMonitor"),
}

LEGACY: dict[str, Rule] = {
    **_TOP,
    **_under("context", _CONTEXT),
    **_under("parallel", _PARALLEL),
    **_under("parallel_config", _PARALLEL_CONFIG),
    **_under("recompute_config", _RECOMPUTE),
    **_under("model.model_config", _MODEL_CONFIG),
    "model.arch.type": Rule("model.arch.type", NETWORKS),
    **_under("processor.tokenizer", _TOKENIZER),
    **_dataset("train"),
    **_dataset("eval"),
    **_TRAINING,
    **_under("callbacks", _CALLBACKS),
}
