"""Strategy files: what they say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from strategy_helpers import GOLDEN, Cut, needs_golden, part_of, strategy_bytes

from glm_ms.convert.cluster.layout import Layout, LayoutError
from glm_ms.convert.cluster.strategy_file import read_strategy
from glm_ms.storage.errors import CheckpointError

CUTS = {
    "w": Cut([2, 4], [0, -1], 4, -1),
    "norm": Cut([2, 4], [-1], 1, -1),
    "both": Cut([2, 4], [0, 1]),
}
# The forms that MindSpore 2.9.0 was seen to save, with the shape of a tensor to cut.
FORMS = {
    "rows": (Cut([2, 4], [0, -1]), (8, 3)),
    "columns": (Cut([2, 4], [-1, 0]), (3, 8)),
    "both": (Cut([2, 4], [0, 1]), (8, 4)),
    "replicated": (Cut([2, 4], [-1, -1]), (2, 2)),
    "optimizer": (Cut([2, 4], [0, -1], 4, -1), (16, 3)),
    "optimizer, replicated": (Cut([2, 4], [-1], 1, -1), (16,)),
    "optimizer in groups of 2": (Cut([4, 2], [0, -1], 2, 2), (16, 3)),
    "optimizer in groups of 2, replicated": (Cut([4, 2], [-1], 1, 2), (16,)),
    "optimizer, innermost": (Cut([2, 2, 2], [1, 2], 1, 2), (16, 4)),
    "optimizer, outermost": (Cut([2, 2, 2], [1, 0], 4, 2), (16, 4)),
    "two axes": (Cut([2, 2, 2], [[1, 0], [-1]]), (16, 3)),
    "two axes, second dimension": (Cut([2, 2, 2], [[-1], [1, 0]], 4, -1), (4, 8)),
    "two axes, swapped": (Cut([2, 2, 2], [[0, 1], [2]]), (8, 4)),
    "two axes, vector": (Cut([2, 2, 2], [[1, 0]], 4, 2), (16,)),
    "fewer ranks": (Cut([4], [0]), (8,)),
}


def write(path: Path, cuts: dict[str, Cut], **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strategy_bytes(cuts, **more))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_regions(form: str, tmp_path: Path) -> None:
    cut, shape = FORMS[form]
    strategy = read_strategy(write(tmp_path / "s.ckpt", {"w": cut, "other": Cut([2, 4], [0])}))
    assert (strategy.devices, strategy.ranks) == (8, 8)
    array = np.arange(np.prod(shape)).reshape(shape)
    layout = strategy.layout("w", 0)
    for rank in range(8):
        expected = part_of(array, cut, rank)
        np.testing.assert_array_equal(array[layout.region(shape, rank)], expected)
        assert layout.part_shape(shape) == expected.shape
        assert layout.whole_shape(expected.shape) == shape


def test_folder_of_stages(tmp_path: Path) -> None:
    for rank in range(8):
        stage = rank // 4
        write(tmp_path / "a" / f"ckpt_strategy_rank_{rank}.ckpt", {f"w{stage}": Cut([2, 2], [0])}, stage=stage)
        write(tmp_path / "b" / f"rank_{rank}" / f"s_rank_{rank}.ckpt", {f"w{stage}": Cut([2, 2], [0])}, stage=stage)
    for folder in (tmp_path / "a", tmp_path / "b"):
        strategy = read_strategy(folder)
        assert [list(stage) for stage in strategy.stages] == [["w0"], ["w1"]]
        assert (strategy.ranks, strategy.stage_of(3), strategy.stage_of(4)) == (8, 0, 1)
    merged = {"1-w1": Cut([2, 2], [0]), "0-w0": Cut([2, 2], [0])}
    (tmp_path / "a" / "merged.ckpt").write_bytes(strategy_bytes(merged))
    assert read_strategy(tmp_path / "a" / "merged.ckpt").stages == read_strategy(tmp_path / "a").stages


def test_json(tmp_path: Path) -> None:
    item = {"dev_matrix": [2, 4], "field": 0, "opt_weight_shard_size": -1, "opt_weight_shard_step": 4,
            "tensor_map": [0, -1], "tensor_shape": [16, 3]}  # fmt: skip
    document = {
        "current_stage": 2,
        "parallel_strategy_item": {"MatMul_w": {"parallel_strategy": [[2, 1], [4, 1]], "stage": 0}},
        "parallel_layout_item": {"w": item},
    }
    path = tmp_path / "s.json"
    path.write_text(json.dumps(document))
    layout = read_strategy(path).layout("w", 0)
    assert layout == Layout((2, 4), ((1,), ()), 2, (16, 3))
    with pytest.raises(LayoutError, match=r"the strategy has \[16, 3\]"):
        layout.whole_shape((4, 3))
    for broken in ("[]", "{", '{"parallel_layout_item": {"w": {}}}', '{"parallel_layout_item": {"w": [1]}}'):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match=r"s\.json: not a strategy file"):
            read_strategy(path)


def test_state_lies_as_its_parameter(tmp_path: Path) -> None:
    strategy = read_strategy(write(tmp_path / "s.ckpt", CUTS))
    assert strategy.layout("adam_m.w", 0) == strategy.layout("w", 0)
    assert strategy.layout("other.w", 0) is None
    assert strategy.layouts("global_step") == {}


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut([2, 0], [0]), "empty axis"),
        (Cut([1] * 33, [0]), "33 axes"),
        (Cut([1 << 40, 1 << 40], [0]), "too many"),
        (Cut([2, 4], [2]), "lacks"),
        (Cut([2, 4], [0, 0]), "twice"),
        (Cut([2, 4], [0], 4, 3), "cannot split it in 3"),
        (Cut([2, 4], [0], 2, 2), "optimizer step 2 does not fit"),
        (Cut([2, 4], [], 1, 2), "scalar"),
    ],
)
def test_contradictions(cut: Cut, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"s\.ckpt: w: .*{message}"):
        read_strategy(write(tmp_path / "s.ckpt", {"w": cut}))


def test_refused_files(tmp_path: Path) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_strategy(path)

    refused("no such strategy", tmp_path / "none.ckpt")
    refused("has no strategy file", tmp_path)
    refused("stage 1 alone", write(tmp_path / "stage1.ckpt", CUTS, stage=1))
    refused("uneven parts", write(tmp_path / "uneven.ckpt", CUTS, parts=(3, 5)))
    refused("fields", write(tmp_path / "field.ckpt", CUTS, field=2))
    refused("lists no parameters", write(tmp_path / "nothing.ckpt", {}))
    gap = write(tmp_path / "gap.ckpt", {"0-a": Cut([2], [0]), "2-b": Cut([2], [0])})
    refused("lacks pipeline stage 1; merge the files of all stages", gap)
    refused("3 ranks, others on 8", write(tmp_path / "odd.ckpt", {**CUTS, "x": Cut([3], [0])}))
    for content, message in (
        (b"", "empty"),
        (b"PK\x03\x04 zip", "not a strategy"),
        (b"\xff" * 99, "not a strategy"),
    ):
        (tmp_path / "bytes.ckpt").write_bytes(content)
        refused(rf"bytes\.ckpt: {message}", tmp_path / "bytes.ckpt")


def test_refused_folders(tmp_path: Path) -> None:
    half = {"w": Cut([4], [0])}
    write(tmp_path / "differ" / "rank_0.ckpt", half)
    write(tmp_path / "differ" / "rank_1.ckpt", {"w": Cut([4], [-1])})
    with pytest.raises(CheckpointError, match=r"rank_1\.ckpt: differs from rank_0\.ckpt.*stage 0: w"):
        read_strategy(tmp_path / "differ")
    write(tmp_path / "gap" / "rank_0.ckpt", half)
    write(tmp_path / "gap" / "rank_8.ckpt", half, stage=2)
    with pytest.raises(CheckpointError, match="no strategy file of pipeline stage 1; add"):
        read_strategy(tmp_path / "gap")
    write(tmp_path / "named" / "rank_0.ckpt", half)
    write(tmp_path / "named" / "rank_3.ckpt", half, stage=1)
    with pytest.raises(CheckpointError, match=r"rank_3\.ckpt: of pipeline stage 1, .* means stage 0"):
        read_strategy(tmp_path / "named")


def test_every_truncation_is_an_error_or_lists_less(tmp_path: Path) -> None:
    content = strategy_bytes(CUTS)
    path = tmp_path / "s.ckpt"
    readable = []
    for size in range(len(content)):
        path.write_bytes(content[:size])
        try:
            readable.append(len(read_strategy(path).names()))
        except CheckpointError as error:
            message = str(error)
            if "s.ckpt" not in message:
                raise
    # Between two entries nothing looks damaged; the checkpoints then have parameters that no strategy lists.
    assert readable == list(range(1, len(CUTS)))


@needs_golden
@pytest.mark.parametrize("case", ["tp", "tp_opt", "pp", "tp2"])
def test_golden_layouts(case: str) -> None:
    strategy = read_strategy(GOLDEN / case / "strategy")
    files = sorted((GOLDEN / case / "layout").iterdir())
    assert len(files) == strategy.ranks
    for file in files:
        rank = int(file.stem[5:])
        stage = strategy.stage_of(rank)
        for name, expected in json.loads(file.read_text()).items():
            layout = strategy.layout(name, stage)
            full = tuple(expected["full"])
            assert list(layout.part_shape(full)) == expected["slice"], name
            assert layout.optimizer_pieces == expected["opt_shard"], name
            assert layout.position(rank % strategy.devices)[0] % expected["opt_shard"] == expected["opt_rank"], name
        assert set(strategy.stages[stage]) == set(json.loads(file.read_text()))
