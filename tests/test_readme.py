"""README, docs/ and CONTRIBUTING: every command works, every link leads somewhere, both languages agree.

The info string of a code block tells what the tests do with it. `bash`: runs the commands in order, on stand-ins for
files of the reader. `python`: runs the program. `bash ascend`, `bash 6b`, `bash adgen` and `bash mindformers` need
cards, weights, genuine records or files of MindFormers: only files, flags and keys are checked. `bash tests` would run
this suite. `bash server`: its last command serves until `bash client` blocks have run; their port becomes a free one.
`python openai` and `json PATH` are a program and requests for the server; tests/serve runs and sends them.
`text` starting with `$` shows a command and its error. `nginx`: tests/serve/test_replicas.py runs it.
"""

from __future__ import annotations

import filecmp
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from legacy_yaml import LORA, legacy_yaml

from glm_ms import commands as console
from glm_ms.serve.settings import PORT
from glm_ms.settings import load_settings, parse_args
from glm_ms.settings.errors import SettingsError

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "configs" / "tiny" / "sample"
README, TRAINING = "README.md", "docs/training.md"
KINDS = {
    "bash", "bash ascend", "bash 6b", "bash adgen", "bash mindformers", "bash tests", "python", "text", "mermaid",
    "bash server", "bash client", "nginx", "python openai",
    "json /v1/chat/completions", "json /v1/responses", "json /v1/messages",
}  # fmt: skip
MAX_README_LINES = 200
# Commands that change the environment; tests/scripts runs some of them.
SETUP = {
    "bash scripts/quickstart.sh",
    "bash scripts/test.sh",
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install .",
    'pip install ".[serve]"',
    'pip install -e ".[test]"',
}
# File of the reader -> its stand-in.
STAND_INS = {
    "/path/to/records.jsonl": "yours/records.jsonl",
    "/path/to/held_out.jsonl": "yours/held_out.jsonl",
    "/path/to/AdvertiseGen/train.json": "yours/train.json",
    "/path/to/AdvertiseGen/dev.json": "yours/dev.json",
    "/path/to/chatglm3-6b/tokenizer.model": "yours/tokenizer.model",
    "/path/to/chatglm3-6b": "yours/chatglm3-6b",
    "/path/to/tool_alpaca_train.json": "yours/tool_alpaca_train.json",
}
NUM_TRAIN, NUM_DEV = 128, 8  # records in the stand-ins
# The tiny model keeps all records of train.json: docs/conversion.md names its last checkpoint.
KEPT = {"dev.json": 16, "titles_train.json": 96, "titles_dev.json": 8,
        "conversations_train.json": 24, "conversations_dev.json": 4}  # fmt: skip
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


_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(*pair) for pair in _FENCED.findall(read(page))]


def prose(page: str) -> str:
    """The page without its code blocks."""
    return _FENCED.sub("", read(page))


def commands(page: str, kind: str = "bash") -> list[str]:
    return [command for block in blocks(page) if block.kind == kind for command in block.commands()]


DOCS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))
PAGES = [README, "README_CN.md", *DOCS, "CONTRIBUTING.md", "CHANGELOG.md"]
PAIRS = [(page, page.replace(".md", "_CN.md")) for page in PAGES if page.replace(".md", "_CN.md") in PAGES]
ENGLISH = [page for page in PAGES if not page.endswith("_CN.md")]
COMMANDS = [
    (page, command)
    for page in ENGLISH
    for block in blocks(page)
    if block.kind.startswith("bash")
    for command in block.commands()
]


# Text, links and languages


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    assert {block.kind for block in blocks(page)} <= KINDS
    assert read(page).count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize(("page", "translation"), PAIRS)
def test_both_languages_have_the_same_content(page, translation):
    assert blocks(translation) == blocks(page)
    english, chinese = prose(page), prose(translation)
    for pattern in (r"^#{1,4} ", r"^\|", r"^\* ", r"^\*\*"):  # headings, rows, list items, questions
        count = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert count[0] == count[1], pattern
    code = re.compile(r"`([^`\n]+)`")
    assert set(code.findall(english)) == set(code.findall(chinese))


def test_the_table_of_console_commands():
    shown = dict(re.findall(r"^\| `glm-ms ([\w-]+)` \| `([^`]+)` \|$", prose(TRAINING), re.MULTILINE))
    scripts = {"msrun": "scripts/msrun_launcher.sh", "distribute": "scripts/run_distribute.sh"}
    tools = {name: f"tools/{file}" for name, (file, _) in console.TOOLS.items()}
    runs = {mode: f"run_glm.py --run_mode {mode}" for mode in console.RUN_MODES}
    assert shown == {**runs, **tools, **scripts}


