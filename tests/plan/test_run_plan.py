from __future__ import annotations

import pytest

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.generation.decoder import cache_capacity
from glm_ms.generation.graph_choice import GraphMaker
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.ops.cpu import library
from glm_ms.plan import RunPlan, nearest_fit, plan_run
from glm_ms.plan.work import step_flops
from glm_ms.settings import SettingsError, load_settings
from tests.plan.test_measured_memory import CONFIG, RECOMPUTE, SHARDED, keys

SIZES = keys(2, 64, 4, 64, 96, 128)
FULL_6B = GLMConfig()


def plan(*overrides: str, cards: int = 1, sizes: tuple[str, ...] = SIZES, **flags: str) -> RunPlan:
    return plan_run(load_settings(CONFIG, [*sizes, *overrides], flags, check_files=False), cards)


def split(data: int, model: int = 1, stages: int = 1, *more: str) -> tuple[str, ...]:
    micro = 2 * stages if stages > 1 else 1
    return (
        *SHARDED, f"parallel_config.data_parallel={data}", f"parallel_config.model_parallel={model}",
        f"parallel_config.pipeline_stage={stages}", f"parallel_config.micro_batch_num={micro}", *more,
    )  # fmt: skip


def test_bytes_of_a_full_finetuning() -> None:
    found = plan()
    assert found.trained == found.parameters
    assert found.card.weights == 4 * found.parameters
    assert found.card.optimizer == 8 * found.parameters
    assert found.card.gradients >= 4 * found.parameters
    assert found.card.copies == 0


