"""Messages name arguments and tools as the user of the running program writes them."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
from engine_helpers import load_script
from safetensors.numpy import load_file, save_file

from glm_ms import commands, spelling
from glm_ms.convert.conversion import plan_conversion
from glm_ms.peft.adapter import AdapterError, read_adapter
from glm_ms.pretrained import find_tokenizer
from glm_ms.serve.model_arguments import add_model_arguments
from glm_ms.settings.cli import parse_args
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import CheckpointError, FileError

GOLDEN = Path(__file__).resolve().parent / "golden"
LORA = GOLDEN / "train" / "lora" / "final" / "adapter_model.safetensors"


def as_chat() -> None:
    parser = Parser()
    add_model_arguments(parser)
    parser.parse_args(["--model", "x"])


def as_tool(name: str, *arguments: str) -> None:
    build: ArgumentParser = load_script(f"tools/{name}.py").build_parser()
    build.parse_args(arguments)


def as_convert() -> None:
    as_tool("convert_weight", "--input", "x", "--output", "y")


def as_merge() -> None:
    as_tool("merge_lora", "--base", "x", "--adapter", "y", "--output", "z")


def as_run() -> None:
    parse_args(["--config", "x.yaml"])


def as_python() -> None:
    pass


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (as_chat, "--model-generation 2 or --model-generation 3"),
        (as_convert, "--model_generation 2 or --model_generation 3"),
        (as_python, "model_generation=2 or model_generation=3"),
    ],
)
def test_the_generation(program, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    program()
    with pytest.raises(FileError, match=f"give {words}$"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (as_chat, "--lora-alpha ALPHA"),
        (as_merge, "--lora_alpha ALPHA"),
        (as_run, "model.pet_config.lora_alpha=ALPHA, in a YAML beside pet_type: lora"),
        (as_python, "lora_alpha=ALPHA"),
    ],
)
def test_the_scale_of_an_adapter(program, words: str, tmp_path: Path) -> None:
    shutil.copyfile(LORA, tmp_path / LORA.name)
    program()
    with pytest.raises(AdapterError, match=rf"give the lora_alpha of its training \({words}\)"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(("program", "words"), [(as_convert, "--config:"), (as_python, "config:")])
def test_the_architecture(program, words: str, tmp_path: Path) -> None:
    program()
    with pytest.raises(CheckpointError, match=f"; give its {words} a folder"):
        plan_conversion(GOLDEN / "models" / "glm3_tiny" / "model.safetensors", tmp_path / "out")


def test_an_existing_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for program, words in ((as_python, "overwrite=True"), (as_convert, "--overwrite")):
        program()
        with pytest.raises(CheckpointError, match=f"or add {words}$"):
            plan_conversion(GOLDEN / "models" / "glm3_tiny", tmp_path / "out")


def test_tools_have_the_name_of_their_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both"
    shutil.copytree(GOLDEN / "models" / "glm2_tiny", both)
    save_file({**load_file(both / "model.safetensors"), **load_file(LORA)}, both / "model.safetensors")
    line = ["--input", str(both), "--output", str(tmp_path / "out")]
    assert commands.main(["convert", *line]) == 1
    assert "merge it first: glm-ms merge-lora with this as --base and --adapter" in capsys.readouterr().err
    assert load_script("tools/convert_weight.py").main(line) == 1
    assert "merge it first: tools/merge_lora.py" in capsys.readouterr().err


def test_a_program_leaves_no_names_behind() -> None:
    with spelling.of_program():
        as_chat()
        assert spelling.given("lora_alpha", 8) == "--lora-alpha 8"
    assert spelling.given("lora_alpha", 8) == "lora_alpha=8"
