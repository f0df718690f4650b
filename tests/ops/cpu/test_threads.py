"""The thread pool: children of fork, several callers, numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from cpu_kernels import kernels, product, threads

REPOSITORY = Path(__file__).resolve().parents[3]
# Forks while other threads are inside the pool; each child computes with a pool of its own.
FORKS = """
import os, sys, threading
import numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from cpu_kernels import kernels, product
kernels().glm_ms_set_threads(4)
weight = np.random.default_rng(0).standard_normal((512, 256), np.float32)
x = np.random.default_rng(1).standard_normal((2, 256), np.float32)
expected = product(weight, x)
stop = threading.Event()

def busy():
    while not stop.is_set():
        assert np.array_equal(product(weight, x), expected)

callers = [threading.Thread(target=busy) for _ in range(2)]
for caller in callers: caller.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(product(weight, x), expected) for _ in range(20))
        os._exit(0 if same and kernels().glm_ms_threads() >= 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for caller in callers: caller.join()
print("done")
"""


def test_children_of_fork_have_threads_of_their_own():
    kernels()
    done = subprocess.run(
        [sys.executable, "-c", FORKS, REPOSITORY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_several_callers_at_once():
    """One has the pool, the others compute alone: all get the same bits."""
    weight = np.random.default_rng(0).standard_normal((256, 300), np.float32)
    x = np.random.default_rng(1).standard_normal((20, 300), np.float32)
    expected, wrong = product(weight, x), []

    def call() -> None:
        for _ in range(30):
            if not np.array_equal(product(weight, x), expected):
                wrong.append(1)

    with threads(3):
        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=60)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


def test_threads_follow_the_cores_of_the_process():
    library = kernels()
    with threads(3):
        assert library.glm_ms_threads() == 3
        library.glm_ms_set_threads(0)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert library.glm_ms_threads() == cores
