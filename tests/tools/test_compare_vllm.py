"""The comparison of vLLM with transformers, over an engine of transformers in the place of vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece

from glm_ms.convert.conversion import HF_GLM, plan_conversion
from glm_ms.tokenizer import ChatGLM3Tokenizer
from tools.compare_vllm import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vllm")
    (place / "text").write_text("你好，北京有哪些好玩的地方？\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(place / "text"), model_prefix=str(place / "tokenizer"), model_type="bpe", vocab_size=290,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2
    )  # fmt: skip
    tokenizer = ChatGLM3Tokenizer(place / "tokenizer.model")
    plan_conversion(golden / "models" / "glm3_tiny", place / "glm", target=HF_GLM, tokenizer=tokenizer).run()
    return place / "glm"


class Engine:
    """`vllm.LLM` as far as the tool uses it; `change` is added to the second token of every answer."""

    change = 0

    def __init__(self, model: str, dtype: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def chat(self, messages: list, params: SimpleNamespace) -> list[Any]:
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        options = {"max_new_tokens": params.max_tokens, "do_sample": False, "pad_token_id": 0}
        answer = self.model.generate(torch.tensor([ids]), **options)[0, len(ids) :].numpy()
        answer = answer + self.change * (np.arange(len(answer)) == 1)
        return [SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=answer.tolist())])]


@pytest.mark.parametrize(("change", "status"), [(0, 0), (1, 1)])
def test_answers(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, change: int, status: int) -> None:
    engine = type("Changed", (Engine,), {"change": change})
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine, SamplingParams=SimpleNamespace))
    line = ["--model", str(folder), "--dtype", "float32", "--device", "cpu", "--max_new_tokens", "5"]
    assert main(line) == status
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert ("'你好': equal" in said) is (status == 0)
    assert any("parts where the best logits are" in text for text in said) is (status == 1)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["--model", str(folder)]) == 1
    assert main(["--model", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "vllm is missing: pip install vllm" in said
    assert "not a folder that convert_weight.py --to hf-glm wrote" in said
