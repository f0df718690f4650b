"""Flags of `glm-ms chat` and `glm-ms serve` for all answers: the type of keys and values, and prompt lookup."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from serve.service import running_engine

from glm_ms.generation.config import GenerationConfig
from glm_ms.ops.cpu import library
from glm_ms.serve import demo, terminal
from glm_ms.serve.completion_request import CompletionRequest
from glm_ms.serve.loading import build_engine
from glm_ms.serve.model_arguments import add_model_arguments, load_model
from glm_ms.serve.settings import ServeSettings
from glm_ms.settings.schema import GenerationSettings
from glm_ms.tokenizer import ChatGLM3Tokenizer

LOOKUP = "prompt_lookup_num_tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, golden: Path, tokenizer: ChatGLM3Tokenizer) -> Path:
    """A model with its tokenizer."""
    made = tmp_path_factory.mktemp("model") / "glm3"
    shutil.copytree(golden / "models" / "glm3_tiny", made)
    shutil.copy(tokenizer.vocab_file, made / "tokenizer.model")
    (made / "tokenizer_config.json").write_text(json.dumps({"model_generation": 3}))
    return made


@pytest.mark.parametrize("kept", [None, "bfloat16"])
def test_keys_and_values_of_chat_and_server(folder: Path, kept: str | None) -> None:
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    parser = ArgumentParser()
    add_model_arguments(parser)
    flags = [] if kept is None else ["--kv-cache", kept]
    model, tokenizer = load_model(parser.parse_args(["--model", str(folder), *flags]))
    assert model.kv_cache == kept
    engine = build_engine(model, tokenizer, "tiny", {}, ServeSettings(slots=2, context=64))
    try:
        assert engine.scheduler._decoder.graphs.storage == (kept or "float32")
    finally:
        engine.scheduler.close()


def test_prompt_lookup_of_a_server(tokenizer: ChatGLM3Tokenizer) -> None:
    with running_engine(tokenizer, **{LOOKUP: 3}) as engine:
        assert CompletionRequest(prompt="a").config(engine, 5).prompt_lookup_num_tokens == 3
        assert demo._config(engine, demo.DemoRequest(prompt="a"), 4).prompt_lookup_num_tokens == 3


def test_its_default_is_the_same_at_every_door() -> None:
    doors = (ServeSettings(), GenerationSettings(), GenerationConfig(1))
    assert len({getattr(door, LOOKUP) for door in doors}) == 1


def test_prompt_lookup_of_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[dict[str, Any]] = []

    def begin(model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
        found.append(options)

    monkeypatch.setattr(terminal, "rounds_of", begin)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115 - closed with the test
    assert terminal.main(["--model", str(folder), "--prompt-lookup-num-tokens", "0"]) == 0
    assert found == [{LOOKUP: 0}]
    with pytest.raises(SystemExit):
        terminal.main(["--model", str(folder), "--prompt-lookup-num-tokens", "-1"])
    assert f"{LOOKUP} = -1: must be at least 0" in capsys.readouterr().err
