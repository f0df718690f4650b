"""Thousands of requests that schemathesis makes from the OpenAPI document: none of them ends in a server error.

It is looked for in the interpreter that GLM_MS_SCHEMATHESIS names, and else installed in an environment of the test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from serve.fakes import FakeDecoder
from serve.service import PADDING, client_of, running_engine, running_server

from glm_ms.serve.auth import Keys

KEY = "0123456789abcdef"
EXAMPLES = 150  # for each operation and phase


def test_the_document_describes_every_operation(tokenizer):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        document = client.get("/openapi.json").json()
        operations = {(method, path) for path, item in document["paths"].items() for method in item}
        assert {("post", "/v1/completions"), ("post", "/v1/chat/completions"), ("post", "/"), ("get", "/ready")} <= (
            operations
        )
        for item in document["paths"].values():
            for operation in item.values():
                assert operation["summary"]
        fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
        assert {"prompt", "temperature", "logit_bias", "stream_options"} <= set(fields)


@pytest.mark.slow
def test_no_request_is_a_server_error(tokenizer, tmp_path):
    python = interpreter(tmp_path)
    decoder = FakeDecoder(tokenizer.vocab_size + PADDING, slots=8, capacity=128)
    with running_engine(tokenizer, decoder) as engine, running_server(engine, keys=Keys([KEY])) as url:
        command = [
            python, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
            "--checks", "not_a_server_error", "--max-examples", str(EXAMPLES), "--seed", "1", "--workers", "4",
            "--generation-deterministic", "--suppress-health-check", "all", "--continue-on-failure", "--no-color",
            "--report", "json", "--report-json-path", str(tmp_path / "report.json"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert not decoder.running
    cases = json.loads((tmp_path / "report.json").read_text("utf-8"))["test_cases"]
    assert cases["generated"] >= 2000
    assert cases["errored"] == 0


def interpreter(folder):
    """A Python that has schemathesis."""
    given = os.environ.get("GLM_MS_SCHEMATHESIS")
    if given:
        return given
    subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True, timeout=300)
    found = str(folder / "environment" / "bin" / "python")
    install = [found, "-m", "pip", "install", "-q", "schemathesis>=4"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"schemathesis cannot be installed: {done.stderr.strip()[-200:]}")
    return found
