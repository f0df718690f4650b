"""Text given out id by id: nothing lost, nothing halved, nothing late."""

from __future__ import annotations

import random

import pytest

from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer, IncrementalDecoder

TEXTS = [
    "你好，世界！",
    "  leading and  inner spaces ",
    "emoji 😀👋🏽👨‍👩‍👧 and 𠮷 in 中文",
    "\n\nline\nbreaks\n",
    "",
]


def _stream(tok, ids) -> list[str]:
    decoder = IncrementalDecoder(tok)
    return [decoder.push(index) for index in ids] + [decoder.flush()]


@pytest.mark.parametrize("kind", [ChatGLM2Tokenizer, ChatGLM3Tokenizer])
def test_texts(any_vocabulary, kind):
    tok = kind(any_vocabulary)
    for text in TEXTS:
        for ids in (tok.encode(text), tok.encode(text, add_special_tokens=False)):
            parts = _stream(tok, ids)
            assert "".join(parts) == tok.decode(ids)
            assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", [ChatGLM2Tokenizer, ChatGLM3Tokenizer])
def test_random_ids(any_vocabulary, kind):
    tok = kind(any_vocabulary)
    _check_random(tok, seed=1, rounds=300)


@pytest.mark.parametrize("kind", [ChatGLM2Tokenizer, ChatGLM3Tokenizer])
def test_random_ids_genuine(vocab_file, kind):
    tok = kind(vocab_file)
    _check_random(tok, seed=2, rounds=300)


def _check_random(tok, seed: int, rounds: int) -> None:
    """Ids of all kinds; bytes and leading spaces, where decoding depends on neighbours, often."""
    rng = random.Random(seed)
    byte_ids = [i for i in range(tok.sp.GetPieceSize()) if tok.sp.IsByte(i)]
    space_ids = [i for i in range(tok.sp.GetPieceSize()) if tok.sp.IdToPiece(i).startswith("▁")][:40]
    pools = [pool for pool in (byte_ids, space_ids, range(tok.vocab_size), [0, -1, tok.eos_token_id]) if pool]
    for _ in range(rounds):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(30))]
        assert "".join(_stream(tok, ids)) == tok.decode(ids), ids


def test_characters_come_whole_and_at_once(small_vocabulary):
    tok = ChatGLM3Tokenizer(small_vocabulary)
    ids = tok.encode("a😀é", add_special_tokens=False)
    assert sum(tok.byte_value(index) is not None for index in ids) == 6
    decoder = IncrementalDecoder(tok)
    shown = [decoder.push(index) for index in ids]
    assert [part for part in shown if part] == ["a", "😀", "é"]
    assert decoder.flush() == ""


def test_cut_character_is_given_out_at_the_end(small_vocabulary):
    tok = ChatGLM2Tokenizer(small_vocabulary)
    ids = tok.encode("a😀", add_special_tokens=False)[:-1]
    decoder = IncrementalDecoder(tok)
    assert "".join(decoder.push(index) for index in ids) == "a"
    assert "a" + decoder.flush() == tok.decode(ids)
    assert decoder.push(ids[0]) == tok.decode(ids[:1])  # a new text begins


def test_wrong_id_leaves_the_decoder_usable(small_vocabulary):
    tok = ChatGLM2Tokenizer(small_vocabulary)
    ids = tok.encode("hello there", add_special_tokens=False)
    decoder = IncrementalDecoder(tok)
    text = decoder.push(ids[0])
    with pytest.raises(IndexError):
        decoder.push(tok.vocab_size)
    assert text + "".join(decoder.push(index) for index in ids[1:]) == "hello there"