def test_pages_exist_in_both_languages():
    named = {page for page, _ in PAIRS}
    assert {README, TRAINING, "docs/inference.md", "docs/cluster.md"} <= named
    assert len(read(README).splitlines()) <= MAX_README_LINES


def links(page: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not target.startswith("http")]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path), link


def test_the_readme_links_to_every_page():
    linked = {link.partition("#")[0] for link in [*links(README), *links("README_CN.md")]}
    assert {*DOCS, "CONTRIBUTING.md", "CHANGELOG.md"} <= linked


def test_images_are_small():
    images = [link for link in links(README) if link.endswith(".png")]
    assert images
    for link in images:
        assert (REPOSITORY / link).stat().st_size < 150_000


@pytest.mark.parametrize("page", [page for page in ENGLISH if page != "CHANGELOG.md"])
def test_paths_in_the_text_exist(page):
    """The changelog also names files of earlier versions."""
    folders = ("configs/", "glm_ms/", "tools/", "scripts/", "tests/", "docs/")
    paths = {path for path in re.findall(r"`([^`\s]+)`", prose(page)) if path.startswith(folders)}
    missing = [path for path in sorted(paths) if not (REPOSITORY / path).exists()]
    assert not missing


# Commands: files, flags, keys


def arguments_of(command: str) -> tuple[str, list[str]]:
    """Program (`run_glm.py`, `tools/train_vocab.py`, a module, else "") and its arguments; of a pipe, the last one."""
    tokens = shlex.split(command.rpartition(" | ")[2])
    for token in tokens:
        if token.startswith("run_glm.py "):  # given to a launcher as one argument
            return "run_glm.py", shlex.split(token)[1:]
    if tokens[0] == "glm-ms" and tokens[1] in console.RUN_MODES:
        return "run_glm.py", ["--run_mode", *tokens[1:]]
    if tokens[0] == "glm-ms" and tokens[1] in console.TOOLS:
        return f"tools/{console.TOOLS[tokens[1]][0]}", tokens[2:]
    modules = {**console.SERVING, **console.MEASURING}
    if tokens[0] == "glm-ms" and tokens[1] in modules:
        return modules[tokens[1]][0], tokens[2:]
    if tokens[:2] == ["bash", "scripts/run_standalone.sh"]:
        config, device, mode, *rest = tokens[2:]
        alone = [] if "--use_parallel" in rest else ["--use_parallel", "False"]
        return "run_glm.py", ["--config", config, *alone, "--device_id", device, "--run_mode", mode, *rest]
    if tokens[:2] == ["bash", "scripts/run_distribute.sh"]:
        _, config, _, mode, _, *rest = tokens[2:]
        return "run_glm.py", ["--config", config, "--use_parallel", "True", "--run_mode", mode, *rest]
    for place, token in enumerate(tokens):
        if token == "run_glm.py" or token.startswith("tools/"):
            return token, tokens[place + 1 :]
    return "", tokens


@pytest.mark.parametrize("command", [command for _, command in COMMANDS])
def test_command_names_what_exists(command):
    program, arguments = arguments_of(command)
    if program == "run_glm.py":
        ranks = ("msrun", "bash scripts/msrun_launcher.sh", "bash scripts/run_distribute.sh")
        check_run(arguments, parallel=command.startswith(ranks))
    elif program:
        check_tool(program, arguments)
    elif command.startswith("glm-ms configs "):
        assert (REPOSITORY / "configs" / arguments[arguments.index("--copy") + 1]).exists()
    elif arguments[0] == "curl":
        assert f"http://127.0.0.1:{PORT}/" in command
    elif arguments[0] == "openssl":
        assert arguments[-2] == ">"
    elif command in SETUP or command.startswith("bash scripts/test.sh"):
        assert all((REPOSITORY / name).exists() for name in arguments if name.startswith(("scripts/", "tests/")))
    else:
        assert arguments[0] == "head", f"add a check for: {command}"
        assert (REPOSITORY / arguments[3]).is_file()


