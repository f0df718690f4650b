"""Adapters that are loaded and unloaded while the server runs, over a decoder without a network."""

from __future__ import annotations

import re
import shutil

import pytest
from serve.fakes import FakeDecoder
from serve.service import PADDING, client_of, running_engine

from glm_ms import spelling
from glm_ms.peft.adapter import AdapterError
from glm_ms.serve.auth import Keys
from glm_ms.serve.loading import adapters_with_alpha
from glm_ms.serve.names import lora_alphas, named_adapters
from glm_ms.storage.errors import FileError
from glm_ms.storage.integrity import describe_files, write_manifest_values

KEY = "0123456789abcdef"
PROMPT = {"prompt": "hello there", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class WithAdapters(FakeDecoder):
    """Has room for two adapters."""

    def __init__(self, vocab_size):
        super().__init__(vocab_size, capacity=128)
        self.adapters = {}

    def load_adapter(self, name, stored):
        if len(self.adapters) == 2:
            raise AdapterError(f"{stored.path}: no room")
        self.adapters[name] = stored

    def unload_adapter(self, name):
        del self.adapters[name]

    def open(self, ids, adapter=None, **options):
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"adapter {adapter!r}: not loaded")
        return super().open(ids, adapter, **options)


@pytest.fixture
def engine(tokenizer):
    decoder = WithAdapters(tokenizer.vocab_size + PADDING)
    with running_engine(tokenizer, decoder) as engine:
        engine.decoder = decoder
        yield engine


@pytest.fixture
def client(engine):
    with client_of(engine, keys=Keys([KEY])) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


@pytest.fixture(scope="session")
def adapter(golden):
    """A trained LoRA adapter."""
    return next(path for path in sorted(golden.rglob("adapter_model.safetensors")) if "lora" in str(path)).parent


def load(client, name, path):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})


def names(client):
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def text(client, model):
    answer = client.post("/v1/completions", json={**PROMPT, "model": model})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_an_adapter_is_served_by_its_name(client, adapter):
    assert names(client) == ["tiny"]
    assert load(client, "shop/ads", adapter).json() == {"status": "loaded", "model": "shop/ads"}
    assert names(client) == ["tiny", "shop/ads"]
    (base, own) = client.get("/v1/models").json()["data"]
    assert own["parent"] == base["id"]
    assert client.get("/v1/models/shop/ads").json() == own
    assert text(client, "shop/ads") != text(client, "tiny") == text(client, None)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "shop/ads"}).status_code == 200
    assert names(client) == ["tiny"]
    assert client.post("/v1/completions", json={**PROMPT, "model": "shop/ads"}).status_code == 404


def test_one_of_another_base_is_remarked_on(client, engine, adapter, tmp_path, golden):
    folder = tmp_path / "ads"
    shutil.copytree(adapter, folder)
    position = {"base_weights": "of another one"}
    write_manifest_values(folder, {"format_version": 1, "position": position, "files": describe_files(folder)})
    engine.base = golden / "models" / "glm3_tiny"
    assert "was trained on other weights than" in load(client, "ads", folder).json()["note"]
    engine.base = tmp_path / "moved meanwhile"
    answer = load(client, "more", folder).json()
    assert (answer["status"], answer["model"]) == ("loaded", "more")
    assert answer["note"].startswith("not compared with the weights that it was trained on: ")


