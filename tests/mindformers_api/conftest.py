"""Fixtures of the tests of MindFormers' interfaces: a vocabulary and runs in this process."""

from __future__ import annotations

from pathlib import Path

import engine_fixtures
import pytest

from glm_ms.storage.run_folder import resolve_checkpoint

vocabulary, finetune = engine_fixtures.vocabulary, engine_fixtures.finetune


@pytest.fixture(scope="module")
def run(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a short training by run_glm.py."""
    return finetune(tmp_path_factory.mktemp("run"), "eval_dataset.num_samples=4")


@pytest.fixture(scope="module")
def weights(run: Path) -> Path:
    """The checkpoint of that run: a folder with config.json and model.safetensors."""
    return resolve_checkpoint(run)
