"""Merging, cutting and re-cutting checkpoints, bit for bit; and what is refused."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from strategy_helpers import (
    GOLDEN,
    Cut,
    as_stored,
    load,
    needs_golden,
    part_of,
    random_arrays,
    save,
    save_ranks,
    strategy_bytes,
)

from glm_ms.convert.cluster.placement import Placement
from glm_ms.convert.cluster.resharding import plan_resharding
from glm_ms.convert.reader import open_checkpoint
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import describe_files, write_manifest_values

CASES = ("tp", "tp_opt", "pp", "tp2")
SHAPES = {"embed": (16, 6), "layer.w": (8, 12), "norm": (8,), "adam_m.layer.w": (8, 12), "adam_m.norm": (8,)}
CUTS4 = {
    "embed": Cut([2, 2], [0, -1]),
    "layer.w": Cut([2, 2], [-1, 0]),
    "norm": Cut([2, 2], [-1]),
    "adam_m.layer.w": Cut([2, 2], [-1, 0], 2, -1),
    "adam_m.norm": Cut([2, 2], [-1], 1, -1),
}
CUTS2 = {
    "embed": Cut([2], [-1, 0]),
    "layer.w": Cut([2], [0, -1]),
    "norm": Cut([2], [-1]),
    "adam_m.layer.w": Cut([2], [0, -1]),
    "adam_m.norm": Cut([2], [-1], 1, -1),
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return {
        **random_arrays(SHAPES),
        "global_step": np.array(7, np.int32),
        "scale": np.array([2.0], np.float16),
    }


@pytest.fixture
def four(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Folder with `slices` of four ranks and their strategy s4.ckpt; also s2.ckpt of another cluster."""
    save_ranks(tmp_path / "slices", arrays, CUTS4, 4)
    (tmp_path / "s4.ckpt").write_bytes(strategy_bytes(CUTS4))
    (tmp_path / "s2.ckpt").write_bytes(strategy_bytes(CUTS2))
    return tmp_path


def transform(source: Path, output: Path, src: Path | None, dst: Path | None, **options: object) -> list[str]:
    said: list[str] = []
    plan_resharding(source, output, prefix="net", src_strategy=src, dst_strategy=dst, say=said.append, **options).run()
    return said


def merge_error(four: Path, **options: object) -> str:
    """The error of a merge that must fail, and leave nothing."""
    with pytest.raises(CheckpointError) as caught:
        transform(four / "slices", four / "out", four / "s4.ckpt", None, **options)
    assert not [item for item in four.iterdir() if "out" in item.name]
    return str(caught.value)


def rewrite(folder: Path, rank: int, **changes: np.ndarray | None) -> None:
    """Changes tensors of a rank; None removes one."""
    path = folder / "slices" / f"rank_{rank}" / "net.ckpt"
    with open_raw(path) as tensors:
        tensors.update({name.replace("__", "."): array for name, array in changes.items()})
        save(path, {name: array for name, array in tensors.items() if array is not None})


class open_raw:  # noqa: N801  (used as a function)
    """The arrays of a file, as a dictionary."""

    def __init__(self, path: Path) -> None:
        self.tensors = {
            name: np.frombuffer(content, dtype).reshape(shape).copy()
            for name, (dtype, shape, content) in load(path).items()
        }

    def __enter__(self) -> dict[str, np.ndarray]:
        return self.tensors

    def __exit__(self, *error: object) -> None:
        return None


def test_merge(four: Path, arrays: dict[str, np.ndarray]) -> None:
    assert transform(four / "slices", four / "out", four / "s4.ckpt", None) == []
    assert load(four / "out" / "rank_0" / "net0.ckpt") == as_stored(arrays)
    assert [item.name for item in (four / "out").iterdir()] == ["rank_0"]


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_cut_and_cut_again(four: Path, arrays: dict[str, np.ndarray], kind: str) -> None:
    said = transform(four / "slices", four / "two", four / "s4.ckpt", four / "s2.ckpt", kind=kind)
    for rank in range(2):
        parts = {name: part_of(array, CUTS2[name], rank) if name in CUTS2 else array for name, array in arrays.items()}
        assert load(four / "two" / f"rank_{rank}" / f"net{rank}.{kind}") == as_stored(parts)
    assert len(said) == 1
    assert "2 tensors that" in said[0]
    transform(four / "two", four / "again", four / "s2.ckpt", four / "s4.ckpt", kind="ckpt")
    for rank in range(4):
        back = load(four / "again" / f"rank_{rank}" / f"net{rank}.ckpt")
        assert back == load(four / "slices" / f"rank_{rank}" / "net.ckpt")


