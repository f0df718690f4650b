"""`glm-ms serve` as a process: arguments, start, an orderly end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from serve.fakes import FakeDecoder
from serve.service import PADDING, make_engine, wait_until

from glm_ms.serve import server
from glm_ms.serve.auth import KEY_VARIABLE

MODEL = Path(__file__).resolve().parents[1] / "golden" / "models" / "glm3_tiny"
KEY = "0123456789abcdef"


@pytest.fixture
def refused(capsys, monkeypatch):
    """The message of arguments that cannot be used."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def run(*arguments):
        try:
            status = server.main(["--model", str(MODEL), *map(str, arguments)])
        except SystemExit as error:
            status = error.code
        assert status == 2
        return capsys.readouterr().err

    return run


def test_other_machines_need_a_key(refused, tmp_path):
    for host in ("0.0.0.0", "::"):
        message = refused("--host", host)
        assert "--api-key-file" in message
        assert "--insecure" in message
    assert "no key" in refused("--host", "0.0.0.0", "--api-key-file", _file(tmp_path, "# nothing\n"))


def test_a_port_in_use(refused):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "--port" in refused("--port", other.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "65536"], "0 to 65535"),
        (["--port", "x"], "whole number"),
        (["--slots", "0"], "1 to 1024"),
        (["--context", "-5"], "whole number"),
        (["--max-seconds", "0"], "above 0"),
        (["--max-seconds", "nan"], "above 0"),
        (["--host", "no.such.host.invalid"], "no such address"),
        (["--cors-origin", "*"], "https://"),
        (["--cors-origin", "https://a.example/path"], "without a path"),
        (["--allowed-hosts", "models.example.org:443"], "without scheme and port"),
        (["--allowed-hosts", "*"], "must be a name"),
        (["--adapter", "x"], "NAME=PATH"),
        (["--lora-alpha", "x=8"], "there is no adapter x"),
        (["--api-key-file", "/nowhere/keys"], "no such file"),
        (["--slot", "4"], "unrecognized"),
    ],
)
def test_wrong_arguments(refused, arguments, words):
    assert words in refused(*arguments)


def test_a_model_that_is_missing(capsys, tmp_path):
    path = tmp_path / "nowhere"
    assert server.main(["--model", str(path), "--model-generation", "3", "--port", "0"]) == server.FAILED
    assert f"error: {path}: no such file or folder" in capsys.readouterr().err


def test_a_device_that_is_missing(capsys, monkeypatch, tokenizer):
    def refuse(*_):
        raise RuntimeError("Unsupported device target Ascend.\nThe stack of MindSpore")

    monkeypatch.setattr("mindspore.set_device", refuse)
    arguments = ["--tokenizer", str(Path(tokenizer.vocab_file)), "--model-generation", "3", "--device-target", "Ascend"]
    assert server.main(["--model", str(MODEL), *arguments, "--port", "0"]) == server.FAILED
    message = capsys.readouterr().err
    assert "--device-target Ascend --device-id 0: cannot be used here: Unsupported device" in message
    assert "stack" not in message


def test_missing_packages_are_named(refused, monkeypatch):
    monkeypatch.setattr(server, "PACKAGES", ("fastapi", "no_such_package"))
    message = refused()
    assert "no_such_package" in message
    assert "pip install 'glm_ms[serve]'" in message


def _file(folder, text):
    path = folder / "file"
    path.write_text(text, encoding="utf-8")
    return path


