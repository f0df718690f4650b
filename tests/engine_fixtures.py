"""Fixtures for runs in this process; conftest files of folders that need them name them."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
from engine_helpers import SMALL_TRAINING, run_here, tiny_arguments, write_small_vocabulary

# MindFormers opens log files under this folder when it is imported.
_LOGS = tempfile.TemporaryDirectory(prefix="glm_ms_tests_")
os.environ["LOCAL_DEFAULT_PATH"] = _LOGS.name
# Its log handlers keep the standard output of the test in which they were made, and complain when that is gone.
logging.raiseExceptions = False


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 800 pieces, trained from the sample."""
    return write_small_vocabulary(tmp_path_factory.mktemp("vocabulary"))


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