def test_copies_in_the_compute_type() -> None:
    """Without recompute every matrix that is multiplied stays in both types; with it those of a block at a time."""
    half = "model.model_config.compute_dtype=float16"
    linear = 4 * (64 * (64 + 2 * 2 * 8) + 64 * 64 + 3 * 64 * 96)
    assert plan(half).card.copies == 2 * (linear + 64 * 128)
    assert plan(half, RECOMPUTE).card.copies == 2 * (linear // 4 + 64 * 128)


def test_gathered_weights_stay_unless_they_are_gathered_again() -> None:
    sharded = split(4, 1, 1, "parallel.enable_parallel_optimizer=True", "model.model_config.padded_vocab_size=4096")
    keeps = plan(*sharded, RECOMPUTE, cards=4)
    again = plan(*sharded, RECOMPUTE, "recompute_config.parallel_optimizer_comm_recompute=True", cards=4)
    assert again.card.copies < keeps.card.copies or again.card.copies == keeps.card.copies == 4 * 64 * 4096
    embedding = 4 * 64 * 4096 * 3 / 4  # gathered once in both
    assert again.sent["gathered weights"] - embedding == 2 * (keeps.sent["gathered weights"] - embedding) > 0


def test_stages_hold_their_own() -> None:
    whole, staged = plan(*split(1)), plan(*split(1, 1, 2), cards=2)
    assert [card.stage for card in staged.stages] == [0, 1]
    assert sum(card.weights for card in staged.stages) == whole.card.weights
    assert staged.sent["pipeline"] == 4 * 2 * 64 * 64 * 4  # micro batches x rows x positions x width x bytes


def test_gradients_of_a_pipeline_are_summed_before_they_are_cut() -> None:
    """As MindSpore compiles it: a whole float32 sum beside each gradient, one gathering for all micro batches."""
    words = "model.model_config.padded_vocab_size=4096"
    whole = plan(*split(4, 1, 2, words), cards=8)
    cut = plan(*split(4, 1, 2, words, "parallel.enable_parallel_optimizer=True"), cards=8)
    table = 4 * 64 * 4096  # the only parameter of the first stage above the threshold
    first, cut_first = whole.stages[0], cut.stages[0]
    assert first.weights - cut_first.weights == first.gradients - cut_first.gradients == table * 3 / 4
    more = plan(*split(4, 1, 2, words, "parallel.enable_parallel_optimizer=True"),
                "parallel_config.micro_batch_num=8", cards=8)  # fmt: skip
    assert more.sent["gathered weights"] == cut.sent["gathered weights"] == table * 3 / 4


def test_accumulation_keeps_a_sum() -> None:
    once, twice = plan(), plan("runner_config.gradient_accumulation_steps=2")
    assert twice.card.gradients - once.card.gradients == 4 * once.parameters
    assert twice.rows == 2 * once.rows


def test_cache_is_that_of_a_decoder() -> None:
    flags = {"run_mode": "predict", "load_checkpoint": "x", "predict_data": "x"}
    found = plan("generation.max_new_tokens=10", "predict_batch_size=3", **flags)
    settings = load_settings(CONFIG, SIZES, check_files=False)
    graphs = PagedGraphs(GLMForCausalLM(settings.glm_config()).network, 3, cache_capacity(64))
    assert found.card.kv_cache == sum(table.nbytes for table in graphs.cache.tables)
    assert found.card.optimizer == found.card.gradients == found.rows == 0
    assert plan("generation.num_beams=2", **flags).card.kv_cache > 0


def test_cache_of_smaller_keys_and_values_is_that_of_a_decoder() -> None:
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    flags = {"run_mode": "predict", "load_checkpoint": "x", "predict_data": "x", "device_target": "CPU"}
    options = ("generation.max_new_tokens=10", "predict_batch_size=3")
    network = GLMForCausalLM(load_settings(CONFIG, SIZES, check_files=False).glm_config()).network
    for storage in ("bfloat16", "int8"):
        found = plan(*options, **flags, kv_cache=storage)
        decoder = PagedDecoder(GraphMaker(network, storage)(3, cache_capacity(64)))
        decoder.serve()
        assert found.card.kv_cache == decoder.memory.bytes.nbytes


def test_flops_of_six_billion_parameters() -> None:
    """6 N operations a token for the weights (8 N with recompute), and the attention besides."""
    weights = 6_243_584_000 - FULL_6B.padded_vocab_size * FULL_6B.hidden_size  # the embedding is looked up
    found = step_flops(FULL_6B, 1000, 0, base_trained=True, recompute=False)
    assert found == pytest.approx(6 * weights * 1000, rel=1e-3)
    attention = step_flops(FULL_6B, 1000, 192, base_trained=True, recompute=False) - found
    assert attention == 3 * 4 * 28 * 1000 * 192 * 4096
    frozen = step_flops(FULL_6B, 1000, 0, base_trained=False, recompute=False)
    assert frozen * 3 == found * 2
    frozen_attention = step_flops(FULL_6B, 1000, 192, base_trained=False, recompute=False) - frozen
    assert frozen_attention == attention  # queries, keys and values have gradients all the same


def test_gradients_of_data_parallelism() -> None:
    found = plan("use_parallel=True", "parallel_config.data_parallel=4", cards=4)
    assert found.sent["gradients"] == pytest.approx(2 * 4 * found.parameters * 3 / 4)
    assert sum(found.sent.values()) == found.sent["gradients"]


def test_sums_of_tensor_parallelism() -> None:
    found = plan(*split(1, 2), cards=2)
    hidden, rows = 2 * 64 * 64 * 4, 2 * 64 * 4
    assert found.sent["tensor parallelism"] == 4 * 4 * hidden + 5 * rows
    assert found.card.activations < plan(*split(1)).card.activations


@pytest.mark.parametrize("memory", [0.9, 0.7, 0.5])
def test_nearest_setting_fits(memory: float) -> None:
    base = keys(8, 128, 4, 64, 96, 128)
    settings = load_settings(CONFIG, base, check_files=False)
    limit = int(plan_run(settings, 1).card.total * memory)

    def replan(overrides: tuple[str, ...]) -> RunPlan | None:
        try:
            return plan(*overrides, sizes=base)
        except SettingsError:
            return None

    overrides, found = nearest_fit(settings, 1, limit, replan)
    assert found.card.total <= limit
    assert overrides[0] == RECOMPUTE  # costs only time


def test_nothing_fits() -> None:
    settings = load_settings(CONFIG, SIZES, check_files=False)
    assert nearest_fit(settings, 1, 1000, lambda overrides: plan(*overrides)) is None
