"""Run by the rig for every rank: run_glm.py itself, on a cluster that computes and sends nothing.

What a card would have computed, and what the ranks would have told one another, is put in: the rest is the program.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import rig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["MS_WORKER_NUM"] = os.environ["RANK_SIZE"]

import run_glm
from glm_ms.engine import callbacks, ranks
from glm_ms.engine.progress import StepRecord

ranks.Ranks.gather = lambda self, value: [value] * self.size
callbacks.UpdateCallback._record = lambda self, step, outputs, scale: StepRecord(
    step, 0.0, 1.0, 0.0, 1.0, 1.0
)

status = run_glm.main(sys.argv[1:])
if status == 0:
    rig._STATE["started"] = True  # the program has made the process group itself
    rig.done()
os._exit(status)
