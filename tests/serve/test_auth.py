"""Keys, addresses that other machines reach, and web pages of other origins."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from serve.service import client_of

from glm_ms.serve.auth import KEY_VARIABLE, Keys, is_loopback, read_keys
from glm_ms.serve.server import ServerError, check_name_of_host, hosts_for
from glm_ms.storage.errors import FileError

HOSTS = frozenset({"models.example.org"})
KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture(scope="module")
def client():
    with client_of(None, keys=Keys([KEY, OTHER])) as client:
        yield client


def test_health_and_readiness_need_no_key(client):
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/version", "/health/"])
def test_everything_else_needs_a_key(client, path):
    answer = client.get(path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {OTHER}"},
        {"X-Api-Key": KEY},
    ],
)
def test_each_key_opens(client, headers):
    assert client.get("/version", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-Api-Key": ""},
        {"X-Api-Key": "ü" * 16},
    ],
)
def test_wrong_keys_do_not(client, headers, caplog):
    with caplog.at_level(logging.DEBUG):
        answer = client.get("/version", headers={name: value.encode() for name, value in headers.items()})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text + caplog.text


def test_without_keys_the_server_is_open():
    with client_of(None) as client:
        assert client.get("/version").status_code == 200
        assert client.get("/version", headers={"Authorization": "Bearer any"}).status_code == 200


def test_keys_of_a_file_and_of_the_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# for the shop\n{KEY}\r\n\n  {OTHER}\n", encoding="utf-8")
    keys = read_keys(path, {KEY_VARIABLE: "x" * 20})
    assert all(keys.open_with(key) for key in (KEY, OTHER, "x" * 20))
    assert not keys.open_with("# for the shop")
    assert not read_keys(None, {})


@pytest.mark.parametrize(
    "content", ["", "# only a comment\n", "tiny-key\n", "with spaces in the key\n", "ключключключключ\n"]
)
def test_unusable_key_files(tmp_path, content):
    path = tmp_path / "keys"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FileError, match="openssl rand") as found:
        read_keys(path, {})
    assert not content.strip() or content.strip() not in str(found.value)


def test_a_key_file_that_is_missing_and_an_empty_variable():
    with pytest.raises(FileError, match="no such file"):
        read_keys(Path("/nowhere/keys"), {})
    with pytest.raises(FileError, match=KEY_VARIABLE):
        read_keys(None, {KEY_VARIABLE: ""})


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_addresses(host, local):
    assert is_loopback(host) is local


def test_web_pages_of_other_origins_are_refused_by_default(client):
    answer = client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_web_pages_of_named_origins_are_welcome():
    preflight = {
        "Origin": "https://chat.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with client_of(None, keys=Keys([KEY]), cors_origins=["https://chat.example.org"]) as client:
        answer = client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
        # An error can be read by the page, too.
        unauthorised = client.get("/v1/models", headers={"Origin": "https://chat.example.org"})
        assert unauthorised.status_code == 401
        assert unauthorised.headers["access-control-allow-origin"] == "https://chat.example.org"
        refused = client.options("/v1/completions", headers={**preflight, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST.:80", 200), ("[::1]:8000", 200), ("a.localhost", 200),
        ("127.1.2.3", 200), ("models.example.org:443", 200), ("", 200),
        ("evil.example.org", 403), ("127.0.0.1.evil.example.org:8000", 403), ("192.168.1.7:8000", 403),
        ("localhost.evil.example.org", 403), ("[::2]", 403), ("evil.example.org#localhost", 403),
    ],
)  # fmt: skip
def test_a_foreign_host_is_refused(host, status):
    """Web pages whose names point to this machine send their own name."""
    with client_of(None, allowed_hosts=HOSTS) as client:
        answer = client.get("/version", headers={"Host": host})
        assert answer.status_code == status
        assert client.get("/health", headers={"Host": host}).status_code == 200
    if status == 403:
        error = answer.json()["error"]
        assert error["code"] == "foreign_host"
        assert "--allowed-hosts" in error["message"]


@pytest.mark.parametrize(
    ("host", "keys", "allowed", "wanted"),
    [
        ("127.0.0.1", [], [], {"127.0.0.1"}),
        ("localhost", [], ["Models.Example.org."], {"localhost", "models.example.org"}),
        ("127.0.0.1", [KEY], [], None),
        ("0.0.0.0", [], [], None),
        ("0.0.0.0", [KEY], ["models.example.org"], {"0.0.0.0", "models.example.org"}),
    ],
)
def test_which_hosts_a_server_answers(host, keys, allowed, wanted):
    assert hosts_for(host, Keys(keys), allowed) == wanted


def test_names_of_hosts():
    for name in ("models.example.org", "Models.Example.org.", "my_server", "192.168.1.7", "fe80::1"):
        check_name_of_host(name)
    for name in ("https://models.example.org", "models.example.org:443", "a.example/x", "[fe80::1]", "*", ".", "a..b"):
        with pytest.raises(ServerError, match="without scheme and port"):
            check_name_of_host(name)
