"""The weights of a GLM network, cut for four ranks, merged, and used as any other checkpoint."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from reference import FOLDER, golden_weights
from safetensors.numpy import load_file
from strategy_helpers import Cut, save_ranks, strategy_bytes

from glm_ms import GLMConfig
from glm_ms.convert.cluster.resharding import plan_resharding
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.names import INV_FREQ, split_joint
from glm_ms.convert.reader import check_names_and_shapes, load_parameters, open_checkpoint
from glm_ms.storage.run_folder import resolve_checkpoint

CASE = "glm3_tiny"
COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
REPLICATED = ("layernorm.weight",)


def cut_of(name: str, shape: tuple[int, ...]) -> Cut:
    """Tensor parallel over two of four ranks, state also cut by the parallel optimizer."""
    if name.endswith(REPLICATED):
        cut = Cut([2, 2], [-1])
    elif name.endswith(COLUMNS):
        cut = Cut([2, 2], [-1, 0])
    else:
        cut = Cut([2, 2], [0, -1][: len(shape)])
    return cut._replace(step=1 if cut.tensor_map == [-1] else 2, size=-1) if name.startswith("adam") else cut


@pytest.fixture(params=["joint", "parts"])
def merged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder that the transformation made of a training checkpoint of four ranks, joint weights whole or in parts."""
    weights = golden_weights(CASE)
    if request.param == "parts":
        config = GLMConfig.from_pretrained(FOLDER / CASE)
        weights = dict(part for item in weights.items() for part in split_joint(*item, config))
    rng = np.random.default_rng(0)
    state = {f"adam_m.{name}": rng.standard_normal(array.shape).astype("f4") for name, array in weights.items()}
    arrays = {**weights, **state, "global_step": np.array(12, np.int32)}
    cuts = {name: cut_of(name, array.shape) for name, array in arrays.items() if array.ndim}
    save_ranks(tmp_path / "slices", arrays, cuts, 4)
    (tmp_path / "strategy.ckpt").write_bytes(strategy_bytes(cuts))
    plan_resharding(
        tmp_path / "slices", tmp_path / "merged", prefix="glm3_", src_strategy=tmp_path / "strategy.ckpt", say=print
    ).run()
    return tmp_path / "merged"


@pytest.mark.parametrize("named", ["folder", "file"])
def test_merged_checkpoint_is_the_network(merged: Path, named: str) -> None:
    path = resolve_checkpoint(merged if named == "folder" else merged / "rank_0" / "glm3_0.ckpt")
    config = GLMConfig.from_pretrained(FOLDER / CASE)
    with open_checkpoint(path) as reader:
        check_names_and_shapes(config, reader)
        found = dict(load_parameters(reader, config, "float32"))
        assert "global_step" in reader.ignored
        assert len(reader.ignored) >= len(found) + 1  # the moments and the counter
    weights = golden_weights(CASE)
    assert found.keys() == weights.keys()
    assert all(found[name].tobytes() == weights[name].tobytes() for name in weights)


def test_merged_checkpoint_exports_to_hugging_face(merged: Path, tmp_path: Path) -> None:
    plan_conversion(merged / "rank_0" / "glm3_0.ckpt", tmp_path / "hf", config=FOLDER / CASE, target="hf").run()
    ours, golden = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        load_file(FOLDER / CASE / "model.safetensors"),
    )
    for name in (set(golden) | set(ours)) - {INV_FREQ}:
        assert ours[name].dtype == golden[name].dtype
        assert ours[name].tobytes() == golden[name].tobytes(), name


def test_mindspore_reads_the_merged_checkpoint(merged: Path) -> None:
    found = ms.load_checkpoint(str(merged / "rank_0" / "glm3_0.ckpt"))
    weights = {name: array for name, array in golden_weights(CASE).items() if name in found}
    assert len(weights) > 10
    assert found["global_step"].shape == ()
    assert int(found["global_step"].asnumpy()) == 12
    assert all(found[name].asnumpy().tobytes() == array.tobytes() for name, array in weights.items())
