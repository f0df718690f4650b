"""Adapters of rows: the update of one layer, and the adapters that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from reference import fresh_golden_model, golden_model, graph_mode

from glm_ms.peft.adapter import AdapterError, StoredAdapter, read_adapter
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig, PrefixEncoder, keys_and_values
from glm_ms.peft.rows import NO_ADAPTER, AdapterBounds, RowAdapters, RowUpdate, bounds_for
from tests.peft.test_adapter import LORA, PREFIX

QKV = "transformer.encoder.layers.{}.self_attention.query_key_value"
LENGTH = 8  # of the prefix in PREFIX


def lora(rank: int, modules: Sequence[str], seed: int = 0, size: float = 0.2, alpha: float = 16.0) -> StoredAdapter:
    """A LoRA adapter of glm2_tiny with random matrices."""
    linears, rng = golden_model("glm2_tiny").network.linears(), np.random.default_rng(seed)
    tensors = {}
    for name in modules:
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, size, (rank, linears[name].in_features)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, size, (linears[name].out_features, rank)).astype(np.float32)
    return StoredAdapter(Path(f"lora-{seed}"), LoraConfig(rank, alpha, 0.0, tuple(modules)), tensors)


class Projection(nn.Cell):
    """The sizes of a linear layer."""

    in_features, out_features, dtype = 24, 40, ms.float32


def test_every_row_gets_its_own_update() -> None:
    """Also if B rows have several tokens, or come without an axis for the batch."""
    rng = np.random.default_rng(0)
    update = RowUpdate(Projection(), AdapterBounds(max_adapters=3, max_rank=6))
    a, b = rng.normal(size=(4, 6, 24)).astype(np.float32), rng.normal(size=(4, 6, 40)).astype(np.float32)
    a[NO_ADAPTER] = b[NO_ADAPTER] = 0
    update.a.set_data(Tensor(a))
    update.b.set_data(Tensor(b))
    x, numbers = rng.normal(size=(5, 3, 24)).astype(np.float32), np.array([2, 0, 3, 2, 1], np.int32)
    with graph_mode():
        found = update(Tensor(x), Tensor(numbers)).asnumpy()
        flat = update(Tensor(x.reshape(15, 24)), Tensor(numbers)).asnumpy()
        assert update(Tensor(x), None).asnumpy() == 0
    for row, number in enumerate(numbers):
        np.testing.assert_allclose(found[row], x[row] @ a[number].T @ b[number], rtol=1e-4, atol=1e-5)
    assert not found[1].any()
    np.testing.assert_array_equal(flat.reshape(found.shape), found)


@pytest.fixture
def rows() -> RowAdapters:
    """Room for two adapters on glm2_tiny, in all layers."""
    return RowAdapters(fresh_golden_model("glm2_tiny").network, AdapterBounds(2, 8, max_prefix=8))


def test_adapters_come_and_go(rows: RowAdapters) -> None:
    small, large = lora(2, [QKV.format(1)], 1), lora(8, list(rows.network.linears()), 2)
    places = {name: (update.a.data_ptr(), update.b.data_ptr()) for name, update in rows._updates.items()}
    first, second = rows.load("small", small), rows.load("large", large)
    assert rows.names() == ["small", "large"]
    assert {first.number, second.number} == {1, 2}
    update = rows._updates[QKV.format(1)]
    tensors = small.tensors
    np.testing.assert_array_equal(update.a.asnumpy()[first.number, :2], tensors[f"{QKV.format(1)}.lora_A.weight"])
    scaled = tensors[f"{QKV.format(1)}.lora_B.weight"].T * np.float32(16 / 2)
    np.testing.assert_array_equal(update.b.asnumpy()[first.number, :2], scaled)
    assert not update.a.asnumpy()[first.number, 2:].any()
    assert not update.a.asnumpy()[NO_ADAPTER].any()
    assert not rows._updates[QKV.format(0)].b.asnumpy()[first.number].any()
    assert rows._updates[QKV.format(0)].b.asnumpy()[second.number].any()
    with pytest.raises(AdapterError, match="no room for another adapter: --max-adapters is 2; unload one"):
        rows.load("third", small)
    assert rows.unload("large") is second
    assert second.gone
    third = rows.load("third", small)
    assert third.number == second.number
    assert not rows._updates[QKV.format(0)].b.asnumpy()[third.number].any(), "the matrices of the last one are gone"
    assert places == {name: (update.a.data_ptr(), update.b.data_ptr()) for name, update in rows._updates.items()}


def test_rows_keep_an_adapter_that_is_unloaded(rows: RowAdapters) -> None:
    stored = lora(4, [QKV.format(0)])
    rows.load("one", stored)
    one = rows.find("one")
    one.rows += 2
    rows.load("two", stored)
    rows.unload("one")
    with pytest.raises(ValueError, match=r"adapter 'one': not loaded"):
        rows.find("one")
    with pytest.raises(AdapterError, match=r"no room for another adapter.*1 unloaded ones still answer"):
        rows.load("one", stored)
    rows.leave(one)
    assert not one.gone
    assert [adapter.name for adapter in rows.present()] == ["two", "one"]
    rows.leave(one)
    assert one.gone
    again = rows.load("one", stored)
    assert (again.number, again.name) == (one.number, one.name)
    assert again.serial != one.serial
    with pytest.raises(AdapterError, match="'one': is loaded already, from lora-0"):
        rows.load("one", stored)


def spoilt(**tensors: np.ndarray | None) -> StoredAdapter:
    """A LoRA adapter of one layer with other tensors; their names end in `a` or `b`."""
    stored, name = lora(4, [QKV.format(0)]), QKV.format(0)
    for letter, value in tensors.items():
        stored.tensors[f"{name}.lora_{letter.upper()}.weight"] = value
    return stored


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (lora(9, [QKV.format(0)]), "has rank 9, the largest one here is 8; start with --max-lora-rank 9"),
        (spoilt(b=np.zeros((96, 4), np.float32)), "changes nothing|shape"),
        (spoilt(a=np.full((4, 64), np.nan, np.float32)), "contains NaN or infinity"),
        (spoilt(a=np.ones((4, 63), np.float32)), r"shape \[4, 63\], this network needs \[4, 64\]"),
        (lora(4, [QKV.format(0)], alpha=9e29, size=1e10), "times lora_alpha / r is too large; check lora_alpha"),
    ],
)
def test_what_does_not_fit_changes_nothing(rows: RowAdapters, stored: StoredAdapter, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason) as error:
        rows.load("some", stored)
    assert str(stored.path) in str(error.value)
    assert rows.names() == []
    assert not any(table.asnumpy().any() for update in rows._updates.values() for table in (update.a, update.b))


def test_adapters_for_other_bases_and_of_other_types(rows: RowAdapters, tmp_path: Path) -> None:
    stored = lora(4, [QKV.format(0)])
    moved = {name.replace("layers.0", "layers.7"): value for name, value in stored.tensors.items()}
    with pytest.raises(AdapterError, match=r"made for another base: this network has no linear layers .*layers\.7"):
        rows.load("x", StoredAdapter(stored.path, stored.config, moved))

    class OtherConfig:
        kind, dropout = "shift", 0.0

    with pytest.raises(AdapterError, match="adapters of type shift cannot be served beside others, only lora, ptun"):
        rows.load("x", StoredAdapter(Path("other"), OtherConfig(), {}))
    folder = tmp_path / "dora"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        text = (LORA / name).read_bytes()
        (folder / name).write_bytes(text.replace(b'"use_dora": false', b'"use_dora": true'))
    with pytest.raises(AdapterError, match="use_dora = True: not supported"):
        read_adapter(folder)


def test_bounds() -> None:
    network = fresh_golden_model("glm2_tiny").network
    stored = lora(4, [QKV.format(1)])
    with pytest.raises(AdapterError, match=r"modules: .*query_key_valu: no linear layer .* did you mean"):
        RowAdapters(network, AdapterBounds(1, 4, ("transformer.encoder.layers.0.self_attention.query_key_valu",)))
    assert bounds_for([stored]) == AdapterBounds(1, 4, (QKV.format(1),))
    assert bounds_for([stored, read_adapter(PREFIX)], 3) == AdapterBounds(3, 16, None, LENGTH)
    assert bounds_for([read_adapter(PREFIX)]) == AdapterBounds(1, 1, (), LENGTH)
    assert bounds_for([stored], 1, 9, 7) == AdapterBounds(1, 9, (QKV.format(1),), 7)
    assert bounds_for([]) == AdapterBounds(0, 1, ())
    rows = RowAdapters(network, bounds_for([stored]))
    assert [name for name, linear in network.linears().items() if linear.lora is not None] == [QKV.format(1)]
    with pytest.raises(AdapterError, match=r"updates transformer.*dense_h_to_4h, and this network serves updates of "):
        rows.load("x", lora(4, ["transformer.encoder.layers.0.mlp.dense_h_to_4h"]))
    with pytest.raises(AdapterError, match=r"a prefix of .* positions, the longest one here has 0"):
        rows.load("x", read_adapter(PREFIX))
    with pytest.raises(AdapterError, match="has an adapter of its own"):
        RowAdapters(network, AdapterBounds(1))
    assert RowAdapters(network, AdapterBounds()).names() == []


def test_a_layer_with_idle_tables_is_the_same() -> None:
    """Where nothing says which adapters the rows have, as in the other graphs of the network."""
    linear = fresh_golden_model("glm2_tiny").network.linears()[QKV.format(0)]
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, linear.in_features)).astype(np.float32))
    before = linear.construct(x).asnumpy()
    linear.lora = RowUpdate(linear, AdapterBounds(2))
    np.testing.assert_array_equal(linear.construct(x).asnumpy(), before)


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_by_numpy_is_that_of_the_encoder(projected: bool) -> None:
    network = golden_model("glm3_tiny").network
    encoder = PrefixEncoder(network, PrefixConfig(5, projected, 24, 0.0), np.random.default_rng(1))
    tensors = {p.name: p.asnumpy() for p in encoder.get_parameters()}
    found = keys_and_values(tensors, network.config)
    with graph_mode():
        expected = [part.asnumpy()[0] for layer in encoder(1, None) for part in layer]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-6)
