"""Run by msrun: run_glm.py with a fault on one rank, or a slow one. failing.py FAULT arguments of run_glm.py ..."""

from __future__ import annotations

import errno
import os
import runpy
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
fault, *arguments = sys.argv[1:]
rank = int(os.environ["RANK_ID"]) if os.environ["MS_ROLE"] == "MS_WORKER" else -1


if fault == "reading" and rank == 1:
    from glm_ms.engine.batches import _Rows

    read = _Rows.__getitem__

    def broken(self: _Rows, index: int) -> tuple:
        if index >= 12:
            raise OSError(errno.EIO, "Input/output error", "train.json")
        return read(self, index)

    _Rows.__getitem__ = broken
elif fault == "disk full" and rank == 0:
    from glm_ms.engine.checkpoints import checkpoints

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    checkpoints.write_safetensors = full
elif fault == "slow disk" and rank == 0:
    from glm_ms.engine.checkpoints.checkpoints import Checkpoints

    save = Checkpoints.write

    def slowly(*values: object) -> None:
        if values[1] == 1:
            time.sleep(35)  # collectives on CPU give up after 30 unless told otherwise
        save(*values)

    Checkpoints.write = slowly
elif fault == "evaluating" and rank == 1:
    from glm_ms.generation import GLMForCausalLM

    def overflow(*_: object) -> None:
        raise FloatingPointError("the scores of row 0 hold nan or inf")

    GLMForCausalLM.loss_sum = overflow
elif fault == "weights" and rank == 1:
    import mindspore as ms

    from glm_ms.engine.callbacks import UpdateCallback

    end = UpdateCallback.on_train_step_end

    def corrupt(self: UpdateCallback, run_context: object) -> None:
        context = run_context.original_args()
        if context.cur_step_num == 2:
            weight = next(p for p in context.train_network.weights if p.name.endswith("dense_4h_to_h.weight"))
            weight.set_data(ms.Tensor(weight.asnumpy() * 1.001))
        end(self, run_context)

    UpdateCallback.on_train_step_end = corrupt
sys.argv = [str(REPOSITORY / "run_glm.py"), *arguments]
runpy.run_path(sys.argv[0], run_name="__main__")
