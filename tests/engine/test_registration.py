"""What a run enters into MindFormers, and what importing the engine does; each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import REPOSITORY, SMALL_TRAINING, environment_of_a_user, tiny_arguments
from marks import slow_unless

IN_MINDFORMERS = """
import json, pprint, sys
from mindformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from mindformers.tools.register import MindFormerRegister
from mindformers.trainer import base_trainer
print(json.dumps({
    "registered": sorted(
        name
        for classes in MindFormerRegister.registry.values()
        for name, cls in classes.items()
        if cls.__module__.startswith("glm_ms.")
    ),
    "api": "glm_ms.mindformers_api" in sys.modules,
    "pprint": base_trainer.pprint is pprint.pprint,
    "tokenizers": "glm" in TOKENIZER_MAPPING_NAMES,
}))
"""


def python(text: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**environment_of_a_user(), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *options, "-c", text], cwd=folder, env=environment, capture_output=True, text=True,
        encoding="utf-8", timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_registers_its_own_classes_only(vocabulary: Path, tmp_path: Path) -> None:
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, "runner_config.max_steps=1")
    arguments = [*line, "--output_dir", str(tmp_path / "run")]
    text = f"import run_glm\nassert run_glm.main({arguments!r}) == 0\n{IN_MINDFORMERS}"
    done = python(text, tmp_path, "-W", "error:import glm_ms.engine:DeprecationWarning")
    assert json.loads(done.stdout) == {
        "registered": ["GLMAdamW", "GLMTrainOneStep", "GLMTrainer"],
        "api": False,
        "pprint": True,
        "tokenizers": True,
    }
    assert not (tmp_path / "run" / "strategy").exists()


@pytest.mark.parametrize(
    "statement", slow_unless(["import glm_ms.engine"], ["import glm_ms.engine", "from glm_ms import engine"])
)
def test_the_engine_itself_registers_with_a_deprecation_line(tmp_path: Path, statement: str) -> None:
    done = python(f"{statement}\n{statement}\nimport glm_ms.engine.ranks\n{IN_MINDFORMERS}", tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"GLMAdamW", "GLMTrainOneStep", "GLMTrainer", "GLMForCausalLM", "GLM3Tokenizer"} <= set(found["registered"])
    assert done.stderr.count("DeprecationWarning: import glm_ms.engine registers") == 1


@pytest.mark.parametrize(
    "statement", ["import glm_ms.engine.process", "import importlib; importlib.import_module('glm_ms.engine.process')"]
)
def test_importing_a_module_changes_nothing(tmp_path: Path, statement: str) -> None:
    text = (
        "import os, sys, logging\nbefore = dict(os.environ)\n"
        f"{statement}\nassert os.environ == before\nassert not logging.root.manager.disable\n"
        "assert not {'mindspore', 'mindformers', 'glm_ms.mindformers_api'} & set(sys.modules)"
    )
    assert python(text, tmp_path).stderr == ""
