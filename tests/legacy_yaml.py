"""Configurations as MindFormers 1.0 to 1.3 have them for ChatGLM2 and ChatGLM3: every key and kind of value."""

from __future__ import annotations

_TOP = """\
seed: 0
run_mode: 'train'
output_dir: './output'  # path to save checkpoint/strategy
load_checkpoint: '{zoo}'
src_strategy_path_or_dir: ''
auto_trans_ckpt: False
only_save_strategy: False
resume_training: False
context:
  mode: 0
  device_target: "Ascend"
  enable_graph_kernel: False
  graph_kernel_flags: "--disable_expand_ops=Softmax,Dropout"
  max_call_depth: 10000
  max_device_memory: "59GB"
  save_graphs: False
  save_graphs_path: 'your-path'
  device_id: 0
  memory_optimize_level: "O1"
  jit_config:
    jit_level: "O2"
remote_save_url: "Please input obs url on AICC platform."
"""
_MODEL = """\
model:
  model_config:
    type: ChatGLM2Config
    batch_size: 1   # only for incremental infer
    num_layers: 28
    padded_vocab_size: 65024
    hidden_size: 4096
    ffn_hidden_size: 13696
    kv_channels: 128
    num_attention_heads: 32
    seq_length: 193
    hidden_dropout: 0.0
    attention_dropout: 0.0
    layernorm_epsilon: 1e-5
    rope_ratio: 1
    rmsnorm: True
    apply_residual_connection_post_layernorm: False
    post_layer_norm: True
    add_bias_linear: False
    add_qkv_bias: True
    bias_dropout_fusion: True
    multi_query_attention: True
    multi_query_group_num: 2
    apply_query_key_layer_scaling: True
    attention_softmax_in_fp32: True
    fp32_residual_connection: False
    quantization_bit: 0
    pre_seq_len: None
    prefix_projection: False
    param_init_type: "float16"
    compute_dtype: "float16"
    layernorm_compute_type: "float32"
    softmax_compute_type: "float32"
    rotary_dtype: "float32"
    use_past: False
    use_flash_attention: False
    use_prompt_flash_attention: False
    use_incre_flash_attention: False
    use_paged_attention: False
    use_kvcache_op: False
    is_flexible_shape: False
    is_dynamic: True
    is_sample_acceleration: False
    block_size: 16
    num_blocks: 224
    no_recompute_layers: None
    eos_token_id: 2
    pad_token_id: 0
    repetition_penalty: 1.0
    max_decode_length: 256
    checkpoint_name_or_path: "{zoo}"
    top_k: 1
    top_p: 1
    do_sample: True
{pet}  arch:
    type: {arch}
trainer:
  type: CausalLanguageModelingTrainer
  model_name: '{zoo}'
do_eval: False
eval_step_interval: 1788
eval_epoch_interval: -1
metric:
  type: PerplexityMetric
processor:
  return_tensors: ms
  tokenizer:
    type: {tokenizer}
    bos_token: '<sop>'
    eos_token: '<eop>'
    end_token: '</s>'
    mask_token: '[MASK]'
    gmask_token: '[gMASK]'
    pad_token: '<pad>'
    unk_token: '<unk>'
    # vocab_file: "/path/to/tokenizer.model"
  type: GLMProcessor
"""
_FEED = """\
  num_parallel_workers: 1
  python_multiprocessing: False
  drop_remainder: True
  batch_size: {batch_size}
  repeat: 1
  numa_enable: False
  prefetch_size: 1
  seed: 0
"""
_ADGEN = (
    """\
{part}_dataset: &{part}_dataset
  data_loader:
    type: ADGenDataLoader
    dataset_dir: "/path/to/AdvertiseGen/{file}.json"
    shuffle: {shuffle}
    phase: "train"
    version: {version}
    origin_columns: ["content", "summary"]
  tokenizer:
    type: {tokenizer}
    vocab_file: "/path/to/tokenizer.model"
  input_columns: ["input_ids", "labels"]
  max_source_length: 64
  max_target_length: {target}
  ignore_pad_token_for_loss: True
"""
    + _FEED
    + """\
{part}_dataset_task:
  type: KeyWordGenDataset
  dataset_config: *{part}_dataset
"""
)
_TOOL_ALPACA = (
    """\
train_dataset: &train_dataset
  data_loader:
    type: ToolAlpacaDataLoader
    dataset_dir: "/path/to/tool_alpaca.jsonl"
    shuffle: True
  tokenizer:
    type: ChatGLM3Tokenizer
    vocab_file: "/path/to/tokenizer.model"
  max_seq_length: 193
"""
    + _FEED
    + """\
train_dataset_task:
  type: MultiTurnDataset
  dataset_config: *train_dataset
"""
)
_REST = """\
runner_config:
  epochs: 1
  batch_size: 8
  sink_mode: True
  sink_size: 4
runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense:
    type: DynamicLossScaleUpdateCell
    loss_scale_value: 65536
    scale_factor: 2
    scale_window: 1000
  use_clip_grad: True
lr_schedule:
  type: polynomial
  learning_rate: 5.e-5
  lr_end: 1.e-6
  warmup_steps: 0
  total_steps: -1 # -1 means it will load the total steps of the dataset
layer_scale: False
layer_decay: 0.65
optimizer:
  type: FP32StateAdamWeightDecay
  beta1: 0.9
  beta2: 0.95
  eps: 1.e-8
  weight_decay: 0.1
lr_scale: False
lr_scale_factor: 256
use_parallel: False
parallel:
  parallel_mode: 1 # 0-dataset, 1-semi, 2-auto, 3-hybrid
  gradients_mean: False
  loss_repeated_mean: True
  enable_alltoall: False
  full_batch: True
  search_mode: "sharding_propagation"
  enable_parallel_optimizer: True
  strategy_ckpt_config:
    save_file: "./ckpt_strategy.ckpt"
    only_trainable_params: False
parallel_config:
  data_parallel: 8
  model_parallel: 1
  pipeline_stage: 1
  expert_parallel: 1
  micro_batch_num: 1
  vocab_emb_dp: True
  gradient_aggregation_group: 4
micro_batch_interleave_num: 1
moe_config:
  expert_num: 1
  capacity_factor: 1.05
  aux_loss_factor: 0.05
  num_experts_chosen: 1
recompute_config:
  recompute: False
  parallel_optimizer_comm_recompute: False
  mp_comm_recompute: True
  recompute_slice_activation: False
auto_tune: False
filepath_prefix: './autotune'
autotune_per_step: 10
profile: False
profile_start_step: 1
profile_stop_step: 10
init_start_profile: True
profile_communication: True
profile_memory: True
callbacks:
  - type: MFLossMonitor
  - type: {monitor}
    prefix: "{zoo}"
    save_checkpoint_steps: 1000
    keep_checkpoint_max: 2
    integrated_save: False
    async_save: False
  - type: ObsMonitor
    keep_last: False
eval_callbacks:
  - type: ObsMonitor
    keep_last: False
"""
LORA = """\
    pet_config:
      pet_type: lora
      lora_rank: 4
      lora_alpha: 32
      lora_dropout: 0.1
      target_modules: '.*query_key_value*'
"""
PTUNING = """\
    pet_config:
      pet_type: ptuning2
      pre_seq_len: 128
      prefix_projection: False
      projection_dim: 128
      dropout_prob: 0.0
"""


def legacy_yaml(*changes: tuple[str, str], generation: int = 2, pet: str = "", tools: bool = False) -> str:
    """The text of a configuration.

    Args:
        changes: (text, what takes its place); the text must occur.
        generation: of the model, 2 or 3.
        pet: `LORA`, `PTUNING`, or nothing: all weights are trained.
        tools: conversations with tools in place of adverts; there is no evaluation then.
    """
    fields = {
        "zoo": f"glm{generation}_6b",
        "tokenizer": f"ChatGLM{generation}Tokenizer",
        "pet": pet,
        "arch": "ChatGLM2WithPtuning2" if pet == PTUNING else "ChatGLM2ForConditionalGeneration",
        "monitor": "CheckpointMointor" if generation == 2 else "CheckpointMonitor",
        "version": generation,
        "batch_size": 1,
        "target": 128,
    }
    parts = {"train": {"file": "train", "shuffle": True}, "eval": {"file": "dev", "shuffle": False}}
    datasets = [_ADGEN.format(part=part, **fields, **own) for part, own in parts.items()]
    data = _TOOL_ALPACA.format(**fields) if tools else "".join(datasets)
    text = _TOP.format(**fields) + _MODEL.format(**fields) + data + _REST.format(**fields)
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text
