"""A small configuration on disk, complete enough for every run mode."""

from __future__ import annotations

from pathlib import Path

import pytest

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