class Process:
    """A server that runs with the tiny model."""

    def __init__(self, tokenizer, *arguments, **environment):
        command = [sys.executable, "-m", "glm_ms.serve.server", "--model", str(MODEL), "--tokenizer",
                   str(Path(tokenizer.vocab_file).parent), "--port", "0", *map(str, arguments)]  # fmt: skip
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().partition(": ")[0]
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait_until_ready(self):
        wait_until(lambda: self.process.poll() is not None or self.client.get("/ready").status_code == 200, 120)
        assert self.process.poll() is None, self.process.stderr.read()

    def end(self, number=signal.SIGTERM):
        """Sends a signal; returns status, the rest of the output, messages."""
        self.process.send_signal(number)
        output, messages = self.process.communicate(timeout=60)
        return self.process.returncode, output, messages

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    """The small vocabulary in a folder that says whose it is."""
    Path(tokenizer.vocab_file).with_name("tokenizer_config.json").write_text('{"model_generation": 3}', "utf-8")
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["import", "load"])
def test_a_signal_before_the_model_is_loaded(chat_tokenizer, moment):
    with Process(chat_tokenizer) as server:
        if moment == "load":
            wait_until(lambda: server.client.get("/health").status_code == 200, 60)
        status, output, messages = server.end()
        assert status == 128 + signal.SIGTERM
        assert "ready" not in output
        assert "Traceback" not in messages


@pytest.mark.slow
def test_weights_that_cannot_be_loaded(chat_tokenizer, tmp_path):
    with Process(chat_tokenizer, "--config", tmp_path / "missing.yaml") as server:
        output, messages = server.process.communicate(timeout=120)
        assert server.process.returncode == 1
        assert messages.startswith("error: ")
        assert "missing.yaml" in messages
        assert "stopped" not in output


PROGRAM = """
import asyncio, sys
from glm_ms import ChatGLM3Tokenizer, load_pretrained
from glm_ms.serve import launch_server

async def notebook():
    launch_server(model, tokenizer, port=0, name="mine", slots=2, context=64)

model, tokenizer = load_pretrained(sys.argv[1]), ChatGLM3Tokenizer(sys.argv[2])
asyncio.run(notebook())
"""


@pytest.mark.slow
def test_launch_server_in_a_notebook(chat_tokenizer):
    command = [sys.executable, "-c", PROGRAM, str(MODEL), chat_tokenizer.vocab_file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().partition(": ")[0]
            assert "models: mine" in process.stdout.readline()
            body = {"prompt": "hello", "max_tokens": 3}
            found = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).json()
            assert found["model"] == "mine"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) != 0  # KeyboardInterrupt, as any cell of a notebook
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health", trust_env=False)
        finally:
            process.kill()


@pytest.mark.slow
def test_a_server_from_start_to_end(chat_tokenizer):
    with Process(chat_tokenizer, "--slots", 2, "--context", 64, **{KEY_VARIABLE: KEY}) as server:
        assert server.client.get("/health").status_code == 200
        server.wait_until_ready()
        assert server.client.get("/v1/models").status_code == 401
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        (model,) = server.client.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("glm3_tiny", 64)
        body = {"prompt": "hello there", "max_tokens": 40, "ignore_eos": True, "seed": 1}
        alone = server.client.post("/v1/completions", json=body).json()
        found = []

        def read():
            with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                for line in answer.iter_lines():
                    found.append(line)

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: bool(found))
        # The stream ends whole, although the server has been told to stop.
        status, output, messages = server.end()
        reading.join(30)
        assert (status, messages) == (0, "")
        assert "is ready; models: glm3_tiny" in output
        assert output.endswith("stopped\n")
        assert found[-2] == "data: [DONE]"
        assert any('"finish_reason":"length"' in line for line in found)
        assert alone["choices"][0]["finish_reason"] == "length"
        assert KEY not in output + messages


def test_a_failure_ends_the_server(tokenizer, caplog):
    """Who watches the process starts it again; the request that meets the failure still gets its answer."""
    decoder = FakeDecoder(tokenizer.vocab_size + PADDING, capacity=128)
    bound, errors = server.bind("127.0.0.1", 0), []

    def run():
        try:
            server.serve(bound, lambda: make_engine(tokenizer, decoder), 1.0)
        except server.ServerError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=20) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        decoder.broken.add("free")
        answer = client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2, "ignore_eos": True})
        assert answer.status_code == 500
        assert "free is broken" in answer.json()["error"]["message"]
    thread.join(20)
    assert not thread.is_alive()
    assert errors == ["the server has failed: free is broken; start it again"]
    assert "the scheduler has failed; the server ends" in caplog.text
