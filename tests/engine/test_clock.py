"""A clock that jumps by hours while a training runs: the numbers, the files and the end are those of any other run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_helpers import DEV_RECORDS, REPOSITORY, SMALL_TRAINING, curve, environment_of_a_user, tiny_arguments

from glm_ms.storage.run_folder import list_checkpoints

pytestmark = pytest.mark.slow

# Every 0.4 s the time of the day is another: as it is, 9 hours later, 9 hours earlier. Other clocks stay as they are.
SHIM = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long jump(void) {
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    long turn = (now.tv_sec * 10 + now.tv_nsec / 100000000) / 4 % 3;
    return turn == 0 ? 0 : turn == 1 ? 32400 : -32400;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
TRAINING = (
    "checkpoint.save_steps=4", "do_eval=True", "eval_step_interval=4", "metric.type=PerplexityMetric",
    "eval_dataset.num_samples=4", f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}",
    "checkpoint.best_metric=perplexity", "logging.tensorboard=True",
)  # fmt: skip
JUMPS = "import time; seen = [time.sleep(0.1) or time.time() for _ in range(12)]; print(max(seen) - min(seen))"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose clock jumps."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(SHIM, encoding="utf-8")
    library = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c")], check=True, timeout=60)
    variables = {**environment_of_a_user(), "LD_PRELOAD": str(library), "LOCAL_DEFAULT_PATH": str(folder)}
    shown = subprocess.run(
        [sys.executable, "-c", JUMPS], env=variables, capture_output=True, text=True, timeout=60, check=True
    )
    assert float(shown.stdout) > 30000
    return variables


def start(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "run_glm.py"), *arguments, "--output_dir", str(folder)]
    with folder.with_name(f"{folder.name}.txt").open("w") as said:
        return subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=said, stderr=said, text=True)


def test_training(finetune, vocabulary: Path, environment: dict[str, str], tmp_path: Path) -> None:
    expected = finetune(tmp_path / "steady", *TRAINING)
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *TRAINING)
    process = start(line, environment, tmp_path / "jumping")
    assert process.wait(240) == 0, (tmp_path / "jumping.txt").read_text()
    assert curve(tmp_path / "jumping") == curve(expected)
    names = [
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.parent.name != "tensorboard")
        for folder in (expected, tmp_path / "jumping")
    ]
    assert set(names[0]) <= set(names[1])
    assert list((tmp_path / "jumping" / "tensorboard").iterdir())


def test_a_signal_ends_the_run(vocabulary: Path, environment: dict[str, str], tmp_path: Path) -> None:
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *TRAINING, "runner_config.epochs=200")
    process = start(line, environment, tmp_path / "run")
    try:
        end = time.monotonic() + 200
        while not list_checkpoints(tmp_path / "run") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 128 + signal.SIGTERM, (tmp_path / "run.txt").read_text()
        assert list_checkpoints(tmp_path / "run")
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
