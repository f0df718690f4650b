"""A small configuration on disk, complete enough for every run mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_ms.settings import Settings, SettingsError, load_settings

CONFIG = """\
run_mode: finetune
output_dir: out
model:
  model_config: {type: GLMConfig, num_layers: 2, seq_length: 192}
  init: random
processor:
  tokenizer: {type: ChatGLM3Tokenizer, vocab_file: tokenizer.model}
train_dataset:
  data_loader: {dataset_dir: data/train.json}
  num_parallel_workers: 1
eval_dataset:
  data_loader: {dataset_dir: data/dev.json}
  batch_size: 8
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a good YAML; the current directory is its folder, the files it names exist."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("tokenizer.model", "data/train.json", "data/dev.json"):
        Path(name).write_text("{}\n", encoding="utf-8")
    path = Path("run.yaml")
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def load_legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """load_legacy(text, *overrides, flags=None): settings of a file old.yaml; no other file is looked at."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str, flags: dict[str, Any] | None = None) -> Settings:
        Path("old.yaml").write_text(text, encoding="utf-8")
        return load_settings("old.yaml", overrides, flags, check_files=False)

    return run


@pytest.fixture
def legacy_refused(load_legacy):
    """legacy_refused(text, *overrides): the problems, one a line."""

    def run(text: str, *overrides: str) -> str:
        with pytest.raises(SettingsError) as caught:
            load_legacy(text, *overrides)
        return str(caught.value)

    return run
