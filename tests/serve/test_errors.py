"""Errors of the HTTP interface: every wrong request gets a 4xx that names the field, in OpenAI's shape."""

from __future__ import annotations

import json

import pytest
from serve.fakes import FakeDecoder
from serve.service import PADDING, client_of, running_engine

from glm_ms.serve.errors import APIError
from glm_ms.serve.guards import check_json

PROMPT = {"prompt": "hello there", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def client(tokenizer):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        yield client


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": None}, "prompt", ""),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt", ""),
        ({"prompt": [1, "a"]}, "prompt", ""),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": [10**6]}, "prompt", "vocabulary"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
        ({"model": 5}, "model", "string"),
        ({"temprature": 0.5}, "temprature", "did you mean temperature"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"min_p": 2}, "min_p", ""),
        ({"n": 0}, "n", ""),
        ({"n": 5}, "n", "at most 4"),
        ({"n": 10**30}, "n", "at most 4"),
        ({"max_tokens": -1}, "max_tokens", ""),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": 1000}, "max_tokens", "at most 128"),
        ({"max_tokens": 10**30}, "max_tokens", "at most 128"),
        ({"min_tokens": 5}, "min_tokens", "2 tokens"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": [""]}, "stop", ""),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "vocabulary"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", ""),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": [1]}, "logit_bias", "JSON object"),
        ({"presence_penalty": 3}, "presence_penalty", ""),
        ({"repetition_penalty": 0}, "repetition_penalty", ""),
        ({"logprobs": 21}, "logprobs", ""),
        ({"logprobs": True}, "logprobs", ""),
        ({"seed": 2**70}, "seed", ""),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag", "did you mean"),
        ({"echo": "yes"}, "echo", "boolean"),
    ],
)
def test_wrong_fields_of_completions(client, change, param, words):
    error = error_of(client.post("/v1/completions", json={**PROMPT, **change}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def test_null_means_the_default(client):
    names = ["model", "temperature", "top_p", "n", "stop", "max_tokens", "logit_bias", "stream_options", "logprobs"]
    body = {"prompt": "hello there", **dict.fromkeys(names), "user": "me", "metadata": {"any": 1}}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= 16


def test_a_missing_field_is_named(client):
    error = error_of(client.post("/v1/completions", json={"max_tokens": 2}), 400)
    assert error["param"] == "prompt"
    assert "required" in error["message"]


@pytest.mark.parametrize("body", ["[]", "5", "null", '"text"', "true"])
def test_a_body_that_is_not_an_object(client, body):
    error = error_of(client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["param"] is None
    assert error["message"].startswith("body: ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": 1e999}', "Infinity"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_is_not_clean_json(client, body, words):
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert words in error_of(answer, 400)["message"]


def test_clean_json_stays_as_it_is():
    text = '{"emoji": "🌶️", "pair": "\\ud83d\\ude00", "n": 1e3}'
    assert check_json(text.encode()) == json.loads(text)
    with pytest.raises(APIError, match="not valid JSON"):
        check_json(b"{}{}")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_other_content_types_are_refused(client, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    error = error_of(client.post("/v1/completions", content=json.dumps(PROMPT), headers=headers), 415)
    assert "application/json" in error["message"]


def test_compressed_bodies_are_refused(client):
    headers = {"Content-Type": "application/json; charset=utf-8", "Content-Encoding": "gzip"}
    assert "gzip" in error_of(client.post("/v1/completions", content=b"x", headers=headers), 415)["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_are_refused(client, declared):
    body = json.dumps({"prompt": "a" * (5 << 20)}).encode()
    content = body if declared else iter([body[:1000], body[1000:]])  # the second has no Content-Length
    error = error_of(client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}), 413)
    assert error["code"] == "body_too_large"


def test_unknown_paths_and_methods(client):
    assert "/v1/nothing" in error_of(client.get("/v1/nothing"), 404)["message"]
    assert "GET" in error_of(client.get("/v1/completions"), 405)["message"]
    assert "DELETE" in error_of(client.delete("/v1/models"), 405)["message"]


def test_unknown_models(client):
    for answer in (client.post("/v1/completions", json={**PROMPT, "model": "tinny"}), client.get("/v1/models/tinny")):
        error = error_of(answer, 404)
        assert error["code"] == "model_not_found"
        assert "did you mean tiny" in error["message"]


def test_a_prompt_that_is_too_long(client):
    error = error_of(client.post("/v1/completions", json={**PROMPT, "prompt": "hello there " * 200}), 400)
    assert error["code"] == "context_length_exceeded"


def test_before_the_model_is_loaded():
    with client_of(None) as client:
        assert client.get("/health").status_code == 200
        for answer in (client.get("/ready"), client.get("/v1/models"), client.post("/v1/completions", json=PROMPT)):
            assert error_of(answer, 503)["code"] == "not_ready"
            assert int(answer.headers["Retry-After"]) > 0


def test_a_server_that_stops_refuses_new_requests(tokenizer):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        assert client.get("/ready").json() == {"status": "ready"}
        engine.stopping = True
        assert error_of(client.get("/ready"), 503)["code"] == "stopping"
        assert error_of(client.post("/v1/completions", json=PROMPT), 503)["code"] == "stopping"


def test_a_server_that_has_failed_is_not_ready(tokenizer, caplog):
    decoder = FakeDecoder(tokenizer.vocab_size + PADDING, capacity=128)
    with running_engine(tokenizer, decoder) as engine, client_of(engine) as client:
        decoder.broken.add("free")
        assert "free is broken" in error_of(client.post("/v1/completions", json=PROMPT), 500)["message"]
        assert "free is broken" in caplog.text
        for answer in (client.get("/ready"), client.post("/v1/completions", json=PROMPT)):
            error = error_of(answer, 503)
            assert error["code"] == "failed"
            assert "restart" in error["message"]
        assert client.head("/ready").status_code == 503
        assert client.head("/health").status_code == 200


def test_errors_inside_the_server_have_no_details(tokenizer):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        engine.tokenizer = None
        error = error_of(client.post("/v1/completions", json=PROMPT), 500)
        assert error["type"] == "server_error"
        assert "encode" not in error["message"]
