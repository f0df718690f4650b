"""The requests in docs/serving.md work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
REQUESTS = re.findall(r"^```json (/\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("path", "text"), REQUESTS)
def test_a_request_is_answered(chat, path, text):
    client, speaker = chat
    speaker.say("\n 你好")
    body = json.loads(text)
    if "model" in body:
        body["model"] = "tiny"
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    if schema is not None:
        value = json.loads(response.json()["choices"][0]["message"]["content"])
        assert value["color"] in schema["properties"]["color"]["enum"]
        assert value["price"] <= schema["properties"]["price"]["maximum"]


def test_every_interface_has_a_request():
    assert {path for path, _ in REQUESTS} == {"/v1/chat/completions", "/v1/responses", "/v1/messages"}
