"""What the ranks tell one another, and how a fault on one of them ends the job."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from engine_helpers import DEV_RECORDS, SMALL_TRAINING, curve, tiny_arguments
from engine_ranks import SCRIPTS, RankJob

from glm_ms.engine.ranks import RankError, Ranks

# From the reason in a log to the end of both ranks. msrun looks after its processes once a second; the rest is for a
# busy machine. (msrun itself then waits half a minute for its scheduler.)
SECONDS_TO_END = 10.0
# Where the fault is, the rank that must tell the reason, and the reason.
FAULTS = {
    "reading": (1, "Input/output error"),
    "disk full": (0, "No space left on device"),
    "evaluating": (0, "rank 1 has failed: FloatingPointError: the scores of row 0 hold nan or inf"),
    "weights": (
        0,
        "the weights of rank 0 are not those of rank 1: transformer.encoder.layers.0.mlp.dense_4h_to_h",
    ),
}


@pytest.mark.slow
def test_exchange(tmp_path: Path) -> None:
    job = RankJob(tmp_path / "job", [], SCRIPTS / "exchange.py").succeed()
    assert "all is well" in job.log(0)
    assert "all is well" in job.log(1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_on_one_rank_ends_the_job(vocabulary: Path, tmp_path: Path, fault: str) -> None:
    line = tiny_arguments(
        "finetune", vocabulary, *SMALL_TRAINING, "runner_config.batch_size=2", "runner_config.epochs=20",
        "checkpoint.save_steps=3", "do_eval=True", "eval_step_interval=4", "metric.type=PerplexityMetric",
        "eval_dataset.num_samples=4", "eval_dataset.batch_size=2", "train_dataset.num_parallel_workers=1",
        f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}"
    )  # fmt: skip
    run = [*line, "--use_parallel", "True", "--output_dir", tmp_path / "run"]
    job = RankJob(tmp_path / "job", [fault, *run], SCRIPTS / "failing.py")
    rank, reason = FAULTS[fault]
    job.wait_until(lambda: reason in job.log(rank))
    failed = time.monotonic()
    job.wait_until(lambda: job.ranks_alive() == 0, SECONDS_TO_END)
    print(f"{fault}: the ranks ended {time.monotonic() - failed:.1f} s after the reason was given")
    job.end_scheduler()
    assert job.finish() != 0


@pytest.mark.slow
def test_ranks_wait_for_a_slow_checkpoint(vocabulary: Path, tmp_path: Path) -> None:
    line = tiny_arguments(
        "finetune", vocabulary, *SMALL_TRAINING, "runner_config.batch_size=2", "runner_config.max_steps=2",
        "checkpoint.save_steps=1"
    )  # fmt: skip
    run = [*line, "--use_parallel", "True", "--output_dir", tmp_path / "run"]
    RankJob(tmp_path / "job", ["slow disk", *run], SCRIPTS / "failing.py").succeed()
    assert [line["step"] for line in curve(tmp_path / "run")] == [1, 2]


def test_one_rank_alone() -> None:
    alone = Ranks()
    assert alone.first
    assert alone.gather((1, 2)) == [(1, 2)]
    assert alone.from_first("a") == "a"
    assert list(alone.share_out(range(3), lambda item: item * item)) == [0, 1, 4]
    alone.agree("settings", {"a": 1})
    with pytest.raises(ZeroDivisionError):  # as it is, and not as a RankError
        list(alone.share_out([1], lambda item: item / 0))
    assert issubclass(RankError, ValueError)  # run_glm.py shows it without a traceback
