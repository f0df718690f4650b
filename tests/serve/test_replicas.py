"""The configuration of nginx in docs/serving.md in front of two replicas, one of which is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest
from serve.service import wait_until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx missing: apt-get install nginx-light")]

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{site}
}}
"""
TOKENS = 80  # of an answer, which takes about a second
SESSIONS = [f"conversation-{number}" for number in range(12)]


class Cluster:
    """Two replicas, "one" and "two", and nginx before them."""

    def __init__(self, folder: Path, vocabulary: Path) -> None:
        self.folder, self.vocabulary = folder, vocabulary
        self.processes: dict[str, subprocess.Popen] = {}
        self.ports: dict[str, int] = {}
        self.start("one", "two")
        self.port = free_port()
        site = re.search(r"^```nginx\n(.*?)^```$", page(), re.MULTILINE | re.DOTALL).group(1)
        for theirs, ours in {
            "127.0.0.1:8001": f"127.0.0.1:{self.ports['one']}",
            "127.0.0.1:8002": f"127.0.0.1:{self.ports['two']}",
            "listen 8080": f"listen 127.0.0.1:{self.port}",
            "fail_timeout=5s": "fail_timeout=1s",
        }.items():
            assert theirs in site
            site = site.replace(theirs, ours)
        user = "user root;" if os.geteuid() == 0 else ""
        config = folder / "nginx.conf"
        config.write_text(MAIN.format(folder=folder, site=site, user=user), encoding="utf-8")
        command = [NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]
        self.processes["nginx"] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: answers(self.port), 20)

    def start(self, *names: str) -> None:
        for name in names:
            self._launch(name)
        for name in names:
            self.ports[name] = int(self.processes[name].stdout.readline())
            wait_until(lambda port=self.ports[name]: answers(port), 60)

    def _launch(self, name: str) -> None:
        command = [sys.executable, "-m", "serve.replica", str(self.vocabulary), name, str(self.ports.get(name, 0))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
        self.processes[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, cwd=self.folder
        )

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait(10)

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)

    def running(self, name: str) -> float:
        """Requests that a replica answers, as it says itself."""
        text = httpx.get(f"http://127.0.0.1:{self.ports[name]}/metrics", trust_env=False).text
        return float(re.search(r"^glm_ms:num_requests_running(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE).group(1))


def page() -> str:
    return (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def started(tmp_path_factory, tokenizer) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), Path(tokenizer.vocab_file))
    yield made
    made.close()


@pytest.fixture
def cluster(started) -> Cluster:
    """With both replicas, also where the test before has killed one, and nginx knows it."""
    started.start(*(name for name in ("one", "two") if started.processes[name].poll() is not None))
    with started.client() as client:
        wait_until(lambda: {ask(client, one, max_tokens=1)[0] for one in SESSIONS} == {"one", "two"}, 20)
    return started


def body(session: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"hello {session}", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}


def ask(client: httpx.Client, session: str, **more: Any) -> tuple[str, str]:
    """The replica that has answered, and the text."""
    response = client.post("/v1/completions", json=body(session, **more), headers={"X-Session-Id": session})
    assert response.status_code == 200, response.text
    return response.json()["model"], response.json()["choices"][0]["text"]


def stream(client: httpx.Client, session: str, barrier: Barrier) -> tuple[str, str, bool]:
    """Replica, text and whether the stream came to its end. Waits at the barrier after the first event."""
    headers, name, text = {"X-Session-Id": session}, "", ""
    with client.stream("POST", "/v1/completions", json=body(session, stream=True), headers=headers) as response:
        try:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return name, text, True
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    text += event["choices"][0]["text"]
                    if not name:
                        barrier.wait(20)
                    name = event["model"]
        except httpx.RemoteProtocolError:
            pass
    return name, text, False


def test_a_conversation_stays_on_its_replica(cluster):
    with cluster.client() as client:
        places = {session: {ask(client, session, max_tokens=1)[0] for _ in range(3)} for session in SESSIONS}
    assert all(len(names) == 1 for names in places.values())
    assert set().union(*places.values()) == {"one", "two"}


def test_a_replica_that_is_killed_during_streams(cluster):
    with cluster.client() as client, ThreadPoolExecutor(len(SESSIONS)) as pool:
        before = dict(zip(SESSIONS, pool.map(lambda session: ask(client, session), SESSIONS)))
        barrier = Barrier(len(SESSIONS) + 1)
        running = {session: pool.submit(stream, client, session, barrier) for session in SESSIONS}
        barrier.wait(20)  # every stream has begun: nginx keeps nothing back
        cluster.kill("one")
        ended = {session: job.result(30) for session, job in running.items()}
        for session, (name, text, whole) in ended.items():
            assert name == before[session][0]
            assert whole == (name == "two"), session
            expected = before[session][1]
            assert text == expected if whole else expected.startswith(text)
        # A client that asks again gets the whole answer from the other replica.
        again = list(pool.map(lambda session: ask(client, session), SESSIONS))
        assert again == [("two", text) for _, text in before.values()]
        cluster.start("one")
        wait_until(lambda: {ask(client, one, max_tokens=1)[0] for one in SESSIONS} == {"one", "two"}, 20)
        for session, (name, _) in before.items():
            assert ask(client, session, max_tokens=1)[0] == name


def test_requests_whose_answer_has_not_begun_move_to_the_other_replica(cluster):
    with cluster.client() as client, ThreadPoolExecutor(len(SESSIONS)) as pool:
        before = dict(zip(SESSIONS, pool.map(lambda session: ask(client, session), SESSIONS)))
        running = {session: pool.submit(ask, client, session) for session in SESSIONS}
        wait_until(lambda: cluster.running("one") + cluster.running("two") == len(SESSIONS))
        cluster.kill("one")
        for session, job in running.items():
            assert job.result(30) == ("two", before[session][1])


def test_a_client_that_leaves_frees_its_slot(cluster):
    with cluster.client() as client:
        name, _ = ask(client, "leaver", max_tokens=1)
        wanted = body("leaver", stream=True, max_tokens=200)
        with client.stream("POST", "/v1/completions", json=wanted, headers={"X-Session-Id": "leaver"}) as response:
            assert response.status_code == 200
            lines = response.iter_lines()  # a generator that is dropped closes the connection
            next(lines)
            assert cluster.running(name) == 1
        wait_until(lambda: cluster.running(name) == 0, 1.5)  # the whole answer takes longer


def test_no_replica_is_a_clear_error_and_a_new_one_is_found(cluster):
    with cluster.client() as client:
        for name in ("one", "two"):
            cluster.kill(name)
        response = client.post("/v1/completions", json=body("x"))
        assert response.status_code == 502
        cluster.start("two")
        wait_until(lambda: client.post("/v1/completions", json=body("x", max_tokens=1)).status_code == 200, 20)
