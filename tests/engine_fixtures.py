"""Fixtures for runs in this process; conftest files of folders that need them name them."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
from engine_helpers import SMALL_TRAINING, TRAIN_RECORDS, load_script, run_here, tiny_arguments

# MindFormers opens log files under this folder when it is imported.
_LOGS = tempfile.TemporaryDirectory(prefix="glm_ms_tests_")
os.environ["LOCAL_DEFAULT_PATH"] = _LOGS.name
# Its log handlers keep the standard output of the test in which they were made, and complain when that is gone.
logging.raiseExceptions = False


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 800 pieces, trained from the sample."""
    tool = load_script("tools/train_vocab.py")
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    texts = tool.read_texts(TRAIN_RECORDS, ["content", "summary"])
    tool.write_whole(path, tool.train_vocabulary(texts, 800))
    return path


@pytest.fixture(scope="session")
def finetune(vocabulary: Path):
    """Trains a very small network in this process: finetune(output_dir, *arguments, generation=3)."""

    def run(output_dir: Path, *arguments: object, generation: int = 3) -> Path:
        line = tiny_arguments(
            "finetune", vocabulary, *SMALL_TRAINING, "--output_dir", output_dir, *arguments,
            generation=generation
        )  # fmt: skip
        assert run_here(line) == 0
        return output_dir

    return run
