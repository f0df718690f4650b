"""Training runs in processes of their own, slow enough to be killed at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine_helpers import REPOSITORY, environment_of_a_user

# run_glm.py whose every tensor file but those of the first checkpoint of a folder takes FILE_SECONDS, and every
# micro batch STEP_SECONDS more. Neither changes a number.
SLOW_RUN = """
import runpy, sys, time
from glm_ms.engine.callbacks import UpdateCallback
from glm_ms.engine.checkpoints import checkpoints
from glm_ms.peft import adapter

def slow(path, shapes, dtype, arrays, metadata):
    whole = list(path.parent.parent.glob("step_*"))
    pause = {file_seconds} / len(shapes) if whole else 0
    write(path, shapes, dtype, (time.sleep(pause) or array for array in arrays), metadata)

write = checkpoints.write_safetensors
for module in (checkpoints, adapter):
    module.write_safetensors = slow
end = UpdateCallback.on_train_step_end
UpdateCallback.on_train_step_end = lambda *arguments: time.sleep({step_seconds}) or end(*arguments)
runpy.run_path({program!r}, run_name="__main__")
"""


class Attempt:
    """A run that is started to be killed.

    Args:
        output_dir: folder of the run; relative paths begin at its parent.
        arguments: of run_glm.py.
        file_seconds: time to write a tensor file of a checkpoint; None: the program as it is.
        step_seconds: time added to every micro batch.
    """

    def __init__(
        self, output_dir: Path, arguments: list[str], file_seconds: float | None = None, step_seconds: float = 0.0
    ) -> None:
        program = str(REPOSITORY / "run_glm.py")
        text = SLOW_RUN.format(file_seconds=file_seconds, step_seconds=step_seconds, program=program)
        command = [sys.executable, *([program] if file_seconds is None else ["-c", text]), *arguments]
        environment = {**environment_of_a_user(), "PYTHONPATH": str(REPOSITORY)}
        environment["LOCAL_DEFAULT_PATH"] = str(output_dir)
        self.output_dir, self.said = output_dir, output_dir.with_name(f"{output_dir.name}.stderr")
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=output_dir.parent, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def kill_when(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Waits for `condition`, kills the process; whether it was still running."""
        end = time.monotonic() + timeout
        while not condition() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        running = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        assert time.monotonic() < end, self.said.read_text()
        return running and self.process.returncode == -signal.SIGKILL

    def wait(self, timeout: float = 120) -> int:
        """The exit status."""
        return self.process.wait(timeout)

    def writing(self, step: int | None = None) -> bool:
        """Whether tensors of the checkpoint of `step` (None: of any) are on their way to the disk."""
        name = ".step_*" if step is None else f".step_{step:08d}.*"
        return any((self.output_dir / "checkpoint").glob(f"{name}.partial/*.safetensors*"))