def check_run(arguments: list[str], parallel: bool) -> None:
    """Flags, keys and values are right and the YAML exists; the other files need not."""
    parsed = parse_args(arguments)
    if "/" in parsed.config:
        settings = load_settings(REPOSITORY / parsed.config, parsed.overrides, parsed.flags, check_files=False)
    else:  # a file of MindFormers that the reader has
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, parsed.config)
            path.write_text(legacy_yaml(generation=3, pet=LORA), encoding="utf-8")
            settings = load_settings(path, parsed.overrides, parsed.flags, check_files=False)
        assert settings.model.pet_config.pet_type == "lora"
    assert settings.use_parallel == parallel


def check_tool(program: str, arguments: list[str]) -> None:
    """The tool exists and knows the flags."""
    assert {name for name in arguments if name.startswith("--")} <= flags_of(program)


@functools.cache
def flags_of(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, *([REPOSITORY / program] if program.endswith(".py") else ["-m", program]), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
        check=True,
    )
    return set(re.findall(r"--[\w-]+", done.stdout))


def test_the_check_of_commands_finds_mistakes():
    with pytest.raises(SettingsError, match="did you mean --epochs"):
        check_run(["--config", "configs/tiny/finetune_glm3_tiny.yaml", "--epoch", "2"], parallel=False)
    with pytest.raises(SettingsError, match="no such file"):
        check_run(["--config", "configs/tiny/no.yaml"], parallel=False)
    with pytest.raises(AssertionError):
        check_tool("tools/train_vocab.py", ["--size", "800"])


def test_the_error_shown_is_the_error_given():
    shown = next(block.text for block in blocks(TRAINING) if block.text.startswith("$ python run_glm.py"))
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


@pytest.mark.parametrize("page", ["docs/questions.md", "docs/questions_CN.md"])
def test_quoted_messages_are_in_the_code(page):
    """Those of this project; the section on Ascend quotes those of cards and their libraries."""
    text = re.split(r"^## (?:Ascend|昇腾)$", read(page), flags=re.MULTILINE)[0]
    quoted = [name.removesuffix(" ...") for name in re.findall(r"""^\*\*[^*]*?["“](.+?)["”]""", text, re.MULTILINE)]
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "glm_ms").rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)  # adjacent string literals
    assert len(quoted) >= 3
    for message in quoted:
        assert all(part in code for part in message.split("; ")), message


# Commands: run


