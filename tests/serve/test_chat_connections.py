"""A client that leaves the chat interfaces frees what its answer uses, at once."""

from __future__ import annotations

import contextlib

import httpx
import pytest
from serve.chat_helpers import Speaker
from serve.service import running_engine, running_server, wait_until

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3000}
REQUESTS = {
    "/v1/chat/completions": {**BODY, "n": 2},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3000},
    "/v1/messages": BODY,
}


@pytest.fixture(scope="module")
def server(tokenizer):
    speaker = Speaker(tokenizer)
    speaker.say("\n hello there", end=None)
    speaker.answer *= 100
    with running_engine(tokenizer, speaker) as engine, running_server(engine) as address:
        yield address, speaker


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_is_free_at_once(server, path, stream):
    address, speaker = server
    begun = len(speaker.prompts)
    with contextlib.suppress(httpx.TimeoutException), httpx.Client(timeout=30 if stream else 0.2) as client:
        if stream:
            with client.stream("POST", address + path, json={**REQUESTS[path], "stream": True}) as response:
                assert response.status_code == 200
                seen = b""
                for part in response.iter_raw():  # events may come before the prompt is read
                    seen += part
                    if b"hello" in seen:
                        break
        else:
            client.post(address + path, json=REQUESTS[path])
    assert len(speaker.prompts) == begun + 1
    generated = max((len(one.generated) for one in speaker.running.values()), default=0)
    wait_until(lambda: not speaker.running)
    assert generated < 3000
