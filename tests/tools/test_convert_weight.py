"""The command line, run as a user runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm_ms.convert.reader import open_checkpoint


@pytest.fixture
def run(repository: Path, tmp_path: Path):
    """Runs the tool in an empty folder, from elsewhere than the repository."""

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, repository / "tools" / "convert_weight.py", *arguments]
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )

    return start


@pytest.fixture
def source(golden: Path) -> Path:
    return golden / "models" / "glm3_tiny"


def test_there_and_back(run, source: Path, tmp_path: Path) -> None:
    there = run("--input", source, "--output", "glm3.ckpt", "--dtype", "bfloat16")
    assert there.returncode == 0, there.stderr
    assert "24 tensors, 780,096 bytes (bfloat16)" in there.stdout
    assert "peak memory" in there.stdout
    assert "24/24 tensors" in there.stderr  # the bar
    back = run(
        "--input", "glm3.ckpt", "--output", "hf", "--config", source / "config.json", "--to", "hf",
        "--max_shard_size", "200KB"
    )  # fmt: skip
    assert back.returncode == 0, back.stderr
    reader = open_checkpoint(tmp_path / "hf")
    assert len(reader.names()) == 24
    assert len(reader.files()) > 1
    assert reader.dtype("transformer.output_layer.weight") == "bfloat16"


def test_config_of_this_project_is_taken(run, source: Path, tmp_path: Path) -> None:
    assert run("--input", source, "--output", "a.safetensors").returncode == 0
    (tmp_path / "model.yaml").write_text(
        "model:\n  model_config: {type: GLMConfig, num_layers: 3, hidden_size: 96, ffn_hidden_size: 208,"
        " kv_channels: 32, num_attention_heads: 4, padded_vocab_size: 512, seq_length: 64}\n"
    )
    done = run("--input", "a.safetensors", "--config", "model.yaml", "--output", "b.ckpt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.ckpt").exists()


@pytest.mark.parametrize("from_config", [False, True])
def test_tokenizer_files_come_along(run, source: Path, tmp_path: Path, from_config: bool) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)
    (folder / "tokenizer.model").write_bytes(b"vocabulary")
    (folder / "other.txt").write_bytes(b"stays")
    arguments = ["--input", folder]
    if from_config:
        assert run("--input", folder, "--output", "a.ckpt").returncode == 0
        arguments = ["--input", "a.ckpt", "--config", folder]
    assert run(*arguments, "--output", "new").returncode == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.model",
    ]  # fmt: skip
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == b"vocabulary"


def test_training_state_is_left_out_visibly(run, source: Path, tmp_path: Path) -> None:
    import mindspore as ms

    with open_checkpoint(source) as reader:
        parameters = [{"name": name, "data": ms.Tensor(reader.read(name))} for name in reader.names()]
    state = [{"name": f"adam_m.{item['name']}", "data": item["data"]} for item in parameters]
    ms.save_checkpoint(parameters + state, str(tmp_path / "training.ckpt"), append_dict={"epoch_num": 1})
    done = run("--input", "training.ckpt", "--config", source, "--output", "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert "left out 25 tensors of optimizer and training state" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "nothing", "--output", "x.ckpt"], "nothing: no such file or folder"),
        (["--input", "SOURCE", "--output", "x.bin"], "cannot write .bin"),
        (
            ["--input", "SOURCE", "--output", "x.ckpt", "--to", "hf"],
            "not an output of kind hf; give a folder",
        ),
        (
            ["--input", "SOURCE", "--output", "x", "--to", "mindspore"],
            "a name that ends in .safetensors or .ckpt",
        ),
        (["--input", "SOURCE", "--output", "x.ckpt", "--max_shard_size", "2GB"], "Hugging Face output only"),
        (["--input", "SOURCE", "--output", "x", "--max_shard_size", "big"], "such as 2GB"),
        (["--input", "SOURCE", "--output", "SOURCE/config.json/x.ckpt"], "config.json is a file, not a folder"),
        (["--input", "SOURCE/model.safetensors", "--output", "x.ckpt"], "--config"),
        (
            ["--input", "SOURCE", "--output", "x.ckpt", "--config", "missing.json"],
            "missing.json: no such file",
        ),
        (
            ["--input", "SOURCE", "--output", "x.ckpt", "--config", "SOURCE/../glm2_tiny"],
            "of the wrong shape",
        ),
    ],
)
def test_refusals_are_one_clear_line_and_leave_nothing(
    run, source: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = run(*(argument.replace("SOURCE", str(source)) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_output_needs_overwrite(run, source: Path) -> None:
    assert run("--input", source, "--output", "x.ckpt").returncode == 0
    again = run("--input", source, "--output", "x.ckpt")
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert run("--input", source, "--output", "x.ckpt", "--overwrite").returncode == 0


def test_misspelt_flag_and_unknown_type_are_usage_errors(run, source: Path) -> None:
    assert run("--input", source, "--output", "x.ckpt", "--over").returncode == 2
    assert run("--input", source, "--output", "x.ckpt", "--dtype", "fp16").returncode == 2
