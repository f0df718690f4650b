"""Many clients of all kinds for a while, with the network and its adapters: nothing fails, leaks or mixes up.

GLM_MS_SOAK_SECONDS sets how long it takes; 60 by default.
"""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from reference import FOLDER, fresh_golden_model
from serve.service import running_server, wait_until

from glm_ms.peft.adapter import read_adapter
from glm_ms.serve.auth import Keys
from glm_ms.serve.loading import build_engine
from glm_ms.serve.settings import ServeSettings
from glm_ms.tokenizer import ChatGLM2Tokenizer

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("GLM_MS_SOAK_SECONDS", "60"))
CLIENTS, SLOTS, CONTEXT, KINDS = 32, 8, 64, 48
KEY = "0123456789abcdef"
TRAIN = FOLDER.parent / "train"
ADAPTERS = {"ads": TRAIN / "lora" / "final", "titles": TRAIN / "ptuning_v2" / "final.safetensors"}
GROWTH = 48 << 20  # bytes, from the middle of the run to its end
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "n": 99}',
    b'{"prompt": "a", "model": "none"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "max_tokens": 100000}',
    b'{"prompt": "' + b"a" * 100_000 + b'"}',
)


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bodies() -> list[dict]:
    """Requests of all kinds; what each gets alone is what it gets in any company."""
    generator, made = np.random.default_rng(4), []
    shared = generator.integers(3, 300, 20).tolist()  # pages that are found again
    for number in range(KINDS):
        ids = (shared if number % 3 == 0 else []) + generator.integers(3, 300, generator.integers(1, 24)).tolist()
        body = {"prompt": ids, "max_tokens": int(generator.integers(1, 19)), "seed": number, "ignore_eos": True}
        body["model"] = [None, "glm", "ads", "titles"][number % 4]
        body["temperature"] = [0, 0.7, 1.5][number % 3]
        body["n"] = 1 + number % 3
        if number % 5 == 0:
            body["logprobs"], body["echo"] = 2, number % 2 == 0
        if number % 7 == 0:
            body["stop"] = ["e", "的"]
        made.append(body)
    return made


class Client(threading.Thread):
    """Asks in a closed loop until the end; `seen` counts what happened, `wrong` has what must not."""

    def __init__(self, url: str, seed: int, kinds: list[dict], alone: list[dict], end: float) -> None:
        super().__init__(daemon=True)
        self.url, self.random, self.kinds, self.alone, self.until = url, random.Random(seed), kinds, alone, end
        self.seen, self.wrong = Counter(), []
        self.client = httpx.Client(
            base_url=url, timeout=120, trust_env=False, headers={"Authorization": f"Bearer {KEY}"}
        )

    def run(self) -> None:
        ways = [self.whole] * 6 + [self.streamed] * 4 + [self.killed] * 3 + [self.malformed] * 2 + [self.cancelled] * 2
        with self.client:
            while time.monotonic() < self.until:
                way = self.random.choice(ways)
                try:
                    way()
                except Exception as error:
                    self.wrong.append((way.__name__, repr(error)))
                self.seen[way.__name__] += 1

    def whole(self) -> None:
        number = self.random.randrange(KINDS)
        answer = self.client.post("/v1/completions", json=self.kinds[number])
        if answer.status_code == 429:
            self.seen["refused"] += 1
        elif answer.status_code != 200 or answer.json()["choices"] != self.alone[number]["choices"]:
            self.wrong.append((number, answer.status_code, answer.text[:500]))

    def streamed(self) -> None:
        number = self.random.randrange(KINDS)
        answer = self.client.post("/v1/completions", json={**self.kinds[number], "stream": True})
        if answer.status_code == 429:
            self.seen["refused"] += 1
            return
        texts: dict[int, str] = {}
        for line in answer.text.split("\n\n")[:-2]:
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        expected = {one["index"]: one["text"] for one in self.alone[number]["choices"]}
        if texts != expected:
            self.wrong.append((number, answer.status_code, texts))

    def killed(self) -> None:
        """Closes the socket at a random byte of the request, or of the answer."""
        body = json.dumps({**self.random.choice(self.kinds), "stream": self.random.random() < 0.7}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        parts, content = urlsplit(self.url), head.encode() + body
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
            if self.random.random() < 0.4:
                connection.sendall(content[: self.random.randrange(len(content))])
                return
            connection.sendall(content)
            left = self.random.randrange(1, 4000)
            while left > 0:
                got = len(connection.recv(min(left, 512)))
                left -= got
                if not got:
                    break

    def cancelled(self) -> None:
        """Leaves after some events of a stream."""
        body = {**self.random.choice(self.kinds), "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number > self.random.randrange(6):
                    return

    def malformed(self) -> None:
        headers = {"Content-Type": "application/json"}
        answer = self.client.post("/v1/completions", content=self.random.choice(MALFORMED), headers=headers)
        if not 400 <= answer.status_code < 500:
            self.wrong.append((answer.status_code, answer.text[:500]))


def test_many_clients_for_a_while(tokenizer):
    settings = ServeSettings(slots=SLOTS, context=CONTEXT, max_queue=24, max_seconds=120)
    adapters = {name: read_adapter(path) for name, path in ADAPTERS.items()}
    model = fresh_golden_model("glm2_tiny")
    engine = build_engine(model, ChatGLM2Tokenizer(tokenizer.vocab_file), "glm", adapters, settings)
    kinds = bodies()
    try:
        with running_server(engine, keys=Keys([KEY])) as url:
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as one:
                one.headers["Authorization"] = f"Bearer {KEY}"
                alone = [one.post("/v1/completions", json=body).json() for body in kinds]
                again = [one.post("/v1/completions", json=body).json() for body in kinds]
            assert [answer["choices"] for answer in again] == [answer["choices"] for answer in alone]
            begin = time.monotonic()
            clients = [Client(url, seed, kinds, alone, begin + SECONDS) for seed in range(CLIENTS)]
            for client in clients:
                client.start()
            time.sleep(SECONDS / 2)
            gc.collect()
            middle = resident()
            for client in clients:
                client.join(SECONDS + 120)
            gc.collect()
            seen = sum((client.seen for client in clients), Counter())
            print(dict(seen), f"{(resident() - middle) / 1e6:.1f} MB more")
            assert [wrong for client in clients for wrong in client.wrong] == []
            assert all(seen[way] > 0 for way in ("whole", "streamed", "killed", "cancelled", "malformed"))
            assert resident() - middle < GROWTH
            wait_until(lambda: engine.scheduler.stats.running == engine.scheduler.stats.waiting == 0)
            assert engine.scheduler.stats.failed == 0
        for name in ADAPTERS:  # the pages of their prefixes
            engine.decoder.unload_adapter(name)
        assert engine.decoder.pages_used == 0
    finally:
        engine.scheduler.close()
