"""A training step without padding computes what it computes with it."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from tolerances import GRAD_NORM, LOSS

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.engine.step.network import TrainingNetwork
from glm_ms.ops.registry import step_kernel
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig

SIZES = dict(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4, padded_vocab_size=60,
    multi_query_group_num=2, seq_length=160
)  # fmt: skip
COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    if step_kernel("attention") is None:
        pytest.skip("no C++ kernels, or no oneDNN")


def rows_of(masks: list[list[int]], length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens and labels, one row for each list of (visible, hidden, visible, ...) counts; the rest is hidden."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((len(masks), length), np.int32)
    for row, counts in enumerate(masks):
        ends = np.cumsum(counts)
        for begin, end in zip((0, *ends[1::2]), ends[::2]):
            mask[row, begin:end] = 1
    ids = rng.integers(0, SIZES["padded_vocab_size"], mask.shape).astype(np.int32)
    labels = np.where(rng.random(mask.shape) < 0.6, ids, -100).astype(np.int32)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    positions = (np.maximum(np.cumsum(mask, 1) - 1, 0) * mask).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


class Compiled:
    """Loss and gradients of a network for batches of three rows, with packed and with padded ones."""

    def __init__(self, model: GLMForCausalLM, seeds: np.ndarray | None = None) -> None:
        self.seeds = [] if seeds is None else [Tensor(seeds)]
        self.packed, self.padded = (self.compiled(model, packed) for packed in (True, False))

    def compiled(self, model: GLMForCausalLM, packed: bool) -> Callable[..., tuple]:
        network = TrainingNetwork(model.network, SIZES["seq_length"])
        network.set_train(True)
        assert network.pack_rows is not None
        if not packed:
            network.pack_rows = None
        network.set_inputs(*[Tensor(shape=[3, None], dtype=ms.int32)] * len(COLUMNS), *self.seeds)
        weights = ms.ParameterTuple(network.trainable_params())
        return ms.jit(ops.value_and_grad(network, None, weights, has_aux=True))

    def check(self, rows: dict[str, np.ndarray]) -> None:
        inputs = [Tensor(rows[name]) for name in COLUMNS] + self.seeds
        (loss, count), gradients = self.packed(*inputs)
        (expected, expected_count), expected_gradients = self.padded(*inputs)
        assert float(count) == float(expected_count) == np.count_nonzero(rows["labels"][:, 1:] != -100)
        np.testing.assert_allclose(float(loss), float(expected), **LOSS)
        for mine, other in zip(gradients, expected_gradients):
            mine, other = mine.asnumpy(), other.asnumpy()
            np.testing.assert_allclose(mine, other, atol=2e-6 * max(1.0, np.abs(other).max()), rtol=GRAD_NORM["rtol"])


def model_of(**values: object) -> GLMForCausalLM:
    ms.set_seed(3)
    return GLMForCausalLM(GLMConfig(**{**SIZES, **values}))  # type: ignore[arg-type]


def test_all_weights() -> None:
    compiled = Compiled(model_of())
    batches = {
        "padding on the right": rows_of([[5], [9], [3]], 9),
        "padding on the left": rows_of([[0, 4, 5], [0, 0, 9], [0, 7, 2]], 9),
        "hidden tokens between": rows_of([[3, 2, 4], [9], [1, 1, 1, 1, 1]], 9),
        "no padding": rows_of([[6], [6], [6]], 6),
        "more tokens than a block of attention": rows_of([[150], [40], [131]], 150),
        "a row of padding alone": rows_of([[0], [4], [3]], 5),
        "nothing but padding": rows_of([[0], [0], [0]], 4),
        "one token": rows_of([[1], [1], [1]], 1),
    }
    # A padding token that predicts a label sees its whole row.
    rows = batches["labels behind padding"] = rows_of([[0, 4, 5], [7], [0, 2, 3]], 9)
    rows["labels"][0, [1, 4]] = rows["input_ids"][0, [1, 4]]
    rows["labels"][1, 8] = rows["input_ids"][1, 8]
    for rows in batches.values():
        compiled.check(rows)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_adapter_and_dropout(dropout: float) -> None:
    """Each token has the dropout masks of its place in its row."""
    model = model_of(hidden_dropout=dropout)
    adapter = model.add_adapter(LoraConfig(2, 4.0, dropout, ".*(query_key_value|dense_4h_to_h)"))
    rng = np.random.default_rng(1)
    for parameter in adapter.parameters():
        parameter.set_data(Tensor(rng.normal(0, 0.3, parameter.shape).astype(np.float32)))
    compiled = Compiled(model, np.array([5, -7, 2**31 - 1], np.int32))
    compiled.check(rows_of([[0, 4, 5], [8], [3, 2, 2]], 9))


def test_what_needs_padded_rows_gets_them() -> None:
    drops, prefixed, updated = model_of(attention_dropout=0.2), model_of(), model_of()
    prefixed.add_adapter(PrefixConfig(pre_seq_len=2))
    updated.add_adapter(LoraConfig(2, 4.0, 0.1, ".*output_layer"))
    for model in (drops, prefixed, updated):
        assert TrainingNetwork(model.network, 9).pack_rows is None
