"""Small SentencePiece vocabularies, so that tests run without the genuine one."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

SENTENCES = [
    "类型#上衣*版型#宽松*颜色#白色*风格#简约*图案#条纹",
    "类型#裙*材质#针织*风格#复古*裙长#连衣裙",
    "这款上衣简约大方，白色的条纹清新自然。",
    "复古的连衣裙，针织的材质柔软舒适，你好世界。",
    "the quick brown fox jumps over the lazy dog, sop and eop",
    "hello there, a plain text with user and assistant",
]


def _train(folder: Path, **options: object) -> Path:
    source = folder / "sentences.txt"
    source.write_text("\n".join(SENTENCES * 20) + "\n", encoding="utf-8")
    settings = {
        "vocab_size": 380,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.Train(
        input=str(source), model_prefix=str(folder / "tokenizer"), **{**settings, **options}
    )
    return folder / "tokenizer.model"


# The last is what `spm_train` makes when only the size is given: normalized text, no byte pieces.
VOCABULARIES = {
    "bytes": {},
    "bpe": {"model_type": "bpe"},
    "no_dummy_prefix": {"add_dummy_prefix": False},
    "moved_ids": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    "no_bos": {"bos_id": -1},
    "no_bytes": {
        "byte_fallback": False,
        "vocab_size": 150,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
}


@pytest.fixture(scope="session", params=list(VOCABULARIES))
def any_vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of several kinds of small vocabulary."""
    return _train(tmp_path_factory.mktemp(request.param), **VOCABULARIES[request.param])


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary with byte pieces and ids laid out as in the genuine one."""
    return _train(tmp_path_factory.mktemp("small"))
