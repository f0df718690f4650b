"""The command line, run as a user runs it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from strategy_helpers import Cut, as_stored, load, random_arrays, save_ranks, strategy_bytes

CUTS = {"w": Cut([2, 2], [0, -1]), "norm": Cut([2, 2], [-1])}
ARRAYS = random_arrays({"w": (8, 4), "norm": (4,)})


@pytest.fixture
def run(repository: Path, tmp_path: Path):
    """Runs the tool in a folder that has `slices` of four ranks and their strategy.ckpt."""
    save_ranks(tmp_path / "slices", ARRAYS, CUTS, 4)
    (tmp_path / "strategy.ckpt").write_bytes(strategy_bytes(CUTS))

    def start(*arguments: object, files: int | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, repository / "tools" / "transform_ckpt.py", *arguments]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            preexec_fn=limit
        )  # fmt: skip

    return start


def test_merge_and_cut(run, tmp_path: Path) -> None:
    done = run("--src_ckpt_strategy", "strategy.ckpt", "--src_ckpt_dir", "slices", "--dst_ckpt_dir", "whole",
               "--prefix", "glm3_")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "whole: 2 tensors, 144 bytes, from 4 to 1 ranks" in done.stdout
    assert "--run_mode eval --load_checkpoint whole\n" in done.stdout
    assert "--input whole --config CONFIG" in done.stdout  # no config.json lay beside the slices
    assert load(tmp_path / "whole" / "rank_0" / "glm3_0.ckpt") == as_stored(ARRAYS)
    done = run("--dst_ckpt_strategy", "strategy.ckpt", "--src_ckpt_dir", "whole", "--dst_ckpt_dir", "cut",
               "--format", "safetensors")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cut/rank_N/checkpoint_N.safetensors" in done.stdout
    for rank in range(4):
        expected = load(tmp_path / "slices" / f"rank_{rank}" / "net.ckpt")
        assert load(tmp_path / "cut" / f"rank_{rank}" / f"checkpoint_{rank}.safetensors") == expected


def test_many_ranks_need_few_open_files(run, tmp_path: Path) -> None:
    cuts = {"w": Cut([128], [0, -1])}
    save_ranks(tmp_path / "many", random_arrays({"w": (128, 2)}), cuts, 128)
    (tmp_path / "many.ckpt").write_bytes(strategy_bytes(cuts))
    done = run("--src_ckpt_strategy", "many.ckpt", "--dst_ckpt_strategy", "many.ckpt", "--src_ckpt_dir", "many",
               "--dst_ckpt_dir", "again", files=48)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "again" / "rank_77" / "checkpoint_77.ckpt") == load(
        tmp_path / "many" / "rank_77" / "net.ckpt"
    )


def test_refusals_name_the_reason(run, tmp_path: Path) -> None:
    slices = ("--src_ckpt_strategy", "strategy.ckpt", "--src_ckpt_dir", "slices", "--dst_ckpt_dir", "out")
    (tmp_path / "slices" / "rank_2" / "net.ckpt").write_bytes(b"\x0a\x7f")
    done = run(*slices)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: slices/rank_2/net.ckpt: truncated or damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = run(*slices, "--step", "newest")
    assert done.returncode == 2
    assert "neither a step, such as 500, nor EPOCH_STEP" in done.stderr
    assert run("--src_ckpt_dir", "slices").returncode == 2
