"""A small SentencePiece vocabulary and files of records, so that tests run without the genuine ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer, SentencePieceTokenizer

RECORDS = [
    {"content": "类型#上衣*版型#宽松*颜色#白色", "summary": "这款上衣简约大方，白色的条纹清新自然。"},
    {"content": "类型#裙*材质#针织*风格#复古", "summary": "复古的连衣裙，针织的材质柔软舒适。"},
    {"content": "类型#裤*颜色#黑色", "summary": "黑色的裤子，百搭。"},
]


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    source = folder / "sentences.txt"
    lines = [text for record in RECORDS for text in record.values()]
    source.write_text("\n".join(lines * 20) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=360, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        minloglevel=2, num_threads=1
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def glm2(small_vocabulary: Path) -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(small_vocabulary)


@pytest.fixture(scope="session")
def glm3(small_vocabulary: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(small_vocabulary)


@pytest.fixture(params=["glm2", "glm3"])
def any_tokenizer(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def records_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, as JSON lines, or text or bytes as they are, to a file."""

    def write(content: list[dict] | str | bytes, name: str = "records.json") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write
