"""The guard of a launcher: which processes it takes for those of the job. Launchers that are killed: test_msrun.py."""

from __future__ import annotations

import os
import subprocess
import sys

from glm_ms.launch.guard import MARK, Guard, marked

SLEEP = [sys.executable, "-S", "-c", "print(flush=True); import time; time.sleep(600)"]


def test_marked_processes_are_those_of_one_launcher():
    guards = [Guard({**os.environ, MARK: "of an outer launcher"}), Guard(os.environ)]
    tokens = [guard.environment[MARK] for guard in guards]
    assert len({*tokens, "of an outer launcher"}) == 3
    rank = subprocess.Popen(SLEEP, env=guards[0].environment, stdout=subprocess.PIPE)
    try:
        assert rank.stdout.read(1)
        assert marked(tokens[0]) == [rank.pid]
        assert marked(tokens[1]) == marked("of an outer launcher") == []
        for guard in guards:
            guard.dismiss()
        assert rank.poll() is None  # dismissed, a guard ends nothing
    finally:
        rank.kill()
        rank.communicate()
    assert marked(tokens[0]) == []
