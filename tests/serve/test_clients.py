"""The packages that people use to talk to such servers, each in a process of its own.

They are looked for in the interpreter that GLM_MS_CLIENTS names, and else installed in an environment of the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serve.chat_helpers import Speaker, called
from serve.environments import python_with, run_or_skip
from serve.service import running_engine, running_server

from glm_ms.serve.auth import Keys

pytestmark = pytest.mark.slow
CLIENTS = Path(__file__).parent / "clients"
KEY = "key-of-the-test-0123456789"
PACKAGES = ("openai", "anthropic", "langchain-openai", "litellm")
NODE_PACKAGES = ("ai", "@ai-sdk/openai-compatible", "zod")
# Only what programs need: no settings of this test run, and no addresses beside that of the server.
ENVIRONMENT = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ} | {"PYTHONUTF8": "1"}


class Scene(Speaker):
    """Answers by the prompt: two calls to the question about the weather, then an answer from their results."""

    def open(self, ids, *arguments, **options):
        slot = super().open(ids, *arguments, **options)
        question = self.prompt
        if "<|observation|>" in question:
            self.say("\n it is 22")
        elif "weather<|assistant|>" in question:
            calls = [called(name, f"city='{city}'") for name, city in (("get_weather", "北京"), ("get_time", "x"))]
            self.say(*calls, end="<|observation|>")
        else:
            self.say("\n the quick fox 🦊")
        self.answers = {**getattr(self, "answers", {}), slot: self.answer}
        return slot

    def fork(self, slots):
        made = super().fork(slots)
        self.answers.update((copy, self.answers[slot]) for slot, copy in zip(slots, made))
        return made

    def answer_of(self, slot):
        return self.answers[slot]


@pytest.fixture(scope="module")
def address(tokenizer):
    with running_engine(tokenizer, Scene(tokenizer)) as engine, running_server(engine, keys=Keys([KEY])) as found:
        yield found


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return python_with(PACKAGES, "GLM_MS_CLIENTS", tmp_path_factory.mktemp("clients"))


@pytest.mark.parametrize("script", sorted(path.name for path in CLIENTS.glob("*.py")))
def test_python_clients(address, python, script):
    command = [python, str(CLIENTS / script), address, KEY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_program_of_the_documentation(address, python):
    page = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
    (program,) = re.findall(
        r"^```python openai\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    for shown, here in (("http://127.0.0.1:8000", address), ("your key", KEY), ("chatglm3-6b", "tiny")):
        assert shown in program
        program = program.replace(shown, here)
    done = subprocess.run([python, "-c", program], capture_output=True, timeout=180, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stdout.decode() == "the quick fox 🦊"


def test_the_ai_sdk_of_node(address, tmp_path):
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("node and npm are missing: apt-get install nodejs npm")
    folder = Path(os.environ.get("GLM_MS_NODE_CLIENTS", tmp_path))
    if folder == tmp_path:
        options = {"cwd": folder, "env": {**os.environ, "npm_config_update_notifier": "false"}}
        run_or_skip(
            [npm, "install", "--no-audit", "--no-fund", *NODE_PACKAGES], f"not installed: {NODE_PACKAGES}", **options
        )
    script = tmp_path / "ai_sdk.mjs"
    shutil.copy(CLIENTS / script.name, script)
    if folder != tmp_path:
        (tmp_path / "node_modules").symlink_to(folder / "node_modules")
    command = [node, str(script), address, KEY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
