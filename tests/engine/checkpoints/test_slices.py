"""What the cards of a sharded run save, merged: an adapter or weights as a run on one card leaves them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_helpers import load_script
from mindspore import Parameter, Tensor
from reference import FOLDER, fresh_golden_model, golden_weights
from safetensors.numpy import load_file
from strategy_helpers import Cut, as_stored, load, part_of, strategy_bytes

from glm_ms import GLMConfig, GLMForCausalLM, load_pretrained
from glm_ms.convert.cluster.resharding import Resharding, plan_resharding
from glm_ms.convert.names import INV_FREQ, expected_shapes, split_joint
from glm_ms.convert.tensor_file import slice_metadata
from glm_ms.engine.checkpoints.manifest import write_manifest
from glm_ms.engine.checkpoints.slices import SliceState, rank_folder
from glm_ms.peft.adapter import AdapterConfig, read_adapter
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import step_folder

CASE, BASE, RANKS = "glm3_tiny", "/where/the/base/was", 4
ADAPTERS = {
    "lora": LoraConfig(4, 32.0, 0.1, ".*(query_key_value|dense|dense_4h_to_h)"),
    "ptuning2": PrefixConfig(6, True, 40, 0.1),
}


def cut_of(name: str, array: np.ndarray) -> Cut:
    """Two data parallel by two model parallel; adapters are whole but for A beside a layer cut by columns."""
    by_columns = ".self_attention.dense." in name or ".dense_4h_to_h." in name
    if "lora_" in name or "prefix_encoder" in name:
        axis = 1 if by_columns and "lora_A" in name else None
    elif by_columns:
        axis = 1 if array.ndim == 2 else None
    else:
        axis = None if "layernorm" in name else 0
    return Cut([2, 2], [0 if place == axis else -1 for place in range(array.ndim)])


def adapter_with_values(config: AdapterConfig) -> GLMForCausalLM:
    """A model with an adapter that does something."""
    model = fresh_golden_model(CASE)
    rng = np.random.default_rng(3)
    for parameter in model.add_adapter(config, 1).parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32) * 0.1))
    return model


def state_of(
    arrays: Mapping[str, np.ndarray], rank: int, config: GLMConfig, adapter: AdapterConfig | None
) -> SliceState:
    """What a card holds of weights and their first moments, as the engine has them when it saves."""

    def parameters(prefix: str) -> Iterator[Parameter]:
        for name, array in arrays.items():
            values = np.ascontiguousarray(part_of(array, cut_of(name, array), rank))
            yield Parameter(Tensor(values * (0.5 if prefix else 1)), name=prefix + name)

    weights = list(parameters(""))
    network = SimpleNamespace(config=config, trainable_params=lambda: weights, get_parameters=lambda: weights)
    state = [*parameters("adam_m."), Parameter(Tensor(np.array([2.0], np.float32)), name="global_step")]
    step = SimpleNamespace(optimizer=SimpleNamespace(get_parameters=lambda: [*weights, *state]), loss_scale=None)
    return SliceState(step, network, set(arrays), slice_metadata(rank, RANKS), adapter, BASE)


def save_run(folder: Path, arrays: Mapping[str, np.ndarray], adapter: AdapterConfig | None) -> Path:
    """The output folder of a sharded run of four cards."""
    config = GLMConfig.from_pretrained(FOLDER / CASE)
    for rank in range(RANKS):
        inside = step_folder(rank_folder(folder, rank), 2)
        inside.mkdir(parents=True)
        state_of(arrays, rank, config, adapter).write(inside)
        write_manifest(inside, 2, (0, 8), {"seed": 7, "num_ranks": RANKS}, None, "CPU")
    base = {part: value for item in golden_weights(CASE).items() for part, value in split_joint(*item, config)}
    cuts = {name: cut_of(name, array) for name, array in {**base, **arrays}.items()}
    cuts.update({f"adam_m.{name}": cuts[name] for name in arrays})
    (folder / "strategy").mkdir()
    for rank in range(RANKS):
        (folder / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(strategy_bytes(cuts))
    return folder


def plan(source: Path, output: Path, say=lambda line: None, **options: object) -> Resharding:
    given = {"prefix": "glm_", "src_strategy": source, **options}
    return plan_resharding(source, output, say=say, **given)


@pytest.fixture(params=ADAPTERS)
def adapter_run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """(output folder of a sharded run, the adapter as one card saves it)."""
    model = adapter_with_values(ADAPTERS[request.param])
    alone = tmp_path / "alone"
    alone.mkdir()
    model.adapter.save(alone, BASE)
    arrays = {parameter.name: parameter.asnumpy() for parameter in model.adapter.parameters()}
    return save_run(tmp_path / "run", arrays, ADAPTERS[request.param]), alone


@pytest.fixture
def weights_run(tmp_path: Path) -> Path:
    config = GLMConfig.from_pretrained(FOLDER / CASE)
    arrays = {part: value for item in golden_weights(CASE).items() for part, value in split_joint(*item, config)}
    return save_run(tmp_path / "run", arrays, None)


def test_slices_have_the_files_of_any_run(adapter_run: tuple[Path, Path]) -> None:
    run, alone = adapter_run
    inside = step_folder(rank_folder(run, 1), 2)
    names = {file.name for file in alone.iterdir()} | {"optimizer.safetensors", "manifest.json"}
    assert {file.name for file in inside.iterdir()} == names


def test_merged_adapter_is_that_of_one_card(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, alone = adapter_run
    plan(run, tmp_path / "merged").run()
    files = sorted(file.name for file in alone.iterdir())
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == sorted([*files, "optimizer.safetensors"])
    for name in files:
        left, right = tmp_path / "merged" / name, alone / name
        if name.endswith(".json"):
            assert left.read_bytes() == right.read_bytes()
        else:
            assert load(left) == load(right)
    moments = load_file(tmp_path / "merged" / "optimizer.safetensors")
    prefix = "base_model.model."
    trained = {name.replace(prefix, ""): value for file in alone.glob("*.safetensors")
               for name, value in load_file(file).items()}  # fmt: skip
    expected = {
        **{f"adam_m.{name}": value * 0.5 for name, value in trained.items()},
        "global_step": np.float32([2]),
    }
    assert moments.keys() == expected.keys()
    assert all(np.array_equal(moments[name], value) for name, value in expected.items())
    stored, known = read_adapter(tmp_path / "merged"), read_adapter(alone)
    assert stored.config == known.config
    assert "tensors" in str(fresh_golden_model(CASE).load_adapter(stored))
    plan(run, tmp_path / "weights", weights_only=True).run()
    assert sorted(file.name for file in (tmp_path / "weights").iterdir()) == files
    if isinstance(stored.config, LoraConfig):
        tool, base = load_script("tools/merge_lora.py"), FOLDER / CASE
        for adapter in ("merged", "alone"):
            line = ["--base", base, "--adapter", tmp_path / adapter, "--output", tmp_path / f"{adapter}.ckpt"]
            assert tool.main(list(map(str, line))) == 0
        assert (tmp_path / "merged.ckpt").read_bytes() == (tmp_path / "alone.ckpt").read_bytes()


def test_adapter_for_another_cluster_and_back(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, alone = adapter_run
    weights = next(alone.glob("*.safetensors"))
    names = [name.replace("base_model.model.", "") for name in load(weights)]
    arrays = {name: value for name, value in zip(names, load_file(weights).values())}
    cuts = {name: Cut([2], [-1] * array.ndim) for name, array in arrays.items()}
    first = max(arrays, key=lambda name: arrays[name].shape[0] % 2 == 0)
    cuts[first] = Cut([2], [0, *[-1] * (arrays[first].ndim - 1)])
    (tmp_path / "two.ckpt").write_bytes(strategy_bytes({**cuts, "base.weight": Cut([2], [0])}))
    plan(run, tmp_path / "merged").run()
    for source, options in ((run, {}), (tmp_path / "merged", {"src_strategy": None})):
        output = tmp_path / f"two_of_{source.name}"
        plan(source, output, dst_strategy=tmp_path / "two.ckpt", **options).run()
        for rank in range(2):
            held = load(output / f"rank_{rank}" / f"glm_{rank}.safetensors")
            expected = as_stored({name: part_of(arrays[name], cuts[name], rank) for name in names})
            assert {name: held[name] for name in names} == expected
        plan(output, tmp_path / f"again_{source.name}", src_strategy=tmp_path / "two.ckpt").run()
        assert load(tmp_path / f"again_{source.name}" / weights.name) == load(weights)
    shutil.move(tmp_path / "two_of_run" / "rank_0", tmp_path / "aside")
    shutil.move(tmp_path / "two_of_run" / "rank_1", tmp_path / "two_of_run" / "rank_0")
    shutil.move(tmp_path / "aside", tmp_path / "two_of_run" / "rank_1")
    with pytest.raises(CheckpointError, match="swapped"):
        plan(tmp_path / "two_of_run", tmp_path / "no", src_strategy=tmp_path / "two.ckpt")


def test_adapter_that_cannot_be_merged(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, alone = adapter_run
    with pytest.raises(CheckpointError, match=r"--format ckpt: .* has an adapter, which is merged into"):
        plan(run, tmp_path / "merged", kind="ckpt")
    name = next(alone.glob("*.json")).name
    config = step_folder(rank_folder(run, 2), 2) / name
    text = config.read_text().replace(BASE, "/elsewhere")
    config.write_text(text)
    plan(run, tmp_path / "merged").run()  # every server may have the base in another place
    key = "lora_alpha" if name == "adapter_config.json" else "pre_seq_len"
    config.write_text(text.replace(f'"{key}": ', f'"{key}": 1'))
    with pytest.raises(CheckpointError, match=rf"rank_2/.*{name}: differs from .*rank_0.* in {key}; .*different runs"):
        plan(run, tmp_path / "no")
    config.write_text(text[:40])
    with pytest.raises(CheckpointError, match=rf"rank_2/.*{name}:\d+: not valid JSON"):
        plan(run, tmp_path / "no")
    said: list[str] = []
    for rank in range(RANKS):
        (step_folder(rank_folder(run, rank), 2) / name).unlink()
    plan(run, tmp_path / "tensors", said.append).run()
    assert any(f"an adapter without {name}: only its tensors" in line for line in said)
    assert (tmp_path / "tensors" / "rank_0" / "glm_0.safetensors").is_file()


def test_merged_weights_need_no_config(weights_run: Path, tmp_path: Path) -> None:
    plan(weights_run, tmp_path / "merged").run()
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == ["config.json", "rank_0"]
    tool = load_script("tools/convert_weight.py")
    for source in ("merged", "merged/rank_0"):
        output = tmp_path / source.replace("/", "_of_")
        line = ["--input", tmp_path / source, "--output", f"{output}_hf"]
        assert tool.main(list(map(str, line))) == 0
        ours, golden = (
            load_file(f"{output}_hf/model.safetensors"),
            load_file(FOLDER / CASE / "model.safetensors"),
        )
        assert ours.keys() | {INV_FREQ} == golden.keys() | {INV_FREQ}
        assert all(ours[name].tobytes() == golden[name].tobytes() for name in golden.keys() - {INV_FREQ})
        assert GLMConfig.from_pretrained(f"{output}_hf") == GLMConfig.from_pretrained(FOLDER / CASE)
    prompt = np.arange(5, 17)[None]
    found, known = load_pretrained(tmp_path / "merged")(prompt), load_pretrained(FOLDER / CASE)(prompt)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(known))
    assert len(expected_shapes(GLMConfig.from_pretrained(FOLDER / CASE))) == len(golden_weights(CASE))


@pytest.mark.parametrize("file", ["", "model.safetensors", "optimizer.safetensors"])
def test_swapped_slices_are_refused(weights_run: Path, tmp_path: Path, file: str) -> None:
    """Without data parallelism no copy would tell; the files themselves do."""
    one, two = (step_folder(rank_folder(weights_run, rank), 2) / file for rank in (1, 2))
    shutil.move(one, tmp_path / "aside")
    shutil.move(two, one)
    shutil.move(tmp_path / "aside", two)
    with pytest.raises(CheckpointError, match=r"rank_1/.*the slice of rank 2 of 4, but it is in rank_1 of 4"):
        plan(weights_run, tmp_path / "no", verify=False)
    config = GLMConfig.from_pretrained(FOLDER / CASE)
    arrays = {part: value for item in golden_weights(CASE).items() for part, value in split_joint(*item, config)}
    with pytest.raises(CheckpointError, match=r"header says rank 2, but the file is in the place of rank 1"):
        state_of(arrays, 1, config, None).restore(step_folder(rank_folder(weights_run, 1), 2))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_noticed(weights_run: Path, tmp_path: Path, name: str) -> None:
    """Where all copies are alike, or there is one, the manifest alone can tell."""
    for rank in (0, 2):  # all cards of the data parallel group alike
        path = step_folder(rank_folder(weights_run, rank), 2) / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"rank_0/.*{name}: damaged or of another checkpoint: its SHA-256"):
        plan(weights_run, tmp_path / "merged").run()
    assert not (tmp_path / "merged").exists()
    plan(weights_run, tmp_path / "merged", verify=False).run()
    if name == "optimizer.safetensors":  # which is not read then
        plan(weights_run, tmp_path / "weights", weights_only=True).run()


def test_slices_of_two_runs_are_refused(weights_run: Path, tmp_path: Path) -> None:
    inside = step_folder(rank_folder(weights_run, 3), 2)
    manifest = inside / "manifest.json"
    manifest.unlink()
    write_manifest(inside, 2, (0, 8), {"seed": 8, "num_ranks": RANKS}, None, "CPU")
    with pytest.raises(CheckpointError, match=r"rank_3/.*manifest.json: differs from .*rank_0/.* in seed; the"):
        plan(weights_run, tmp_path / "no", verify=False)
    manifest.write_text("{}")
    with pytest.raises(CheckpointError, match=r"rank_3/.*manifest.json: damaged"):
        plan(weights_run, tmp_path / "no")


def test_files_put_beside_a_manifest_are_refused(weights_run: Path, tmp_path: Path) -> None:
    inside = step_folder(rank_folder(weights_run, 1), 2)
    (inside / "model.safetensors").rename(inside / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors: is not in manifest.json beside it"):
        plan(weights_run, tmp_path / "no").run()


def test_slices_of_a_larger_run_and_single_ones(weights_run: Path, tmp_path: Path) -> None:
    halves = {name: Cut([2], [-1] * array.ndim) for name, array in golden_weights(CASE).items()}
    (tmp_path / "two.ckpt").write_bytes(strategy_bytes(halves))
    for rank in (2, 3):
        shutil.rmtree(weights_run / "slices" / f"rank_{rank}")
    with pytest.raises(CheckpointError, match=r"the slice of rank 0 of 4, but it is in rank_0 of 2 ranks"):
        plan(weights_run, tmp_path / "no", src_strategy=tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match=r"the slice of rank 1 of 4, not a whole checkpoint; give the folder"):
        plan(weights_run / "slices" / "rank_1", tmp_path / "no", src_strategy=None, dst_strategy=tmp_path / "two.ckpt")


def test_slices_are_no_checkpoint_to_load(weights_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run: is the output of a sharded run, .* --dst_ckpt_dir .*run_merged"):
        load_pretrained(weights_run)
    with pytest.raises(CheckpointError, match=r"It is the slice of rank 1 of 4: merge all slices"):
        load_pretrained(weights_run / "slices" / "rank_1")


def test_slices_restore(weights_run: Path) -> None:
    config = GLMConfig.from_pretrained(FOLDER / CASE)
    arrays = {part: value for item in golden_weights(CASE).items() for part, value in split_joint(*item, config)}
    state = state_of({name: array * 0 for name, array in arrays.items()}, 3, config, None)
    state.restore(step_folder(rank_folder(weights_run, 3), 2))
    for parameter in state._weights:
        expected = part_of(arrays[parameter.name], cut_of(parameter.name, arrays[parameter.name]), 3)
        np.testing.assert_array_equal(parameter.asnumpy(), expected, err_msg=parameter.name)
