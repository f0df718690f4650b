"""A small vocabulary with byte pieces, so that emoji split over tokens, and a client of a chat server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from fastapi.testclient import TestClient
from serve.chat_helpers import Speaker, chat_client

from glm_ms.tokenizer import ChatGLM3Tokenizer

SENTENCES = ["这款上衣简约大方，白色的条纹清新自然。", "the quick brown fox jumps over the lazy dog", "hello there"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM3Tokenizer:
    folder: Path = tmp_path_factory.mktemp("vocabulary")
    source = folder / "sentences.txt"
    source.write_text("\n".join(SENTENCES * 20) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=360, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    return ChatGLM3Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def chat(tokenizer: ChatGLM3Tokenizer) -> Iterator[tuple[TestClient, Speaker]]:
    """A client, and the network behind its server."""
    with chat_client(tokenizer) as pair:
        yield pair
