"""The table of model families: what each entry says, and how a family is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from glm_ms.convert.names import to_glm_name, to_hf_name
from glm_ms.data.rows import left_padded_row, right_padded_row
from glm_ms.families import FAMILIES, family_of, read_config, tokenizer_names
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer

EMBEDDING = "transformer.embedding.embedding_table"


class ToyConfig(GLMConfig):
    model_type = "toyglm"


@pytest.fixture
def toy(monkeypatch):
    names = {"toy.embedding": EMBEDDING}
    family = dataclasses.replace(
        FAMILIES["chatglm3"], name="toy", tokenizer=type("ToyTokenizer", (ChatGLM3Tokenizer,), {}), config=ToyConfig,
        parameter_names=names
    )  # fmt: skip
    monkeypatch.setitem(FAMILIES, "toy", family)
    return family


def test_entries():
    assert tokenizer_names() == ("ChatGLM2Tokenizer", "ChatGLM3Tokenizer")
    glm2, glm3 = FAMILIES["chatglm2"], FAMILIES["chatglm3"]
    assert (glm2.encoder.layout, glm3.encoder.layout) == (right_padded_row, left_padded_row)
    assert glm2.tokenizer.build_chat_input is ChatGLM2Tokenizer.build_chat_input
    assert glm2.tokenizer.stop_tokens == ("<eos>",)
    assert glm3.tokenizer.stop_tokens == ("<eos>", "<|user|>", "<|observation|>")
    assert [family.name for family in FAMILIES.values()] == list(FAMILIES)
    assert len({family.generation for family in FAMILIES.values()}) == len(FAMILIES)


def test_a_family_is_found_by_all_that_belongs_to_it(toy):
    assert family_of("chatglm2") is family_of("ChatGLM2Tokenizer") is FAMILIES["chatglm2"]
    assert family_of("toy") is family_of("ToyTokenizer") is family_of(ToyConfig()) is toy
    assert family_of(object.__new__(toy.tokenizer)) is toy
    assert family_of(object.__new__(ChatGLM3Tokenizer)) is FAMILIES["chatglm3"]
    assert family_of(GLMConfig()).config is GLMConfig
    own = type("Own", (ChatGLM2Tokenizer,), {})  # not in the table: the family of its base class
    assert family_of(object.__new__(own)) is FAMILIES["chatglm2"]
    with pytest.raises(KeyError, match="belongs to none of the model families chatglm2, chatglm3, toy"):
        family_of("glm4")


def test_names_of_parameters(toy):
    assert to_hf_name(EMBEDDING, ToyConfig()) == "toy.embedding"
    assert to_hf_name(EMBEDDING, GLMConfig()) == "transformer.embedding.word_embeddings.weight"
    assert to_glm_name("toy.embedding") == EMBEDDING


def test_a_config_file_has_the_class_of_its_family(toy, tmp_path: Path):
    for config in (GLMConfig(num_layers=2), ToyConfig(num_layers=2)):
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
        for path in (tmp_path, tmp_path / "config.json"):
            found = read_config(path)
            assert type(found) is type(config)
            assert found == config
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type = 'llama': expected 'chatglm'"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "absent.json")


@pytest.mark.parametrize("model_type", [[], {}, None, 3])
def test_a_model_type_that_is_not_text_is_an_error_of_the_file(model_type, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**GLMConfig().to_hf_dict(), "model_type": model_type}))
    with pytest.raises(ConfigError, match="model_type"):
        read_config(tmp_path)


def test_a_byte_order_mark_does_not_hide_the_family(toy, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(ToyConfig().to_hf_dict()), encoding="utf-8-sig")
    assert type(read_config(tmp_path)) is ToyConfig
