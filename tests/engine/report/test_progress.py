"""Files of a training run: lost lines are told, TensorBoard's file needs no thread, a full disk ends the run."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from pathlib import Path

import pytest

from glm_ms.settings import Settings
from glm_ms.storage.errors import WriteError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    import mindspore  # noqa: F401 - before tensorboardX: it selects the implementation of protobuf

    return Settings(output_dir=str(tmp_path))


def record(step: int):
    from glm_ms.engine.report.progress import StepRecord

    return StepRecord(step, step / 4, 1.5, 0.1, float("inf"), 9.0)


def log(settings: Settings, start: int, said: list[str]):
    from glm_ms.engine.report.progress import ProgressLog

    return ProgressLog(settings, 9, start, True, said.append)


def read_events(path: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    content, events = path.read_bytes(), []
    while content:
        length, checksum = struct.unpack("<QI", content[:12])
        assert checksum == masked_crc32c(content[:8])
        assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked_crc32c(content[12 : 12 + length]),)
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_events_are_written_by_the_thread_that_trains(settings: Settings, tmp_path: Path) -> None:
    threads = threading.enumerate()
    progress = log(settings, 3, [])
    progress.step(record(4))
    progress.evaluation(4, 1.0, {"rouge-l": 2.5})
    new = [thread for thread in threading.enumerate() if thread not in threads]
    assert all(type(thread).__module__.startswith("tqdm") for thread in new)
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, step, evaluation = read_events(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, start.session_log.START)
    assert {value.tag: value.simple_value for value in step.summary.value} == pytest.approx(
        {"loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 9.0}
    )
    assert (step.step, evaluation.summary.value[0].tag, evaluation.summary.value[0].simple_value) == (
        4,
        "eval/rouge-l",
        2.5,
    )
    progress.close()


def test_lost_lines_are_told(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in range(1, 8)]
    lines[1], lines[3] = '{"step"', "\0\0"
    file.write_text("\n".join([*lines, lines[6][:5]]))
    (tmp_path / "checkpoint" / "step_00000006").mkdir(parents=True)
    said: list[str] = []
    log(settings, 6, said).close()
    assert said == [
        f"{file}: 2 damaged lines, the first is line 2; their numbers are lost, and the lines are removed",
        f"{file}: 2 steps before the checkpoint have no line, the first is step 2",
    ]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3, 5, 6]
    said.clear()
    (tmp_path / "checkpoint" / "step_00000006").rename(tmp_path / "checkpoint" / "step_00000005")
    log(settings, 6, said).close()  # of a run that began in another folder
    assert said == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval_metrics.jsonl", "tensorboard/events.*"])
def test_a_full_disk_ends_the_run(settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.logging.tensorboard = "events" in name
    progress = log(settings, 0, [])
    write, calls = os.write, []

    def full(descriptor: int, content: bytes) -> int:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).match(name):
            calls.append(content)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr("os.write", full)
    act = {"eval_metrics.jsonl": lambda: progress.evaluation(1, 1.0, {"loss": 2.5})}
    with pytest.raises(WriteError, match=rf"{name}: cannot be written: No space left on device; free space .* MB"):
        act.get(name, lambda: progress.step(record(1)))()
    progress.close()
    assert len(calls) == 1
