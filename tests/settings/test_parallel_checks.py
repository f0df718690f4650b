"""Sharded runs: what is refused before anything is compiled, and with which sizes in the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.parallel.config import ParallelConfig
from glm_ms.settings import SettingsError, load_settings
from glm_ms.settings.schema import parallel_of

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "glm3" / "run_glm3_6b_finetune_2k_800_32G.yaml"
REFUSED = [
    (["parallel_config.model_parallel=7"], ["num_attention_heads = 32 is not divisible by model_parallel = 7"]),
    (["parallel_config.model_parallel=32"], []),
    (
        ["model.model_config.multi_query_group_num=4", "parallel_config.model_parallel=6"],
        ["4 key/value heads and model_parallel = 6: one must be divisible by the other"],
    ),
    (
        ["parallel_config.pipeline_stage=4", "parallel_config.micro_batch_num=2"],
        ["micro_batch_num: 2 is below pipeline_stage = 4"],
    ),
    (["parallel_config.micro_batch_num=4"], ["micro_batch_num: 4 has no effect with pipeline_stage = 1"]),
    (
        ["parallel_config.pipeline_stage=29", "parallel_config.micro_batch_num=29"],
        ["29 stages for num_layers = 28 blocks"],
    ),
    (
        ["parallel_config.use_seq_parallel=True", "runner_config.batch_size=1", "train_dataset.max_target_length=1003"],
        ["1 rows x 2027 positions = 2027 is not divisible by data_parallel x model_parallel = 8"],
    ),
    (
        ["parallel_config.model_parallel=1", "parallel_config.use_seq_parallel=True"],
        ["use_seq_parallel: True needs model_parallel above 1"],
    ),
    (["parallel.full_batch=False"], ["every card reads the whole batch"]),
    (
        ["recompute_config.recompute=False", "recompute_config.mp_comm_recompute=False"],
        ["mp_comm_recompute: False has no effect"],
    ),
    (
        ["recompute_config.parallel_optimizer_comm_recompute=True", "parallel.enable_parallel_optimizer=False"],
        ["has no effect with enable_parallel_optimizer: False"],
    ),
    (
        [
            "recompute_config.parallel_optimizer_comm_recompute=True", "parallel_config.model_parallel=4",
            "parallel_config.pipeline_stage=2", "parallel_config.micro_batch_num=4",
        ],
        ["does not support it in pipelines"],
    ),
    (["context.use_fused_kernels=True"], ["fused kernels have no sharding strategies"]),
    (["context.mode=1"], ["sharding needs graph mode"]),
    (["do_eval=True", "eval_step_interval=5"], ["no card of a sharded run has the whole network"]),
    (["runner_config.gradient_accumulation_steps=2"], ["micro_batch_num"]),
    (["parallel.parallel_mode=0", "parallel.full_batch=False"], ["model_parallel: 8 needs parallel.parallel_mode: 1"]),
    (
        ["model.pet_config.pet_type=ptuning2", "parallel_config.pipeline_stage=2", "parallel_config.micro_batch_num=2"],
        ["prefix of P-Tuning is one weight"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "reasons"), REFUSED, ids=lambda value: " ".join(value) or "nothing")
def test_impossible_splits(overrides: list[str], reasons: list[str]) -> None:
    if not reasons:
        load_settings(CONFIG, overrides, check_files=False)
        return
    with pytest.raises(SettingsError) as caught:
        load_settings(CONFIG, overrides, check_files=False)
    for reason in reasons:
        assert reason in str(caught.value)
    assert CONFIG.name in str(caught.value) or "command line" in str(caught.value)


def test_rules_come_before_the_split() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(CONFIG, ["parallel_config.micro_batch_num=4", "context.mode=1"], check_files=False)
    assert [problem.key for problem in caught.value.problems] == ["context.mode", "parallel_config.micro_batch_num"]


def test_evaluation_needs_whole_weights() -> None:
    with pytest.raises(
        SettingsError, match=r"parallel_mode: 1, but run_mode: eval needs whole weights.*transform_ckpt"
    ):
        load_settings(CONFIG, [], {"run_mode": "eval"}, check_files=False)


def test_split_of_a_file() -> None:
    settings = load_settings(CONFIG, ["parallel_config.use_seq_parallel=True"], check_files=False)
    assert parallel_of(settings) == ParallelConfig(1, 8, 1, 1, True, True, True)
    plain = load_settings(
        CONFIG,
        ["parallel.parallel_mode=0", "parallel.full_batch=False", "parallel.enable_parallel_optimizer=False",
         "parallel_config.model_parallel=1"],
        check_files=False
    )  # fmt: skip
    assert parallel_of(plain, 4) == ParallelConfig(data_parallel=4)


def test_stages_are_even_and_the_later_ones_longer() -> None:
    parallel = ParallelConfig(pipeline_stages=3)
    assert [parallel.stage_of(layer, 8) for layer in range(8)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [ParallelConfig(pipeline_stages=2).stage_of(layer, 4) for layer in range(4)] == [0, 0, 1, 1]


def test_keys_typed_for_several_cards_have_no_effect_on_one() -> None:
    typed = ["use_parallel=False", "parallel_config.model_parallel=2"]
    notes = load_settings(CONFIG, typed, check_files=False).notes
    assert [note for note in notes if "no effect with use_parallel: False" in note] == [
        "command line (parallel_config.model_parallel=2): parallel_config.model_parallel has no effect with "
        "use_parallel: False"
    ]


def test_weights_are_not_gathered_in_data_parallel_runs() -> None:
    lora = CONFIG.with_name("run_glm3_6b_lora_2k_800_32G.yaml")
    with pytest.raises(SettingsError, match=r"comm_recompute: True needs parallel\.parallel_mode: 1"):
        load_settings(lora, ["recompute_config.parallel_optimizer_comm_recompute=True"], check_files=False)
