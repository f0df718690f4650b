"""README.md: both languages say the same, and every command in it works.

The info string of a code block tells what becomes of it: `bash` is run, in order, on stand-ins for the files that
a reader brings along; `python` is run; the other kinds are only checked: `bash ascend` and `bash 6b` need hardware or
weights, `bash mindformers` files of MindFormers, `bash adgen` hundreds of genuine records.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from legacy_yaml import LORA, legacy_yaml

from glm_ms.settings import load_settings, parse_args
from glm_ms.settings.errors import SettingsError

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
KINDS = {"bash", "bash ascend", "bash 6b", "bash mindformers", "bash adgen", "python", "text"}
CHINESE = "\n# 中文\n"
# Commands that make an environment of their own; tests/scripts runs what can be run of them.
SETUP = {
    "bash scripts/quickstart.sh",
    "bash scripts/test.sh",
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install .",
}
# What a reader brings along -> what stands for it here.
STAND_INS = {
    "/path/to/AdvertiseGen/train.json": "yours/train.json",
    "/path/to/AdvertiseGen/dev.json": "yours/dev.json",
    "/path/to/chatglm3-6b/tokenizer.model": "yours/tokenizer.model",
    "/path/to/chatglm3-6b": "yours/chatglm3-6b",
    "/path/to/tool_alpaca_train.json": "yours/tool_alpaca_train.json",
}
NUM_TRAIN, NUM_DEV = 128, 16  # records in the stand-ins
TOOL_ALPACA = {
    "Name": "Weather",
    "Function_Description": {"getWeather": "The weather of a city.", "components": ""},
    "Instances": [
        {
            "input": "How is the weather in Beijing?",
            "output": "It is sunny.",
            "Final Thought": "I know it now.",
            "intermediate_steps": [[["getWeather", '{"city": "Beijing"}', "I ask."], "sunny"]],
        }
    ],
}


class Block(NamedTuple):
    """A fenced block: info string and text."""

    kind: str
    text: str

    def commands(self) -> list[str]:
        """Its commands, continued lines joined."""
        return [line.strip() for line in re.sub(r"\\\n\s*", "", self.text).splitlines() if line.strip()]


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*pair) for pair in found]


TEXT = README.read_text(encoding="utf-8")
ENGLISH, _, TRANSLATION = TEXT.partition(CHINESE)
BLOCKS = blocks(ENGLISH)
COMMANDS = [
    (block.kind, command) for block in BLOCKS if block.kind.startswith("bash") for command in block.commands()
]


def arguments_of(command: str) -> tuple[str, list[str]]:
    """Program (`run_glm.py`, `tools/train_vocab.py`, else "") and its arguments; of a pipe, the last command."""
    tokens = shlex.split(command.rpartition(" | ")[2])
    for token in tokens:
        if token.startswith("run_glm.py "):  # given to a launcher as one argument
            return "run_glm.py", shlex.split(token)[1:]
    for place, token in enumerate(tokens):
        if token == "run_glm.py" or token.startswith("tools/"):
            return token, tokens[place + 1 :]
    return "", tokens


def test_every_block_says_what_it_is():
    assert {block.kind for block in BLOCKS} <= KINDS
    assert TEXT.count("```") == 2 * len(blocks(TEXT))
    assert {kind for kind, _ in COMMANDS} == {
        "bash",
        "bash ascend",
        "bash 6b",
        "bash mindformers",
        "bash adgen",
    }


def test_both_languages_hold_the_same():
    assert blocks(TRANSLATION) == BLOCKS
    for pattern in (r"^(#{2,3}) ", r"^(\|)", r"^(\* )"):  # headings, rows of tables, list items
        assert len(re.findall(pattern, ENGLISH, re.MULTILINE)) == len(
            re.findall(pattern, TRANSLATION, re.MULTILINE)
        )
    code = re.compile(r"`([^`\n]+)`")
    outside = [
        re.sub(r"^```.*?^```$", "", part, flags=re.MULTILINE | re.DOTALL) for part in (ENGLISH, TRANSLATION)
    ]
    english, chinese = (set(code.findall(part)) for part in outside)
    assert english == chinese


@pytest.mark.parametrize("command", [command for _, command in COMMANDS])
def test_command_names_what_exists(command):
    program, arguments = arguments_of(command)
    if program == "run_glm.py":
        check_run(arguments, parallel=command.startswith(("msrun", "bash scripts/msrun_launcher.sh")))
    elif program:
        check_tool(program, arguments)
    elif command in SETUP:
        assert all((REPOSITORY / name).is_file() for name in arguments if name.startswith("scripts/"))
    elif command.startswith("bash scripts/run_distribute.sh"):
        assert (REPOSITORY / arguments[1]).is_file()
        assert (REPOSITORY / arguments[3]).is_file()
    else:
        assert arguments[0] == "head", f"add a check for: {command}"
        assert (REPOSITORY / arguments[3]).is_file()


def check_run(arguments: list[str], parallel: bool) -> None:
    """Flags, keys and values are right and the YAML exists; the files a reader brings along need not."""
    parsed = parse_args(arguments)
    if "/" in parsed.config:
        settings = load_settings(
            REPOSITORY / parsed.config, parsed.overrides, parsed.flags, check_files=False
        )
    else:  # a file of MindFormers that the reader has
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, parsed.config)
            path.write_text(legacy_yaml(generation=3, pet=LORA), encoding="utf-8")
            settings = load_settings(path, parsed.overrides, parsed.flags, check_files=False)
        assert settings.model.pet_config.pet_type == "lora"
    assert settings.use_parallel == parallel


def check_tool(program: str, arguments: list[str]) -> None:
    """The tool exists and knows the flags."""
    done = subprocess.run(
        [sys.executable, REPOSITORY / program, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
        check=True,
    )
    assert {name for name in arguments if name.startswith("--")} <= set(re.findall(r"--\w+", done.stdout))


def test_the_check_of_commands_finds_mistakes():
    with pytest.raises(SettingsError, match="did you mean --epochs"):
        check_run(["--config", "configs/tiny/finetune_glm3_tiny.yaml", "--epoch", "2"], parallel=False)
    with pytest.raises(SettingsError, match="no such file"):
        check_run(["--config", "configs/tiny/no.yaml"], parallel=False)
    with pytest.raises(AssertionError):
        check_tool("tools/train_vocab.py", ["--size", "800"])


def test_paths_in_tables_exist():
    folders = ("configs/", "glm_ms/", "tools/", "scripts/", "tests/")
    rows = [line for line in ENGLISH.splitlines() if line.startswith("| ")]
    paths = {path for row in rows for path in re.findall(r"`([^`]+)`", row) if path.startswith(folders)}
    missing = [path for path in sorted(paths) if not (REPOSITORY / path).exists()]
    assert len(paths) > 15
    assert not missing


def test_the_error_shown_is_the_error_given():
    shown = next(block.text for block in BLOCKS if block.kind == "text")
    command, *expected = shown.splitlines()
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[2:], "processor.tokenizer.vocab_file=README.md"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == expected


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a reader has it, with stand-ins for what he brings along, and `python` on its PATH."""
    folder = tmp_path_factory.mktemp("read me")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for name in ("glm_ms", "tools", "scripts", "pyproject.toml", "run_glm.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    yours, sample = folder / "yours", folder / "configs" / "tiny" / "sample"
    yours.mkdir()
    for name, count in (("train.json", NUM_TRAIN), ("dev.json", NUM_DEV)):
        lines = (sample / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (yours / name).write_text("".join(lines[:count]), encoding="utf-8")
    (yours / "tool_alpaca_train.json").write_text(json.dumps([TOOL_ALPACA]), encoding="utf-8")
    (yours / "chatglm3-6b").symlink_to(REPOSITORY / "tests" / "golden" / "models" / "glm3_tiny")
    (yours / "tokenizer.model").symlink_to(Path("..") / "output" / "tiny" / "tokenizer.model")
    (folder / "bin").mkdir()
    launcher = folder / "bin" / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    return folder


def run_command(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"},
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "PYTHONUTF8": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.slow
def test_every_command_runs(workplace):
    """In the order of the page, as a reader would: later commands use what earlier ones wrote."""
    for _, command in [pair for pair in COMMANDS if pair[0] == "bash" and pair[1] not in SETUP]:
        for theirs, ours in STAND_INS.items():
            command = command.replace(theirs, ours)
        done = run_command(["bash", "-o", "pipefail", "-c", command], workplace)
        if "predict_glm3" in command:
            assert done.stdout.strip(), command
    output = workplace / "output"
    for name in ("tiny/glm3_finetune/metrics.jsonl", "mine_eval/eval_scores.json", "glm3_hf/config.json"):
        assert (output / name).is_file()
    program = next(block.text for block in BLOCKS if block.kind == "python")
    done = run_command([str(workplace / "bin" / "python"), "-c", program], workplace)
    assert len(done.stdout.split()) == 2, done.stdout  # an answer each; Chinese text has no spaces