def test_fields_of_a_request_have_their_own_names(client, adapter, tmp_path):
    """Though the program has flags for them."""
    shutil.copyfile(adapter / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors")
    with spelling.of_program():
        spelling.register_flags({"lora_alpha": "--lora-alpha"})
        message = load(client, "bare", tmp_path).json()["error"]["message"]
    assert "lora_alpha=ALPHA" in message
    assert "--lora-alpha" not in message


def test_what_cannot_be_loaded(client, adapter, tmp_path):
    for name in ("", "with space", "tiny", "-x", "a" * 101, "line\nbreak"):
        answer = load(client, name, adapter)
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == "lora_name"
    for path in (tmp_path / "missing", tmp_path, "/etc/passwd", "nul\0byte", "x" * 5000):
        answer = load(client, "ads", path)
        assert answer.status_code == 400, path
        assert answer.json()["error"]["param"] == "lora_path"
        assert "root:" not in answer.text
    assert load(client, "one", adapter).status_code == 200
    assert "served already" in load(client, "one", adapter).json()["error"]["message"]
    assert load(client, "two", adapter).status_code == 200
    assert "no room" in load(client, "three", adapter).json()["error"]["message"]
    assert names(client) == ["tiny", "one", "two"]


def test_what_cannot_be_unloaded(client):
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "nothing"}).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "tiny"}).status_code == 400


def test_a_server_without_a_key_loads_nothing(tokenizer, adapter):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        answer = load(client, "ads", adapter)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "needs_key"
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "tiny"}).status_code == 403


def test_a_server_without_room_for_adapters(tokenizer, adapter):
    with running_engine(tokenizer) as engine, client_of(engine, keys=Keys([KEY])) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert "--max-adapters" in load(client, "ads", adapter).json()["error"]["message"]


def test_adapters_of_the_command_line():
    assert list(named_adapters(["a=x", "b/c=y=z"])) == ["a", "b/c"]
    assert str(named_adapters(["b=y=z"])["b"]) == "y=z"
    for items in (["a"], ["a="], ["=x"], ["a=x", "a=y"], ["a b=x"]):
        with pytest.raises(FileError, match="--adapter"):
            named_adapters(items)


def test_an_alpha_of_each_adapter():
    assert lora_alphas([], ["a"]) == {}
    assert lora_alphas(["16", "b=32.5"], ["a", "b"]) == {None: 16.0, "b": 32.5}


def test_an_alpha_without_a_name_is_for_adapters_without_their_own(golden, adapter, tmp_path):
    base, bare = golden / "models" / "glm2_tiny", tmp_path / "adapter_model.safetensors"
    prefix = golden / "train" / "ptuning_v2_proj" / "final.safetensors"
    shutil.copyfile(adapter / bare.name, bare)
    mixed = {"own": adapter, "bare": bare, "named": bare, "prefix": prefix}
    alone, named = adapters_with_alpha(base, mixed, {None: 16.0, "named": 8.0})
    assert alone is None
    assert {name: alpha for name, (_, alpha) in named.items()} == {
        "own": None, "bare": 16.0, "named": 8.0, "prefix": None,
    }  # fmt: skip
    assert adapters_with_alpha(base, {"own": adapter}, {None: 16.0}) == (None, {"own": (adapter, 16.0)})
    both = adapters_with_alpha(base, {"own": adapter, "prefix": prefix}, {None: 16.0})[1]
    assert [alpha for _, alpha in both.values()] == [16.0, None]
    assert adapters_with_alpha(base, {}, {None: 16.0}) == (16.0, {})
    assert adapters_with_alpha(base, mixed, {})[1]["bare"] == (bare, None)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["chatt=8"], "--lora-alpha chatt=8: there is no adapter chatt; did you mean chat"),
        (["x=8"], "there is no adapter x; it names one of --adapter"),
        (["chat=0"], "--lora-alpha chat=0: must be ALPHA or NAME=ALPHA, with a number above 0"),
        (["many"], "--lora-alpha many: must be ALPHA or NAME=ALPHA"),
        (["nan"], "must be ALPHA"),
        (["8", "9"], "--lora-alpha 9: it is given twice"),
        (["chat=8", "chat=9"], "--lora-alpha chat=9: that of chat is given twice"),
    ],
)
def test_alphas_that_cannot_be_used(items, message):
    with pytest.raises(FileError, match=re.escape(message)):
        lora_alphas(items, ["chat"])
