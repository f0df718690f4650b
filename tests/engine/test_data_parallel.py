"""Two ranks of msrun against one process with the double batch, with dropout, loss scaling and evaluation."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import (
    DEV_RECORDS,
    REPOSITORY,
    SMALL_TRAINING,
    curve,
    environment_of_a_user,
    read_jsonl,
    tiny_arguments,
)
from tolerances import GRAD_NORM, LOSS_CURVE

TRAINING = (
    "model.model_config.hidden_dropout=0.1", "model.model_config.attention_dropout=0.1", "checkpoint.save_steps=4",
    "runner_wrapper.scale_sense.type=DynamicLossScaleUpdateCell", "do_eval=True", "eval_step_interval=5",
    "metric.type=PerplexityMetric", "eval_dataset.num_samples=4",
    f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}",
)  # fmt: skip


def two_ranks(vocabulary: Path, folder: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = environment_of_a_user()
    # msrun starts the `python` of PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *TRAINING, *arguments)
    done = subprocess.run(
        ["msrun", "--worker_num", "2", "--local_worker_num", "2", "--master_port", str(port), "--join", "True",
         "--log_dir", str(folder / "msrun"), str(REPOSITORY / "run_glm.py"), *line, "--use_parallel", "True",
         "--output_dir", str(folder / "run")],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    logs = "".join(path.read_text(errors="replace") for path in (folder / "msrun").glob("worker_*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs


@pytest.mark.slow
def test_ranks_make_one_batch(vocabulary: Path, finetune, tmp_path: Path) -> None:
    if shutil.which("msrun", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("no msrun beside this Python")
    one = finetune(tmp_path / "one", *TRAINING, "runner_config.batch_size=4")
    (tmp_path / "two").mkdir()
    two_ranks(vocabulary, tmp_path / "two", "runner_config.batch_size=2")
    run = tmp_path / "two" / "run"
    lines, others = curve(one), curve(run)
    assert len(lines) == len(others) == 12
    for name, tolerance in (("loss", LOSS_CURVE), ("grad_norm", GRAD_NORM)):
        np.testing.assert_allclose(*([x[name] for x in each] for each in (others, lines)), **tolerance)
    scores = [read_jsonl(each / "eval_metrics.jsonl") for each in (run, one)]
    assert [line["step"] for line in scores[0]] == [5, 6, 10, 12]
    np.testing.assert_allclose(*([line["loss"] for line in each] for each in scores), **LOSS_CURVE)
    (tmp_path / "again").mkdir()
    shutil.copytree(run, tmp_path / "again" / "run")
    shutil.rmtree(tmp_path / "again" / "run" / "checkpoint" / "step_00000012")
    two_ranks(vocabulary, tmp_path / "again", "runner_config.batch_size=2", "--resume_training", "True")
    assert curve(tmp_path / "again" / "run") == others  # to the last digit