def copy_records(source: Path, target: Path, count: int, names: dict[str, str] | None = None) -> None:
    """The first `count` lines, with columns renamed."""
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    for old, new in (names or {}).items():
        lines = [line.replace(f'"{old}"', f'"{new}"', 1) for line in lines]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Workplace:
    """A folder as a reader has it: configs, `python` on the PATH, and stand-ins for files of the reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, str] = {}  # command -> output
        shutil.copytree(REPOSITORY / "configs", folder / "configs")
        for name, count in KEPT.items():
            copy_records(SAMPLE / name, folder / "configs" / "tiny" / "sample" / name, count)
        for name in ("glm_ms", "tools", "scripts", "pyproject.toml", "run_glm.py"):
            (folder / name).symlink_to(REPOSITORY / name)
        yours = folder / "yours"
        yours.mkdir()
        columns = {"content": "question", "summary": "answer"}
        for name, count, other in (("train", NUM_TRAIN, "records"), ("dev", NUM_DEV, "held_out")):
            copy_records(SAMPLE / f"{name}.json", yours / f"{name}.json", count)
            copy_records(SAMPLE / f"{name}.json", yours / f"{other}.jsonl", count, columns)
        (yours / "tool_alpaca_train.json").write_text(json.dumps([TOOL_ALPACA]), encoding="utf-8")
        (yours / "chatglm3-6b").symlink_to(REPOSITORY / "tests" / "golden" / "models" / "glm3_tiny")
        (yours / "tokenizer.model").symlink_to(Path("..") / "output" / "tiny" / "tokenizer.model")
        (folder / "bin").mkdir()
        for name, arguments in (("python", ""), ("glm-ms", "-m glm_ms.commands")):
            launcher = folder / "bin" / name
            launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
            launcher.chmod(0o755)

    def run(self, command: str) -> str:
        """Output of a command, which runs once however often it is asked for."""
        if command not in self.done:
            text = command
            for theirs, ours in STAND_INS.items():
                text = text.replace(theirs, ours)
            self.done[command] = self._start(["bash", "-o", "pipefail", "-c", text])
        return self.done[command]

    @contextmanager
    def server(self, command: str) -> Iterator[int]:
        """A server until the block ends; yields its port."""
        process = subprocess.Popen(
            [str(self.folder / "bin" / "glm-ms"), *shlex.split(command)[1:], "--port", "0"],
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            lines = iter(process.stdout.readline, "")
            port = next(int(re.search(r":(\d+)", line)[1]) for line in lines if "loading" in line)
            assert any("is ready" in line for line in lines), command
            yield port
            process.terminate()
            assert process.wait(60) == 0, command
        finally:
            process.kill()
            process.communicate()

    def python(self, program: str) -> str:
        return self._start([str(self.folder / "bin" / "python"), "-c", program])

    def _environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"},
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "PYTHONUTF8": "1",
        }

    def _start(self, arguments: list[str]) -> str:
        environment = self._environment()
        done = subprocess.run(
            arguments,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("read me"))


# Files that the commands of a page leave.
RESULTS = {
    README: ["mine/model/plots/loss.png", "mine/scores/eval_scores.json", "mine/answers/predict_results.jsonl"],
    TRAINING: ["tiny/glm3_finetune/metrics.jsonl", "adgen_eval/eval_scores.json", "tiny/watched/eval_metrics.jsonl"],
    "docs/adapters.md": ["tiny/glm3_lora_eval/eval_scores.json", "tiny/glm3_merged/config.json"],
    "docs/data.md": ["tiny/tool_alpaca.jsonl", "tiny/lengths.png", "tiny/glm3_multiturn/metrics.jsonl"],
    "docs/chat.md": ["tiny/ptuning/generated_predictions.txt"],
    "docs/inference.md": ["tiny/glm3_predict/predict_results.jsonl", "tiny/glm3_export/export_settings.yaml"],
    "docs/benchmarks.md": ["bench.json", "bench.md", "bench.png"],
    "docs/conversion.md": ["glm3.ckpt", "glm3_hf/config.json", "tiny_hf/config.json"],
    "docs/quantization.md": ["tiny/glm3_int8/eval_scores.json", "tiny/glm3_quantized/model.safetensors"],
    "docs/cluster.md": ["two_ranks/metrics.jsonl"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", RESULTS)
def test_every_command_runs(workplace, page):
    """In the order of the page, as a reader would; most pages use the tiny model of docs/training.md."""
    first = [] if page == README else commands(TRAINING)[:2]
    for command in [*first, *commands(page)]:
        if command in SETUP:
            continue
        output = workplace.run(command)
        if "predict_glm3" in command and "--run_mode export" not in command:
            assert output.strip(), command
    if page == "docs/chat.md":
        workplace.python("\n".join(block.text for block in blocks(page) if block.kind == "python"))
    for name in RESULTS[page]:
        assert (workplace.folder / "output" / name).is_file(), name
    if page == "docs/data.md":
        made = workplace.folder / "output" / "sample"
        names = [path.name for path in made.iterdir()]
        assert names
        assert filecmp.cmpfiles(SAMPLE, made, names, shallow=False) == (names, [], [])
    if page == "docs/inference.md":
        program = "\n".join(block.text for block in blocks(page) if block.kind == "python")
        greedy, _, *joined, exported = workplace.python(program).split()  # Chinese text has no spaces
        texts = dict(zip(joined[::2], joined[1::2]))
        assert sorted(texts) == ["0", "1", "2"]
        assert texts["0"] == texts["2"] == greedy, "of prompts that join"
        assert exported == greedy, "of the exported files"


SERVED = {page for page in ENGLISH if any(block.kind == "bash server" for block in blocks(page))}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(SERVED))
def test_every_server_answers(workplace, page):
    """Servers and requests of a page, in its order, with the tiny model and an adapter."""
    if shutil.which("curl") is None or shutil.which("openssl") is None:
        pytest.skip("curl or openssl is missing: apt-get install curl openssl")
    for command in [*commands(TRAINING)[:2], commands("docs/adapters.md")[0]]:
        workplace.run(command)
    with ExitStack() as running:
        port = PORT
        for block in blocks(page):
            if block.kind == "bash server":
                running.close()
                *before, server = block.commands()
                for command in before:
                    workplace.run(command)
                port = running.enter_context(workplace.server(server))
            for command in block.commands() if block.kind == "bash client" else ():
                assert workplace.run(command.replace(f":{PORT}/", f":{port}/")).strip(), command


def test_every_page_with_commands_is_run():
    pages = {page for page in ENGLISH if set(commands(page)) - SETUP}
    assert pages == set(RESULTS)
