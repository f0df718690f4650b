"""`glm-ms web` and `launch_web_demo`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from glm_ms import serve
from glm_ms.serve import server, web_demo
from glm_ms.serve.web_page import FOLDER

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "tests" / "golden" / "models" / "glm3_tiny"


@pytest.fixture
def served(monkeypatch):
    """What `server.serve` is called with."""
    calls = []

    def note(bound, load, drain_seconds, **app):
        calls.append({"port": bound.getsockname()[1], **app})
        bound.close()

    monkeypatch.setattr(server, "serve", note)
    return calls


@pytest.mark.parametrize("flags", [[], ["--web"]])
def test_the_command_is_that_of_the_server_with_the_page(served, flags):
    assert web_demo.main(["--model", str(MODEL), "--port", "0", *flags]) == 0
    assert [call["web"] for call in served] == [True]
    assert server.main(["--model", str(MODEL), "--port", "0"]) == 0
    assert [call["web"] for call in served] == [True, False]


def test_the_function_serves_the_page(served):
    serve.launch_web_demo(None, None, port=0)
    assert [call["web"] for call in served] == [True]


@pytest.mark.parametrize("share", [True, 1, "yes", None])
def test_no_server_of_others_is_used(served, share):
    with pytest.raises(ValueError, match=r"ssh -L 8000:127\.0\.0\.1:8000"):
        serve.launch_web_demo(None, None, share=share)
    assert not served


@pytest.mark.slow
def test_a_process_shows_the_page_before_its_model_is_loaded(tokenizer):
    folder = Path(tokenizer.vocab_file).parent
    (folder / "tokenizer_config.json").write_text('{"model_generation": 3}', encoding="utf-8")
    command = [sys.executable, "-m", "glm_ms.commands", "web", "--model", str(MODEL), "--tokenizer",
               str(folder), "--port", "0", "--slots", "2", "--context", "64"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = re.fullmatch(r"(http://127\.0\.0\.1:\d+/) is the chat page\n", process.stdout.readline()).group(1)
            assert httpx.get(url, timeout=60, trust_env=False).content == (FOLDER / "index.html").read_bytes()
            for line in process.stdout:
                if "is ready" in line:
                    break
            found = httpx.get(f"{url}v1/models", trust_env=False).json()["data"]
            assert [model["id"] for model in found] == [MODEL.name]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