def test_pipeline_stages(tmp_path: Path) -> None:
    arrays = random_arrays({"first": (8, 4), "last": (4, 8), "shared": (8, 2)})
    stages = [
        {"first": Cut([2], [0, -1]), "shared": Cut([2], [0, -1])},
        {"last": Cut([2], [-1, 0]), "shared": Cut([2], [0, -1])},
    ]
    for rank in range(4):
        stage, local = divmod(rank, 2)
        cuts = stages[stage]
        parts = {name: part_of(array, cuts[name], local) for name, array in arrays.items() if name in cuts}
        if rank == 2:
            parts["first"] = arrays["first"] * 0  # MindSpore may leave what the stage does not use as it began
        save(tmp_path / "slices" / f"rank_{rank}" / f"net_rank_{rank}-1_5.ckpt", parts)
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"strategy_rank_{rank}.ckpt").write_bytes(strategy_bytes(cuts, stage=stage))
    said = transform(tmp_path / "slices", tmp_path / "whole", tmp_path / "s", None)
    assert load(tmp_path / "whole" / "rank_0" / "net0.ckpt") == as_stored(arrays)
    assert any("shared by several stages" in line for line in said)
    assert any("ignoring 1 tensors" in line for line in said)
    transform(tmp_path / "whole", tmp_path / "cut", None, tmp_path / "s")
    for rank in range(4):
        cuts = stages[rank // 2]
        parts = {name: part_of(arrays[name], cuts[name], rank % 2) for name in arrays if name in cuts}
        assert load(tmp_path / "cut" / f"rank_{rank}" / f"net{rank}.ckpt") == as_stored(parts)


def test_newest_common_step(four: Path, arrays: dict[str, np.ndarray]) -> None:
    for step, ranks in (("1_20", 4), ("2_3", 4), ("2_9", 3)):
        moved = {**arrays, "norm": arrays["norm"] + int(step[2:])}
        save_ranks(four / "many", moved, CUTS4, ranks, f"glm-{step}")
    said = transform(four / "many", four / "out", four / "s4.ckpt", None)
    assert said == ["using step 2_3, the newest that all ranks have, of 3 steps found"]
    merged = load(four / "out" / "rank_0" / "net0.ckpt")
    assert merged["norm"][2] == (arrays["norm"] + 3).tobytes()
    transform(four / "many", four / "older", four / "s4.ckpt", None, step=(1, 20))
    assert load(four / "older" / "rank_0" / "net0.ckpt")["norm"][2] == (arrays["norm"] + 20).tobytes()
    with pytest.raises(CheckpointError, match=r"rank 3 has no checkpoint of step 2_9; all ranks have 1_20, 2_3"):
        transform(four / "many", four / "no", four / "s4.ckpt", None, step=(2, 9))


def test_state_that_the_output_does_not_know(four: Path, arrays: dict[str, np.ndarray]) -> None:
    weights = {name: cut for name, cut in CUTS2.items() if not name.startswith("adam")}
    infer = four / "infer.ckpt"
    infer.write_bytes(strategy_bytes({name: cut for name, cut in weights.items() if name != "norm"}))
    with pytest.raises(CheckpointError, match=r"infer\.ckpt: does not know 1 parameters .*: norm"):
        transform(four / "slices", four / "no", four / "s4.ckpt", infer)
    said = transform(four / "slices", four / "part", four / "s4.ckpt", infer, partial=True)
    assert any("leaving out 1 parameters" in line and "norm" in line for line in said)
    said = transform(four / "slices", four / "few", four / "s4.ckpt", None, weights_only=True)
    assert said == ["leaving out 3 tensors of optimizer and training state"]
    assert set(load(four / "few" / "rank_0" / "net0.ckpt")) == {"embed", "layer.w", "norm", "scale"}


def test_state_that_the_source_strategy_leaves_out(four: Path, arrays: dict[str, np.ndarray]) -> None:
    cuts = {name: CUTS4[name.replace("adam_m.", "")] for name in SHAPES}
    save_ranks(four / "trained", arrays, cuts, 4)
    trainable = {name: cut for name, cut in cuts.items() if not name.startswith("adam")}
    (four / "trainable.ckpt").write_bytes(strategy_bytes(trainable))
    transform(four / "trained", four / "out", four / "trainable.ckpt", None)
    assert load(four / "out" / "rank_0" / "net0.ckpt") == as_stored(arrays)


def test_missing_and_extra_ranks(four: Path) -> None:
    shutil.copytree(four / "slices" / "rank_3", four / "slices" / "rank_5")
    shutil.rmtree(four / "slices" / "rank_2")
    assert "rank 2 missing; rank 5 too many" in merge_error(four)
    (four / "slices" / "rank_2").mkdir()
    shutil.rmtree(four / "slices" / "rank_5")
    assert "rank_2: has no checkpoint" in merge_error(four)


def test_truncated_slice(four: Path) -> None:
    path = four / "slices" / "rank_1" / "net.ckpt"
    content = path.read_bytes()
    for size in range(0, len(content), 37):
        path.write_bytes(content[:size])
        error = merge_error(four)
        assert "rank_1" in error  # between two tensors nothing is damaged: then one is missing


def test_slice_of_another_run(four: Path) -> None:
    rewrite(four, 3, norm=np.zeros(8, np.float32))
    error = merge_error(four)
    assert "rank_3/net.ckpt: norm: ranks 0 and 3" in error
    transform(four / "slices", four / "unchecked", four / "s4.ckpt", None, verify=False)
    assert (four / "unchecked" / "rank_0" / "net0.ckpt").is_file()


def test_signs_of_zero_and_nan_count(four: Path) -> None:
    for rank in range(4):
        rewrite(four, rank, norm=np.full(8, np.nan, np.float32))
    transform(four / "slices", four / "nan", four / "s4.ckpt", None)
    for rank in range(4):
        rewrite(four, rank, norm=np.full(8, -0.0 if rank == 2 else 0.0, np.float32))
    assert "norm: ranks 0 and 2" in merge_error(four)


def test_swapped_ranks(four: Path) -> None:
    one, two = four / "slices" / "rank_1", four / "slices" / "rank_2"
    one.rename(four / "aside")
    two.rename(one)
    (four / "aside").rename(two)
    assert "embed: ranks 0 and 2" in merge_error(four)


def test_copied_rank(four: Path) -> None:
    shutil.copy(four / "slices" / "rank_0" / "net.ckpt", four / "slices" / "rank_3" / "net.ckpt")
    error = merge_error(four)
    assert "rank_1/net.ckpt and " in error
    assert "rank_3/net.ckpt: embed: ranks 1 and 3 should have the same part, but differ" in error
    assert error.endswith("(rank 3 has the same numbers as rank 0)")


@pytest.mark.parametrize("names", ["glm_rank_{}-1_5", "cut{}"])
def test_swapped_ranks_without_replicas(tmp_path: Path, names: str) -> None:
    cuts = {"w": Cut([4], [0])}
    arrays = random_arrays({"w": (8,)})
    (tmp_path / "s4.ckpt").write_bytes(strategy_bytes(cuts))
    for rank, told in enumerate([0, 2, 1, 3]):
        save(
            tmp_path / "slices" / f"rank_{rank}" / f"{names.format(told)}.ckpt",
            {"w": part_of(arrays["w"], cuts["w"], told)},
        )
    assert "swapped" in merge_error(tmp_path)


def test_other_shape_type_and_names(four: Path) -> None:
    rewrite(four, 2, embed=np.zeros((8, 5), np.float32))
    assert "rank_2/net.ckpt: embed: [8, 5] float32 on rank 2, but [8, 6] float32" in merge_error(four)
    rewrite(four, 2, embed=np.zeros((8, 6), np.float16))
    assert "[8, 6] float16 on rank 2" in merge_error(four)
    rewrite(four, 2, embed=None)
    assert "rank_2: embed: missing on rank 2" in merge_error(four)
    for rank in range(4):
        rewrite(four, rank, embed=np.zeros(8, np.float32))
    assert "shape [8] has 1 dimensions, the strategy splits 2" in merge_error(four)
    for rank in range(4):
        rewrite(four, rank, embed=None)
    assert "1 parameters of" in merge_error(four)
    assert (
        "the checkpoints lack 1 parameters"
        in transform(four / "slices", four / "some", four / "s4.ckpt", None, partial=True)[0]
    )


def test_counters_that_differ(four: Path) -> None:
    rewrite(four, 1, global_step=np.array(8, np.int32))
    assert "global_step: ranks 0 and 1 are of different steps ([7] and [8])" in merge_error(four)
    assert "different steps" in merge_error(four, verify=False)
    rewrite(four, 1, global_step=np.array(7, np.int32), scale=np.array([3.0], np.float16))
    assert "scale: ranks 0 and 1 differ, and the strategy does not list it" in merge_error(four)
    rewrite(four, 1, scale=None)
    assert "scale: missing on rank 1" in merge_error(four)


def test_whole_checkpoints_on_every_rank(four: Path, arrays: dict[str, np.ndarray]) -> None:
    save_ranks(four / "copies", arrays, {}, 4)
    shutil.rmtree(four / "slices")
    (four / "copies").rename(four / "slices")
    assert "If each rank has all weights (integrated_save)" in merge_error(four)
    transform(four / "slices" / "rank_2", four / "two", None, four / "s2.ckpt")
    assert load(four / "two" / "rank_1" / "net1.ckpt")["embed"][1] == (16, 3)
    with pytest.raises(CheckpointError, match=r"has 4 ranks; give their --src_ckpt_strategy"):
        transform(four / "slices", four / "no", None, four / "s2.ckpt")


def test_strategy_with_a_cut_that_was_not_made(four: Path, arrays: dict[str, np.ndarray]) -> None:
    weights = {name: cut for name, cut in CUTS4.items() if not name.startswith("adam")}
    save_ranks(four / "plain", {name: arrays[name] for name in weights}, weights, 4)
    sharded = {name: cut._replace(step=1 if name == "norm" else 2, size=-1) for name, cut in weights.items()}
    (four / "sharded.ckpt").write_bytes(strategy_bytes(sharded))
    with pytest.raises(CheckpointError, match=r"rank_2/net\.ckpt: embed: .* by the parallel optimizer on \[2, 2\]"):
        transform(four / "plain", four / "out", four / "sharded.ckpt", None)
    assert not (four / "out").exists()


def test_strategy_that_does_not_fit(four: Path) -> None:
    bad = four / "bad.ckpt"
    bad.write_bytes(strategy_bytes({**CUTS2, "norm": Cut([3], [0])} | {k: Cut([3], [-1, -1]) for k in ("embed",)}))
    with pytest.raises(CheckpointError, match="others on 3"):
        transform(four / "slices", four / "out", four / "s4.ckpt", bad)
    bad.write_bytes(strategy_bytes({name: Cut([5], [0] + [-1] * (len(shape) - 1)) for name, shape in SHAPES.items()}))
    with pytest.raises(CheckpointError, match=r"bad\.ckpt: embed: dimension 0 of \[16, 6\] is 16, not divisible by 5"):
        transform(four / "slices", four / "out", four / "s4.ckpt", bad)
    bad.write_bytes(strategy_bytes({**CUTS2, "extra": Cut([2], [0])}))
    with pytest.raises(CheckpointError, match=r"lacks 1 parameters of .*bad\.ckpt: extra"):
        transform(four / "slices", four / "out", four / "s4.ckpt", bad)


def test_output_and_arguments(four: Path) -> None:
    (four / "full").mkdir()
    (four / "full" / "mine.txt").write_text("kept")
    shutil.copytree(four / "slices", four / "deep" / "cards")
    for options, message in (
        ({"output": "full"}, "not empty"),
        ({"src": None}, "nothing to do without a strategy"),
        ({"prefix": "a/b"}, "start of a file name"),
        ({"source": "nowhere"}, "no such folder"),
        ({"source": "slices/rank_0/net.ckpt"}, "a file; give the folder with rank_0"),
        ({"source": "deep"}, "has no folders rank_0, .* of the 4 ranks; did you mean .*cards"),
        ({"kind": "bin"}, "must be ckpt or safetensors"),
    ):
        given = {"source": "slices", "output": "out", "src": four / "s4.ckpt", "prefix": "net", **options}
        with pytest.raises(CheckpointError, match=message):
            plan_resharding(
                four / given["source"], four / given["output"], prefix=given["prefix"], src_strategy=given["src"],
                kind=given.get("kind"), say=print
            )  # fmt: skip
    assert (four / "full" / "mine.txt").read_text() == "kept"
    (four / "empty").mkdir()
    transform(four / "slices", four / "empty", four / "s4.ckpt", None)
    assert (four / "empty" / "rank_0" / "net0.ckpt").is_file()


def test_two_checkpoints_in_one_folder(four: Path) -> None:
    shutil.copy(four / "slices" / "rank_1" / "net.ckpt", four / "slices" / "rank_1" / "other.ckpt")
    assert "is also in net.ckpt; leave one" in merge_error(four)
    (four / "slices" / "rank_1" / "other.ckpt").rename(four / "slices" / "rank_1" / "net-1_5.ckpt")
    assert "names no step, others do" in merge_error(four)


def test_folders_of_ranks_are_opened_or_explained(four: Path) -> None:
    with pytest.raises(CheckpointError, match=r"slices of 4 ranks; merge them with tools/transform_ckpt\.py"):
        open_checkpoint(four / "slices")
    transform(four / "slices", four / "out", four / "s4.ckpt", None)
    with open_checkpoint(four / "out") as reader:
        assert reader.names() == ["embed", "layer.w", "norm", "scale"]


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_file_that_some_ranks_lack(four: Path, name: str) -> None:
    """A rank without it may be of another run."""
    for rank in (0, 1, 3):
        folder = four / "slices" / f"rank_{rank}"
        if name == "manifest.json":
            write_manifest_values(folder, {"step": 7, "files": describe_files(folder)})
        else:
            (folder / name).write_text("{}")
    message = merge_error(four)
    assert f"1 of 4 ranks have no {name}" in message
    assert "rank_2" in message


@pytest.mark.parametrize("cut_again", [False, True])
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, cut_again: bool) -> None:
    shape, count = (512, 1024), 24
    cuts = {f"w{number}": Cut([2, 2], [0, -1], 2, -1) for number in range(count)}
    other = {name: Cut([2, 4], [-1, 0]) for name in cuts}
    (tmp_path / "s.ckpt").write_bytes(strategy_bytes(cuts))
    (tmp_path / "o.ckpt").write_bytes(strategy_bytes(other))
    save_ranks(tmp_path / "slices", random_arrays({name: shape for name in cuts}), cuts, 4)
    largest = 512 * 1024 * 4
    tracemalloc.start()
    try:
        transform(
            tmp_path / "slices", tmp_path / "out", tmp_path / "s.ckpt", tmp_path / "o.ckpt" if cut_again else None
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"peak {peak / largest:.2f} x the largest tensor, of {count}")
    assert peak < 2.0 * largest


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_golden_merge_and_cut(case: str, tmp_path: Path) -> None:
    golden = GOLDEN / case
    transform(golden / "sliced", tmp_path / "whole", golden / "strategy", None)
    assert load(tmp_path / "whole" / "rank_0" / "net0.ckpt") == load(golden / "whole" / "rank_0" / "whole0.ckpt")
    with np.load(golden / "full.npz") as full:
        assert load(tmp_path / "whole" / "rank_0" / "net0.ckpt") == as_stored(full)
    transform(tmp_path / "whole", tmp_path / "cut", None, golden / "strategy")
    ranks = sorted((golden / "sliced").iterdir())
    for rank in ranks:
        assert load(tmp_path / "cut" / rank.name / f"net{rank.name[5:]}.ckpt") == load(rank / "net.ckpt")
    assert len(list((tmp_path / "cut").iterdir())) == len(ranks)


