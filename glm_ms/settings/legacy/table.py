"""MindFormers' names for ChatGLM2 and ChatGLM3, versions 1.0 to 1.3, and what becomes of them: one table.

`LEGACY` has a row for every key of those configurations that is not a key here under the same name with the
same values. `glm_ms.settings.legacy.translate` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union


@dataclass(frozen=True)
class Renamed:
    """A key that is one of ours."""

    key: str  # its name here
    values: Mapping[Any, Any] = field(default_factory=dict)  # value there -> value here; others stay as they are
    remark: str = ""  # added to the line about a translated value
    rank: int = 1  # of several keys of a file that become the same key, the lowest rank counts


@dataclass(frozen=True)
class Ignored:
    """A key that has no effect here, whatever its value; `reason` tells why."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """A key with a value that is an error."""

    unless: tuple[Any, ...]  # values without effect; all others are refused
    reason: str  # why those have no effect
    remedy: str  # what to do about the others
    accepted: Mapping[Any, str] = field(default_factory=dict)  # value -> note for the user; the run continues


Rule = Union[Renamed, Ignored, Refused]

# Class names of those versions that our configurations cannot have: signs of their files.
CONFIGS = dict.fromkeys(("ChatGLM2Config", "ChatGLM32kConfig"), "GLMConfig")
NETWORKS = dict.fromkeys(
    ("ChatGLM2ForConditionalGeneration", "ChatGLM2WithPtuning2", "ChatGLM32kForConditionalGeneration"), "GLMForCausalLM"
)
TOKENIZERS = {"ChatGLM32kTokenizer": "ChatGLM3Tokenizer"}
STEPS = {"MFTrainOneStepCell": "GLMTrainOneStep", "MFPipelineWithLossScaleCell": "GLMTrainOneStep"}
OPTIMIZERS = dict.fromkeys(("FP32StateAdamWeightDecay", "FusedAdamWeightDecay", "FusedCastAdamWeightDecay"), "GLMAdamW")
TASKS = ("KeyWordGenDataset", "MultiTurnDataset")
LEGACY_CLASSES = frozenset({*CONFIGS, *NETWORKS, *STEPS, *OPTIMIZERS, *TASKS, "CausalLanguageModelingTrainer"})
LEGACY_SECTIONS = frozenset(
    ("trainer", "callbacks", "eval_callbacks", "train_dataset_task", "eval_dataset_task", "moe_config", "infer")
)
# Two names of one section. Of the first two MindFormers itself overwrites the left by the right.
SECTION_ALIASES = {
    "train_dataset_task.dataset_config": "train_dataset",
    "eval_dataset_task.dataset_config": "eval_dataset",
    "callbacks.CheckpointMointor": "callbacks.CheckpointMonitor",
}
# Defaults of those versions, which count if a section of the file does not have the key.
LEGACY_DEFAULTS = {
    "model.model_config.param_init_type": "float16",
    "model.model_config.compute_dtype": "float16",
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
    "runner_wrapper.use_clip_grad": False,
}
# The default of `top_k` for a file with `do_sample: True` alone.
LEGACY_TOP_K = 50
# `load_checkpoint: glm3_6b` was downloaded by these names; the endings are those of their finetuned variants.
ZOO_NAMES = r"(glm[23]_6b|glm3_6b_32k|codegeex2_6b|glm_6b)(_(lora|ptuning2|chat))?"

_LR_SCHEDULES = {
    "constant_with_warmup": "ConstantWarmUpLR",
    "linear": "LinearWithWarmUpLR",
    "cosine": "CosineWithWarmUpLR",
    "polynomial": "PolynomialWithWarmUpLR",
}
_OUR_OPTIMIZER = {"AdamWeightDecay": "GLMAdamW", "AdamW": "GLMAdamW"}
_ADAMW = "AdamW with bias correction, whose weight_decay also reaches norms and biases"
_FEED = "the way of feeding batches does not change them"
_SHARDS = "whole checkpoints are loaded; tools/transform_ckpt.py merges slices"
_LABELS = "names and labels"
_PLATFORM = "storage of the online platform"
_PROFILER = "profiling and tuning"
_SWITCHED_OFF = "belongs to a switch that is off"
_TOKENS = "the special tokens are those of the tokenizer"
_DENSE = "the network has no experts"
_KERNELS = "MindSpore chooses kernels and compiler; context.use_fused_kernels selects Ascend's"
_COMMUNICATION = "MindSpore chooses the communication"

# Reason, section, names. `gradients_mean`: see also glm_ms.settings.legacy.rules.
_IGNORED = (
    (_SHARDS, "", "auto_trans_ckpt"),
    (_PLATFORM, "", "remote_save_url eval_callbacks"),
    (_SWITCHED_OFF, "", "layer_decay lr_scale_factor"),
    (_PROFILER, "", "auto_tune filepath_prefix autotune_per_step init_start_profile profile_start_step "
     "profile_stop_step profile_communication profile_memory"),
    (_LABELS, "", "trainer.model_name processor.type processor.return_tensors runner_wrapper.local_norm"),
    ("an export writes into output_dir, and takes up to model.model_config.seq_length tokens", "", "infer"),
    (_DENSE, "moe_config", "capacity_factor aux_loss_factor num_experts_chosen"),
    (_KERNELS, "context", "enable_graph_kernel graph_kernel_flags max_call_depth save_graphs save_graphs_path "
     "jit_config ascend_config memory_optimize_level memory_offload"),
    ("gradients are averaged", "parallel", "gradients_mean"),
    (_COMMUNICATION, "parallel", "loss_repeated_mean enable_alltoall search_mode parallel_optimizer_config"),
    (_SHARDS, "parallel", "strategy_ckpt_config strategy_ckpt_save_file"),
    ("whole blocks are recomputed, or none", "recompute_config",
     "recompute_slice_activation select_recompute select_comm_recompute"),
    ("norms, softmax and residuals are computed in float32", "model.model_config",
     "layernorm_compute_type softmax_compute_type rotary_dtype embedding_type attention_softmax_in_fp32 "
     "fp32_residual_connection apply_query_key_layer_scaling"),
    ("every generation has a key/value cache", "model.model_config",
     "use_past is_dynamic use_kvcache_op is_flexible_shape use_paged_attention block_size num_blocks "
     "is_sample_acceleration"),
    ("the tokenizer class has the chat template", "processor.tokenizer", "chat_template"),
    ("parallel.enable_parallel_optimizer decides it", "parallel_config", "optimizer_shard"),
    (_KERNELS, "model.model_config", "bias_dropout_fusion use_flash_attention use_prompt_flash_attention "
     "use_incre_flash_attention mask_type no_recompute_layers offset pp_interleave_num"),
    (_TOKENS, "model.model_config", "bos_token_id gmask_token_id"),
    (_FEED, "runner_config", "sink_mode sink_size"),
    *((_FEED, section, "input_columns output_columns python_multiprocessing numa_enable prefetch_size seed auto_tune "
       "filepath_prefix autotune_per_step profile") for section in ("train_dataset", "eval_dataset")),
    (_FEED, "eval_dataset", "num_parallel_workers"),
    ("every record is evaluated", "eval_dataset", "drop_remainder"),
    ("losses and learning rate are always shown", "callbacks", "MFLossMonitor"),
    (_LABELS, "callbacks", "CheckpointMonitor CheckpointMonitor.prefix"),
    (_SHARDS, "callbacks.CheckpointMonitor", "integrated_save async_save save_network_params save_trainable_params"),
    (_PLATFORM, "callbacks", "ObsMonitor ObsMonitor.keep_last"),
    ("TensorBoard files are written with logging.tensorboard", "callbacks",
     "SummaryMonitor SummaryMonitor.keep_default_action"),
)  # fmt: skip

# Section there, section here, names that stay.
_MOVED = (
    ("model.model_config", "generation",
     "repetition_penalty max_length max_new_tokens temperature top_k top_p do_sample num_beams"),
    ("model.model_config.pet_config", "model.pet_config",
     "pet_type lora_rank lora_alpha lora_dropout target_modules pre_seq_len prefix_projection projection_dim "
     "dropout_prob"),
    ("train_dataset.tokenizer", "processor.tokenizer", "vocab_file"),
    ("eval_dataset.tokenizer", "processor.tokenizer", "vocab_file"),
)  # fmt: skip

_RENAMED = {
    "model.model_config.type": Renamed("model.model_config.type", CONFIGS),
    "model.model_config.batch_size": Renamed("predict_batch_size"),
    # With pet_type ptuning2; see glm_ms.settings.legacy.rules.
    "model.model_config.pre_seq_len": Renamed("model.pet_config.pre_seq_len", rank=2),
    "model.model_config.prefix_projection": Renamed("model.pet_config.prefix_projection", rank=2),
    "model.model_config.max_decode_length": Renamed("generation.max_length", rank=2),
    "model.model_config.checkpoint_name_or_path": Renamed("load_checkpoint"),
    "model.arch.type": Renamed("model.arch.type", NETWORKS),
    **{f"{section}.tokenizer.type": Renamed("processor.tokenizer.type", TOKENIZERS)
       for section in ("processor", "train_dataset", "eval_dataset")},
    "train_dataset.batch_size": Renamed("runner_config.batch_size"),
    "runner_wrapper.type": Renamed("runner_wrapper.type", STEPS),
    # A number; the section has our names. See glm_ms.settings.legacy.rules.
    "runner_wrapper.scale_sense": Renamed("runner_wrapper.scale_sense.loss_scale_value"),
    "optimizer.type": Renamed("optimizer.type", {**OPTIMIZERS, **_OUR_OPTIMIZER}, _ADAMW),
    "optimizer.beta1": Renamed("optimizer.betas"),
    "optimizer.beta2": Renamed("optimizer.betas"),
    "optimizer.learning_rate": Renamed("lr_schedule.learning_rate"),
    "lr_schedule.type": Renamed("lr_schedule.type", _LR_SCHEDULES),
    "callbacks.MFLossMonitor.per_print_times": Renamed("logging.log_steps"),
    "callbacks.CheckpointMonitor.save_checkpoint_steps": Renamed("checkpoint.save_steps"),
    "callbacks.CheckpointMonitor.keep_checkpoint_max": Renamed("checkpoint.keep_max"),
}  # fmt: skip

_NO_EXPERTS = "ChatGLM2 and ChatGLM3 have no experts; set it to 1"
_USUAL_TOKENS = {
    "bos_token": ("<sop>", "<bos>"), "eos_token": ("<eop>", "</s>", "<eos>"), "end_token": ("</s>",),
    "mask_token": ("[MASK]",), "gmask_token": ("[gMASK]",), "pad_token": ("<pad>", "<unk>"), "unk_token": ("<unk>",),
}  # fmt: skip
_REFUSED = {
    "src_strategy_path_or_dir": Refused(("", None), _SHARDS,
        "merge the slices first with tools/transform_ckpt.py, and name the result with --load_checkpoint"),
    "only_save_strategy": Refused((False,), _SHARDS, "there is no run that only writes strategies; remove it"),
    "layer_scale": Refused((False,), _SWITCHED_OFF, "every layer has the same learning rate; set it to False"),
    "lr_scale": Refused((False,), _SWITCHED_OFF, "set it to False, and lr_schedule.learning_rate to the wanted rate"),
    "micro_batch_interleave_num": Refused((1,), _COMMUNICATION, "set it to 1, and runner_config.batch_size to fit"),
    "profile": Refused((False,), _PROFILER, "set it to False",
        {True: "there is no profiler; the run continues without"}),
    "trainer.type": Refused(("CausalLanguageModelingTrainer",), _LABELS, "only CausalLanguageModelingTrainer is known"),
    "moe_config.expert_num": Refused((1,), _DENSE, _NO_EXPERTS),
    "parallel_config.expert_parallel": Refused((1,), _DENSE, _NO_EXPERTS),
    "parallel_config.context_parallel": Refused((1,), _COMMUNICATION,
        "sequences are not split over cards; set it to 1"),
    "model.model_config.interleaved_qkv": Refused((False,), _SWITCHED_OFF,
        "query, key and value follow each other in the weights of these models; set it to False"),
    "model.model_config.rotary_percent": Refused((0.5,), "half of each head is rotated",
        "half of each head is rotated in these models; set it to 0.5"),
    "model.model_config.quantization_bit": Refused((0, None), _SWITCHED_OFF,
        "MindFormers never used it; set it to 0, and model.quantization_bit to 4 or 8 for quantized weights"),
    "runner_wrapper.calculate_per_token_loss": Refused((False,), _SWITCHED_OFF,
        "the loss is the mean over the labelled tokens of a batch; remove it"),
    "lr_schedule.warmup_lr_init": Refused((0, None), _SWITCHED_OFF, "the warm-up begins at 0; set it to 0"),
    "lr_schedule.warmup_epochs": Refused((None,), _SWITCHED_OFF,
        "give lr_schedule.warmup_steps, or lr_schedule.warmup_ratio as a share of all steps"),
    "lr_schedule.decay_steps": Refused((None,), _SWITCHED_OFF, "give lr_schedule.total_steps"),
    "callbacks.CheckpointMonitor.save_checkpoint_seconds": Refused((0, None), _SWITCHED_OFF,
        "checkpoints are counted in steps; give save_checkpoint_steps"),
    "train_dataset.data_loader.phase": Refused(("train",), "the run mode decides it", "remove it"),
    "eval_dataset.data_loader.phase": Refused(("train", "eval"), "the run mode decides it", "remove it"),
    **{f"{part}_dataset.data_loader.version": Refused((2, None), "the tokenizer decides it",
        "versions 2 and 3 are rows of ChatGLM2 and ChatGLM3; the run takes the one of its tokenizer",
        {3: "there the answer follows the bare prompt, here ChatGLM3's chat template"}) for part in ("train", "eval")},
    **{f"{part}_dataset.repeat": Refused((1,), _FEED, "set it to 1, and runner_config.epochs to the number of passes")
       for part in ("train", "eval")},
    **{f"{part}_dataset_task.type": Refused(TASKS, "the data loader decides it", f"known are {' and '.join(TASKS)}")
       for part in ("train", "eval")},
    **{f"{section}.tokenizer.{name}": Refused(usual, _TOKENS,
        f"the special tokens of these models are fixed; set it to {usual[0]!r}")
       for section in ("processor", "train_dataset", "eval_dataset") for name, usual in _USUAL_TOKENS.items()},
}  # fmt: skip

LEGACY: dict[str, Rule] = {
    **{f"{section}.{name}".lstrip("."): Ignored(why) for why, section, names in _IGNORED for name in names.split()},
    **{f"{old}.{name}": Renamed(f"{new}.{name}") for old, new, names in _MOVED for name in names.split()},
    **_RENAMED,
    **_REFUSED,
}
