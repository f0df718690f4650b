"""Both tokenizers against what the released tokenizers do with the genuine vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer, SentencePieceTokenizer

_CLASSES = {"glm2": ChatGLM2Tokenizer, "glm3": ChatGLM3Tokenizer}


@pytest.fixture(scope="module", params=list(_CLASSES))
def case(
    request: pytest.FixtureRequest, golden: Path, vocab_file: Path
) -> tuple[SentencePieceTokenizer, dict[str, Any]]:
    return _CLASSES[request.param](vocab_file), _load(golden, request.param)


@pytest.fixture(scope="module")
def glm2(golden: Path, vocab_file: Path) -> tuple[ChatGLM2Tokenizer, dict[str, Any]]:
    return ChatGLM2Tokenizer(vocab_file), _load(golden, "glm2")


@pytest.fixture(scope="module")
def glm3(golden: Path, vocab_file: Path) -> tuple[ChatGLM3Tokenizer, dict[str, Any]]:
    return ChatGLM3Tokenizer(vocab_file), _load(golden, "glm3")


def _load(golden: Path, name: str) -> dict[str, Any]:
    return json.loads((golden / f"tokenizer_{name}.json").read_text(encoding="utf-8"))


def _outcome(function: Any, *args: Any) -> Any:
    """The value, or the error as the golden files write it."""
    try:
        return function(*args)
    except (AssertionError, IndexError) as error:
        return {"error": type(error).__name__}


def test_identity(case):
    tok, want = case
    for name in ("vocab_size", "pad_token", "pad_token_id", "eos_token", "eos_token_id", "unk_token"):
        assert getattr(tok, name) == want[name], name
    assert tok.padding_side == want["padding_side"]
    assert tok.prefix_tokens == want["prefix_tokens"]
    assert tok.sp.GetPieceSize() == want["sp_vocab_size"]
    assert tok.get_command("<bos>") == want["bos_id"]
    assert {name: tok.get_command(name) for name in want["commands"]} == want["commands"]
    assert _outcome(tok.get_command, "<|nonsense|>") == want["unknown_command"]
    assert tok.num_special_tokens_to_add() == want["num_special_tokens_to_add"]["single"]
    assert tok.num_special_tokens_to_add(pair=True) == want["num_special_tokens_to_add"]["pair"]


def test_token_conversion(case):
    tok, want = case
    table = want["convert_tokens_to_ids"]
    assert tok.convert_tokens_to_ids(list(table)) == list(table.values())
    for index, token in want["convert_ids_to_tokens"].items():
        assert _outcome(tok.convert_ids_to_tokens, int(index)) == token, index


def test_texts(case):
    tok, want = case
    assert len(want["texts"]) > 100
    for row in want["texts"]:
        text = row["text"]
        ids = tok(text)["input_ids"]
        bare = tok(text, add_special_tokens=False)["input_ids"]
        assert ids == row["input_ids"] == tok.encode(text), text
        assert bare == row["input_ids_no_special"] == row["sp_encode"], text
        assert tok.tokenize(text) == row["pieces"], text
        assert tok.decode(ids) == row["decoded"], text
        assert tok.decode(bare) == row["decoded_no_special"], text
        assert tok.decode(ids, skip_special_tokens=True) == row["decoded_skip_special"], text
        assert (tok.decode(bare) == text) == row["round_trip_exact"], text


def test_pairs(case):
    tok, want = case
    for row in want["pairs"]:
        assert tok(row["text"], row["text_pair"])["input_ids"] == row["input_ids"]


def test_truncation(case):
    tok, want = case
    rows = [row for row in want["truncation"] if "library_quirk" not in row]
    assert len(rows) == 7
    for row in rows:
        options = {"add_special_tokens": row["add_special_tokens"], "max_length": row["max_length"]}
        assert tok.encode(row["text"], truncation=True, **options) == row["input_ids"]


def test_decode(case):
    tok, want = case
    for row in want["decode"]:
        assert _outcome(tok.decode, row["ids"]) == row["decoded"], row["ids"]
        assert _outcome(tok.decode, row["ids"], True) == row["decoded_skip_special"], row["ids"]
        assert _outcome(tok.convert_ids_to_tokens, row["ids"]) == row["tokens"], row["ids"]


def test_batches(case):
    tok, want = case
    for row in want["batch"]:
        if "pad_features" in row:
            got = tok.pad([{"input_ids": ids} for ids in row["pad_features"]], **row["kwargs"])
            assert got == tok.pad({"input_ids": row["pad_features"]}, **row["kwargs"])
        else:
            got = tok(row["texts"], **row["kwargs"])
            assert sorted(got) == row["keys"]
        for name in set(got) & set(row):
            assert got[name] == row[name], (name, row["kwargs"])


def test_glm2_prompts(glm2):
    tok, want = glm2
    for row in want["build_prompt"]:
        query, history = row["query"], row["history"]
        assert tok.build_prompt(query, history) == row["prompt"]
        for got in (tok(row["prompt"]), tok.build_chat_input(query, history)):
            assert {name: row[name] for name in got} == got
        stream = tok.build_stream_input(query, history)
        assert stream["input_ids"] == row["stream_input_ids"]
        assert stream["position_ids"] == row["stream_position_ids"]
        assert tok.encode_template("[gMASK]sop" + row["prompt"]) == row["input_ids"]
        assert tok.encode_template("[gMASK] sop " + row["prompt"]) == row["input_ids"]
    assert tok.stop_token_ids == [2]


def test_glm2_process_response(glm2):
    tok, want = glm2
    for row in want["process_response"]:
        assert tok.process_response(row["output"]) == row["response"]


def test_glm3_messages(glm3):
    tok, want = glm3
    for row in want["build_single_message"]:
        assert tok.build_single_message(row["role"], row["metadata"], row["message"]) == row["ids"]


def test_glm3_chat_input(glm3):
    tok, want = glm3
    assert tok.stop_token_ids == want["chat_stop_token_ids"]
    for row in want["build_chat_input"]:
        got = tok.build_chat_input(row["query"], row["history"], row["role"])
        assert {name: row[name] for name in got} == got
        assert tok.decode(got["input_ids"]) == row["decoded"]
        assert tok.encode_template(row["decoded"]) == row["input_ids"]
        if "chat_template_string" in row:
            assert tok.encode_template(row["chat_template_string"]) == row["input_ids"]


def test_glm3_process_response(glm3):
    tok, want = glm3
    for row in want["process_response"]:
        history = json.loads(json.dumps(row["history"]))
        response, new_history = tok.process_response(row["output"], history)
        assert response == row["response"]
        assert new_history == row["new_history"]
        assert history == row["history"]


def test_glm3_encode_special_tokens(glm3, vocab_file):
    tok, want = glm3
    encoding = ChatGLM3Tokenizer(vocab_file, encode_special_tokens=True)
    for row in want["encode_special_tokens_true"]:
        text = row["text"]
        assert encoding(text)["input_ids"] == row["input_ids"]
        assert encoding.encode(text, add_special_tokens=False) == row["input_ids_no_special"]
        assert encoding.tokenize(text) == row["pieces"]
        # A chat message stays plain text whatever it spells.
        assert encoding.build_single_message("user", "", text)[3:] == row["sp_encode"]
    for row in want["encode_special_tokens_false"]:
        assert tok(row["text"])["input_ids"] == row["input_ids"]
