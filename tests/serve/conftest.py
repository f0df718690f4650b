"""A small vocabulary with byte pieces, so that emoji split over tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

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
