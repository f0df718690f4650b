"""Clients that leave, a queue that is full, and a server that stops: nothing is computed for nobody."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from serve.fakes import FakeDecoder
from serve.service import PADDING, client_of, running_engine, running_server, wait_until

from glm_ms.serve.app import create_app
from glm_ms.serve.http_server import Server

PROMPT = {"prompt": "hello there", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


class Gated(FakeDecoder):
    """Steps wait for the gate."""

    def __init__(self, vocab_size, **options):
        super().__init__(vocab_size, **options)
        self.gate = threading.Event()
        self.steps = 0

    def step(self, slots, tokens):
        self.steps += 1
        if self.steps > 3:
            assert self.gate.wait(20)
        return super().step(slots, tokens)


@pytest.fixture
def decoder(tokenizer):
    decoder = Gated(tokenizer.vocab_size + PADDING, slots=2, capacity=128)
    yield decoder
    decoder.gate.set()


def request_over(url, body, path="/v1/completions"):
    """A socket that has sent a request."""
    content = json.dumps(body).encode()
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(tokenizer, decoder, stream):
    with running_engine(tokenizer, decoder) as engine, running_server(engine) as url:
        connection = request_over(url, {**PROMPT, "stream": stream, "n": 2})
        wait_until(lambda: decoder.steps == 4)  # the fourth one waits
        if stream:
            received = b""  # the head comes first, the text perhaps in a later packet
            while b"text_completion" not in received:
                part = connection.recv(65536)
                assert part, received
                received += part
        connection.close()
        time.sleep(0.05)  # until the server has seen it
        decoder.gate.set()
        wait_until(lambda: engine.scheduler.stats.running == 0)
        assert decoder.steps < 100
        assert not decoder.running
        assert engine.scheduler.stats.finished == {"cancelled": 2}


def test_a_client_that_leaves_the_queue(tokenizer, decoder):
    with running_engine(tokenizer, decoder) as engine, running_server(engine) as url:
        running = request_over(url, {**PROMPT, "n": 2})
        wait_until(lambda: decoder.steps == 4)
        waiting = request_over(url, PROMPT)
        wait_until(lambda: engine.scheduler.stats.waiting == 1)
        waiting.close()
        wait_until(lambda: engine.scheduler.stats.waiting == 0)
        decoder.gate.set()
        running.close()


def test_a_client_that_leaves_before_its_body_has_arrived(tokenizer, decoder):
    with running_engine(tokenizer, decoder) as engine, client_of(engine) as client:
        parts = urlsplit(str(client.base_url))
        connection = socket.create_connection((parts.hostname, parts.port))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 1000\r\n\r\n{")  # fmt: skip
        connection.close()
        assert client.get("/ready").status_code == 200
        assert engine.scheduler.stats.waiting == engine.scheduler.stats.running == 0


def test_a_full_queue(tokenizer, decoder):
    with running_engine(tokenizer, decoder, max_queue=1) as engine, client_of(engine) as client:
        others = [request_over(str(client.base_url), {**PROMPT, "n": 2})]
        wait_until(lambda: decoder.steps == 4)
        others.append(request_over(str(client.base_url), PROMPT))
        wait_until(lambda: engine.scheduler.stats.waiting == 1)
        answer = client.post("/v1/completions", json={**PROMPT, "stream": True})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["Retry-After"]) >= 1
        decoder.gate.set()
        wait_until(lambda: engine.scheduler.stats.running == engine.scheduler.stats.waiting == 0)
        # Several prompts of one request run together or not at all.
        decoder.gate.clear()
        decoder.steps = 0
        answer = client.post("/v1/completions", json={**PROMPT, "prompt": ["hello there"] * 4, "n": 2})
        assert answer.status_code == 429
        decoder.gate.set()
        wait_until(lambda: engine.scheduler.stats.running == engine.scheduler.stats.waiting == 0)
        assert not decoder.running
        for other in others:
            other.close()


def test_a_time_limit_ends_an_answer(tokenizer, decoder):
    with running_engine(tokenizer, decoder, seconds=0.15) as engine, client_of(engine) as client:
        threading.Timer(0.2, decoder.gate.set).start()
        found = client.post("/v1/completions", json=PROMPT).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert 0 < found["usage"]["completion_tokens"] < 100


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_stops_ends_answers_with_an_error(tokenizer, decoder, stream):
    with running_engine(tokenizer, decoder) as engine, client_of(engine) as client:
        found = []
        body = {**PROMPT, "stream": stream}
        asking = threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=body)))
        asking.start()
        wait_until(lambda: decoder.steps == 4)
        assert not engine.scheduler.drain(0.01)
        decoder.gate.set()
        asking.join(10)
        (answer,) = found
        if stream:
            *_, error, done, _ = answer.text.split("\n\n")
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stopping"
            assert done == "data: [DONE]"
        else:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "stopping"


def test_a_decoder_that_fails_is_an_error_of_its_requests_only(tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size + PADDING, capacity=128)
    with running_engine(tokenizer, decoder) as engine, client_of(engine) as client:
        decoder.broken.add("step")
        answer = client.post("/v1/completions", json=PROMPT)
        assert answer.status_code == 500
        assert "is broken" in answer.json()["error"]["message"]
        text = client.post("/v1/completions", json={**PROMPT, "stream": True}).text
        assert "server_error" in text
        assert text.endswith("data: [DONE]\n\n")
        decoder.broken.clear()
        assert client.post("/v1/completions", json={**PROMPT, "max_tokens": 3}).status_code == 200
        assert not decoder.running


def test_many_clients_at_a_time(tokenizer):
    """Each gets what it gets alone, whatever the others do."""
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        bodies = [
            {"prompt": f"hello there {number}", "max_tokens": 4 + number, "seed": number, "temperature": 1.5}
            for number in range(8)
        ]
        alone = [client.post("/v1/completions", json=body).json()["choices"] for body in bodies]
        found: dict[int, list] = {}

        def ask(number: int) -> None:
            with httpx.Client(base_url=client.base_url, timeout=20, trust_env=False) as own:
                found[number] = own.post("/v1/completions", json=bodies[number]).json()["choices"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert [found[number] for number in range(len(bodies))] == alone


def test_a_slow_body_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("glm_ms.serve.guards.CheckBody.__init__.__defaults__", (1 << 20, 0.05))
    with client_of(None) as client:
        parts = urlsplit(str(client.base_url))
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 10\r\n\r\n{")  # fmt: skip
            assert b" 408 " in connection.recv(1000)


def test_a_second_signal_ends_answers_in_order(tokenizer, caplog):
    decoder = FakeDecoder(tokenizer.vocab_size + PADDING, capacity=10**6)
    bound = socket.create_server(("127.0.0.1", 0))
    with running_engine(tokenizer, decoder) as engine:
        server = Server(create_app(engine), bound, 60.0, lambda line: None)
        thread = threading.Thread(target=server.serve_engine, args=(lambda: engine,), daemon=True)
        thread.start()
        wait_until(lambda: server.started and server.app.state.engine is not None)
        body = {**PROMPT, "max_tokens": 10**5, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20, trust_env=False) as answer:
            lines = answer.iter_lines()
            assert '"text"' in next(lines)
            for _ in range(2):
                server.handle_exit(signal.SIGINT, None)
            *_, last, done = [line for line in lines if line]
        thread.join(10)
        assert not thread.is_alive()
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert done == "data: [DONE]"
        assert not decoder.running
        assert not caplog.text
