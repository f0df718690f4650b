"""The terminal: commands, histories and tools with a scripted model; a real pseudo-terminal with a network."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import pytest
from mindspore import nn
from safetensors.numpy import load_file, save_file

from glm_ms.generation.chat import ConversationTooLongError
from glm_ms.ops import registry
from glm_ms.ops.portable import RMSNormalize
from glm_ms.serve import terminal
from glm_ms.serve.terminal import Terminal, main, without_oldest_round
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer

CALL = {"name": "get_weather", "parameters": {"city": "北京", "days": 3}}


class Script:
    """Rounds with given answers; an answer is a list of its pieces, or of pieces and a call."""

    def __init__(self, *answers: list[Any], room: int = 1000) -> None:
        self.answers, self.room, self.asked = list(answers), room, list[Any]()
        self.cut = False

    def __call__(self, query: str, history: list[Any], role: str) -> Any:
        self.asked.append((query, list(history), role))
        room = self.room - sum(len(item["content"]) for item in history) - len(query)
        if room < 1:
            raise ConversationTooLongError("too long")
        options = {"max_length": self.room, "max_new_tokens": room}

        def stream(_: Callable[[], bool]) -> Generator[tuple[Any, list[Any]], None, None]:
            shown: Any = ""
            before = [*history, {"role": role, "content": query}]
            for piece in self.answers.pop(0):
                if isinstance(piece, Exception):
                    raise piece
                shown = shown + piece if isinstance(piece, str) else piece
                yield shown, [*before, {"role": "assistant", "content": str(shown)}]

        return SimpleNamespace(stream=stream, room=room, options=options, cut=self.cut, stopped=False)


def talk(
    monkeypatch: pytest.MonkeyPatch, script: Script, text: str | bytes, first: Any = (), with_tools: bool = False
) -> str:
    """What a terminal without a screen writes when it reads a text."""
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
    out = io.StringIO()
    Terminal(script, first, with_tools, out).run("title")
    return out.getvalue()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_questions_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["你", "好😀"], ["再", "见"])
    assert talk(monkeypatch, script, "第一\n\n  \n第二") == "你好😀\n再见\n"
    (first, before, role), (second, after, _) = script.asked
    assert (first, before, role, second) == ("第一", [], "user", "第二")
    assert after == [message("user", "第一"), message("assistant", "你好😀")]


def test_clear_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    script, first = Script(["a"], ["b"]), [message("system", "简短")]
    shown = talk(monkeypatch, script, "一\nclear\n二\nstop\n三\n", first)
    assert shown == "a\n[the conversation is forgotten]\nb\n"
    assert [history for _, history, _ in script.asked] == [first, first]
    assert first == [message("system", "简短")]


def test_messages_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["a"], ["b"], ["c"])
    talk(monkeypatch, script, '"""\n一\n\n stop\n"""\n"""二"""\n """三\n四""" \n')
    assert [query for query, _, _ in script.asked] == ["一\n\n stop", "二", "三\n四"]


def test_results_of_calls_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["我来查", CALL], ["晴"], [CALL])
    shown = talk(monkeypatch, script, '天气\n{"weather": "晴"}\n再问\n', with_tools=True)
    assert shown == "我来查\n[get_weather(city='北京', days=3)]\n晴\n\n[get_weather(city='北京', days=3)]\n"
    assert [role for _, _, role in script.asked] == ["user", "observation", "user"]


def test_errors_do_not_end_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([FloatingPointError("nan")], ["好"])
    shown = talk(monkeypatch, script, "一\n".encode() + b"\xff\xfe\n" + "二\n".encode())
    assert shown == "[error: nan]\n[this line is not UTF-8; it is left out]\n好\n"
    assert script.asked[1][1] == []


def test_old_rounds_are_forgotten_where_the_answer_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["甲" * 30], ["乙" * 30], ["丙"], room=100)
    shown = talk(monkeypatch, script, "一" * 10 + "\n" + "二" * 10 + "\n三\n")
    assert shown.count("[the conversation is long: its oldest round is forgotten]") == 1
    assert [item["content"][0] for item in script.asked[-1][1]] == ["二", "乙"]
    shown = talk(monkeypatch, Script(["好"], room=100), "长" * 200 + "\n短\n")
    assert shown == "[error: too long]\n好\n"


def test_a_cut_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["好"])
    script.cut = True
    assert talk(monkeypatch, script, "问\n") == "好\n[cut at 999 tokens]\n"


def test_rounds_of_a_history() -> None:
    system, user, answer = message("system", "s"), message("user", "q"), message("assistant", "a")
    assert without_oldest_round([("a", "b"), ("c", "d")], 0) == [("c", "d")]
    assert without_oldest_round([system, user, answer, message("observation", "o"), answer, user, answer], 1) == [
        system, user, answer,
    ]  # fmt: skip
    assert without_oldest_round([system, user, answer], 1) == [system]
    assert without_oldest_round([system], 1) is None


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(list(arguments))
    return status, capsys.readouterr().err


def test_files_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: ChatGLM3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = str(tmp_path / "nothing")
    for name in ("--system", "--tools"):
        assert run_main(capsys, "--model", nothing, name, nothing) == (1, f"error: {nothing}: no such file\n")
    tools = tmp_path / "tools.json"
    for content, problem in (("[5]", "must be a list of objects"), ("[", "not valid JSON"), ("[{}]", "no tool has a")):
        tools.write_text(content)
        status, shown = run_main(capsys, "--model", nothing, "--tools", str(tools))
        assert (status, problem in shown, str(tools) in shown) == (1, True, True), shown
    status, shown = run_main(capsys, "--model", nothing)
    assert status == 1
    assert shown.startswith(f"error: {nothing}: no such file or folder")
    model = ChatGLM2Tokenizer(tokenizer.vocab_file)
    monkeypatch.setattr(terminal, "load_model", lambda *_: (None, model))
    tools.write_text('[{"name": "f"}]')
    with pytest.raises(SystemExit):
        main(["--model", nothing, "--tools", str(tools)])
    assert "ChatGLM2Tokenizer knows neither" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, golden: Path, tokenizer: ChatGLM3Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model") / "glm3"
    folder.mkdir()
    weights = golden / "models" / "glm3_tiny"
    tensors = load_file(weights / "model.safetensors")
    rows = tensors["transformer.output_layer.weight"]
    # No stop token is ever the likeliest: an answer lasts until Ctrl-C or its limit.
    rows[[tokenizer.eos_token_id, *(tokenizer.get_command(name) for name in ("<|user|>", "<|observation|>"))]] = 0
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((weights / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "seq_length": 2048}))
    shutil.copy(tokenizer.vocab_file, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"model_generation": 3}')
    return folder


class Screen:
    """`glm-ms chat` in a pseudo-terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        master, slave = pty.openpty()
        self._file = master
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glm_ms.commands", "chat", *arguments],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, close_fds=True,
            env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"},
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def write(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait(self, found: Callable[[str], Any], seconds: float = 240, again: str = "") -> None:
        """Reads until the text since the last wait is as expected; types `again` every two seconds until then."""
        start, content, end = len(self.shown), b"", time.monotonic() + seconds
        typed = time.monotonic()
        while not found(content.decode("utf-8", "ignore")):
            if again and time.monotonic() > typed + 2:
                self.write(again)
                typed = time.monotonic()
            assert time.monotonic() < end, self.shown + content.decode("utf-8", "replace")
            if select.select([self._file], [], [], 0.05)[0]:
                try:
                    content += os.read(self._file, 65536)
                except OSError:  # the program has closed it
                    assert found(content.decode("utf-8", "ignore")), self.shown + content.decode("utf-8", "replace")
                    break
        self.shown = self.shown[:start] + content.decode("utf-8", "replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._file)


@pytest.fixture
def screen(model_folder: Path) -> Iterator[Screen]:
    one = Screen("--model", str(model_folder), "--greedy")
    yield one
    one.close()


def test_in_a_pseudo_terminal(screen: Screen) -> None:
    """Ctrl-C as the keyboard sends it, pasted lines, commands; random weights answer up to the limit."""

    def prompt(text: str) -> bool:
        return text.rstrip().endswith(">") or text.endswith("> ")

    screen.wait(prompt)
    assert "glm3. Type a message" in screen.shown
    screen.write("你好\r")
    screen.wait(lambda text: len(re.sub(r"\s", "", text)) > 40)  # an answer that comes piece by piece
    screen.write("\x03")
    screen.wait(lambda text: "[stopped]" in text and prompt(text))
    screen.write("half a line\x03")
    screen.wait(prompt, again="\x03")  # Python misses one between the prompt and its wait for keys
    screen.write("\x1b[200~第一行\n第二行\x1b[201~\r")
    screen.wait(lambda text: len(re.sub(r"\s", "", text)) > 40)
    screen.write("\x03")
    screen.wait(lambda text: "[stopped]" in text and prompt(text))
    assert "第二行" in screen.shown
    screen.write("clear\r")
    screen.wait(lambda text: "the conversation is forgotten" in text and prompt(text))
    screen.write("stop\r")
    assert screen.process.wait(60) == 0
    assert "Traceback" not in screen.shown


@pytest.mark.slow
def test_a_pipe(model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glm_ms.commands", "chat", "--model", str(model_folder), "--greedy",
         "--max-new-tokens", "3"],
        input="你好\n", capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[cut at 3 tokens]\n")
    assert "Type a message" not in done.stdout
    assert done.stderr == ""


def test_kernels_of_the_device_are_used(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Kernel(RMSNormalize):
        calls = 0

        @staticmethod
        def why_not(cell: RMSNormalize, dtype: ms.Type) -> None:
            return None

        @staticmethod
        def replacing(cell: RMSNormalize, dtype: ms.Type) -> nn.Cell:
            Kernel.calls += 1
            return Kernel(cell.eps)

    monkeypatch.setitem(registry.OPERATORS, ("RMS norm", "CPU"), Kernel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode())))
    assert main(["--model", str(model_folder), "--greedy", "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("[cut at 2 tokens]\n")
    compared, chosen = shown.err.splitlines()
    assert compared.startswith("comparing fused kernels with the portable operators")
    norms = int(re.match(r"RMS norm: fused kernel in (\d+) cells; ", chosen)[1])
    assert Kernel.calls == norms + 2  # and one in each comparison: of a chunk, and of a step


@pytest.mark.parametrize("options", [{"max_new_tokens": -5}, {"temperature": float("nan")}, {"top_p": 2.0}])
def test_options_that_no_answer_can_use(capsys, options):
    with pytest.raises(SystemExit) as ended:
        terminal.check_options(options, terminal._parser())
    assert ended.value.code == 2
    assert next(iter(options)) in capsys.readouterr().err