@needs_golden
def test_golden_to_another_cluster(tmp_path: Path) -> None:
    strategy = GOLDEN / "tp2" / "strategy" / "rank_1.ckpt"
    transform(GOLDEN / "tp" / "sliced", tmp_path / "two", GOLDEN / "tp" / "strategy" / "rank_0.ckpt", strategy)
    for rank in range(2):
        expected = load(GOLDEN / "tp2" / "from_tp" / f"rank_{rank}" / f"cut{rank}.ckpt")
        assert load(tmp_path / "two" / f"rank_{rank}" / f"net{rank}.ckpt") == expected


@needs_golden
@pytest.mark.parametrize("merged", [False, True])
def test_golden_pipeline_to_optimizer_shards_and_back(merged: bool, tmp_path: Path) -> None:
    pipeline = GOLDEN / "pp" / "strategy" / ("merged.ckpt" if merged else "")
    shards = GOLDEN / "tp_opt" / "strategy"
    transform(GOLDEN / "pp" / "sliced", tmp_path / "opt", pipeline, shards, kind="safetensors")
    for rank in range(8):
        ours = load(tmp_path / "opt" / f"rank_{rank}" / f"net{rank}.safetensors")
        assert ours == load(GOLDEN / "tp_opt" / "sliced" / f"rank_{rank}" / "net.ckpt")  # made of the same arrays
    transform(tmp_path / "opt", tmp_path / "back", shards, pipeline, kind="ckpt")
    for rank in range(8):
        ours = load(tmp_path / "back" / f"rank_{rank}" / f"net{rank}.ckpt")
        assert ours == load(GOLDEN / "pp" / "sliced" / f"rank_{rank}" / "net.ckpt")


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float16)])
def test_a_tensor_that_is_not_the_announced_one_is_not_written(array: np.ndarray, tmp_path: Path) -> None:
    placement, info = Placement("ckpt_", "safetensors", 1), TensorInfo((3, 2), "float32")
    placement.create(tmp_path, 0, {"w": info})
    file = tmp_path / "rank_0" / "ckpt_0.safetensors"
    header = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"ckpt_0\.safetensors: w: .*, expected \[3, 2\] float32"):
        placement.append(tmp_path, 0, "w", info, array)
    assert file.read_bytes() == header
