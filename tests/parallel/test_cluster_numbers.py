"""The graphs that MindSpore compiles for 8 cards, run with NumPy, give the loss, the gradient norm and every gradient
of one card with the whole batch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.engine.step.network import TrainingNetwork
from glm_ms.engine.weights import adapter_config
from glm_ms.ops.portable import pair_rotation, rotary_tables
from glm_ms.parallel.config import ParallelConfig
from glm_ms.plan import planned_parameters
from glm_ms.plan.planned_parameters import stored_parts
from glm_ms.settings import Settings, load_settings
from glm_ms.settings.schema import parallel_of, training_length
from tests.parallel.spmd import Card, read_graph, run
from tests.parallel.test_numbers import apart
from tests.parallel.test_strategies import CONFIG, SMALL, compile_ranks, pytestmark, split  # noqa: F401
from tests.tolerances import GRAD_NORM, GRADIENT, LOSS

LENGTH, CARDS, LAYERS, CLIP = 16, 8, 2, 0.5
PLAIN = (
    "model.model_config.seq_length=16", "train_dataset.max_source_length=7", "train_dataset.max_target_length=8",
    "model.model_config.compute_dtype=float32", "runner_wrapper.scale_sense.type=null",
    "model.model_config.padded_vocab_size=512", f"runner_wrapper.max_grad_norm={CLIP}",
)  # fmt: skip
CASES = {
    "dp8, optimizer": split(8, 1, 1, True),
    "dp2 x mp4, optimizer": split(2, 4, 1, True),
    "mp8, vocabulary, sequence": split(
        1, 8, 1, False, "parallel_config.vocab_emb_dp=False", "parallel_config.use_seq_parallel=True"
    ),
    "pp2 x mp2 x dp2, optimizer": split(2, 2, 2, True),
    "dp2 x mp4, lora": split(
        2,
        4,
        1,
        False,
        "model.pet_config.pet_type=lora",
        "model.pet_config.target_modules=.*",
        "model.pet_config.lora_dropout=0",
    ),
}


def network(settings: Settings) -> GLMForCausalLM:
    """Every parameter is drawn, those that begin at zero or one too."""
    model, generator = GLMForCausalLM(settings.glm_config()), np.random.default_rng(3)
    adapter = adapter_config(settings)
    if adapter is not None:
        model.add_adapter(adapter)
    for parameter in model.network.get_parameters():
        parameter.set_data(Tensor(generator.normal(0.05, 0.2, parameter.shape).astype(np.float32)))
    return model


def batch(rows: int, vocabulary: int) -> list[np.ndarray]:
    """Rows with padding on the left and labels of their own."""
    generator = np.random.default_rng(4)
    ids = generator.integers(3, vocabulary, (rows, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    labels = np.where((mask == 1) & (np.arange(LENGTH) > 4), ids, -100).astype(np.int32)
    return [ids, labels, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)]


def piece(value: np.ndarray, place: tuple[int | None, int, int], rank: int, parallel: ParallelConfig) -> np.ndarray:
    """The part of a parameter that a card has: its axis by the model-parallel cards, the rest by those with copies."""
    axis, ways, shards = place
    rank %= parallel.stage_cards
    if axis is not None:
        value = np.split(value, ways, axis=axis)[rank % parallel.model_parallel]
    if shards > 1:
        value = np.split(value, shards)[rank // parallel.model_parallel if axis is not None else rank]
    return value


def constants(config: GLMConfig):
    cos, sin = rotary_tables(config.seq_length, config.kv_channels, config.rope_ratio)
    turn = pair_rotation(config.kv_channels)

    def constant(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if shape == cos.shape:
            return {"cos": cos, "sin": sin}[re.search(r"cos|sin", name).group(0)]
        if shape == (1, 1, *turn.shape):
            return turn[None, None]
        if name == "dx":  # of a weight: what counts has been added to its sum
            return np.zeros(shape)
        assert shape == (LENGTH,), (name, shape)
        return np.arange(LENGTH)

    return constant


def whole_step(settings: Settings, inputs: list[np.ndarray]):
    """Mean loss, gradient norm and clipped gradients of one card with all rows."""
    config = settings.glm_config()
    model = network(settings)
    cell = TrainingNetwork(model.network, LENGTH)
    weights = model.network.trainable_params()
    (loss, tokens), gradients = ms.value_and_grad(cell, None, ms.ParameterTuple(weights), has_aux=True)(
        *map(Tensor, inputs)
    )
    tokens = float(tokens.asnumpy())
    found = {weight.name: g.asnumpy() / tokens for weight, g in zip(weights, gradients)}
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in found.values()))
    scale = min(1.0, settings.runner_wrapper.max_grad_norm / (norm + 1e-6))
    return float(loss.asnumpy()) / tokens, norm, apart({n: g * scale for n, g in found.items()}, config)


def check(settings: Settings, graphs: Path) -> None:
    config, parallel = settings.glm_config(), parallel_of(settings)
    rows = settings.runner_config.batch_size * parallel.data_parallel * parallel.micro_batch_num
    inputs = batch(rows, config.padded_vocab_size)
    loss, norm, expected = whole_step(settings, inputs)
    parts = stored_parts(config, parallel, planned_parameters(settings, config))
    slices = {part.name: part.slice for part in parts}
    places = {name: (s.axis, s.ways, s.shards) for name, s in slices.items()}
    values = apart({p.name: p.asnumpy() for p in network(settings).network.get_parameters()}, config)
    cards = [
        Card(
            rank,
            read_graph(graphs / f"rank_{rank}"),
            {
                "scale_sense": np.float32(1),  # MindSpore's own, of pipelines
                **{f"inputs{i}": value for i, value in enumerate(inputs)},
                **{name: piece(value, places[name], rank, parallel) for name, value in values.items()},
            },
            constants(config),
            {f"glm_stages_{p}": tuple(range(p, CARDS, parallel.stage_cards)) for p in range(parallel.stage_cards)},
        )
        for rank in range(CARDS)
    ]
    run(cards)
    for card in cards:
        stage = card.rank // parallel.stage_cards
        mine = {name: value for name, value in expected.items() if slices[name].stage == stage}
        assert sorted(card.gradients) == sorted(mine)
        for name, value in mine.items():
            wanted, found = piece(value, places[name], card.rank, parallel), card.gradients[name]
            assert found.shape == wanted.shape
            error = np.abs(found - wanted).max()
            assert error <= GRADIENT * np.abs(value).max(), (card.rank, name, error, np.abs(value).max())
        scalars = [v for v in card.values.values() if isinstance(v, np.ndarray) and v.shape == ()]
        assert any(np.isclose(v, loss, **LOSS) for v in scalars)
        assert any(np.isclose(v, norm, **GRAD_NORM) for v in scalars)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_one_card(name: str, tmp_path: Path) -> None:
    keys = [*SMALL, *PLAIN, *CASES[name]]
    compile_ranks("rig_step.py", tmp_path / "out", CONFIG, LAYERS, *keys, graphs=tmp_path / "graphs")
    settings = load_settings(CONFIG, [*keys, f"model.model_config.num_layers={LAYERS}"], check_files=False)
    assert training_length(settings) == LENGTH
    check(settings, tmp_path / "graphs")
    shutil.rmtree(tmp_path / "graphs")  # a gigabyte
