"""The device of runs without training: set as the settings say, kept in a process that has it already."""

from __future__ import annotations

import mindspore as ms
import pytest

from glm_ms.engine import device
from glm_ms.settings import Settings

IN_USE = "The runtime has been initialized, please set it before the kernel is executed"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What MindSpore was asked for."""
    found: list[tuple] = []
    monkeypatch.setattr(ms, "set_context", lambda **values: found.append(("context", values)))
    monkeypatch.setattr(ms, "set_device", lambda *values: found.append(("device", *values)))
    monkeypatch.setattr(ms.runtime, "set_memory", lambda **values: found.append(("memory", values)))
    monkeypatch.setattr(device, "init", lambda: found.append(("init",)))
    monkeypatch.setattr(ms, "set_auto_parallel_context", lambda **values: found.append(("parallel", values)))
    monkeypatch.delenv("MS_ROLE", raising=False)
    return found


def settings(target: str = "CPU", number: int = 0, memory: str | None = None, parallel: bool = False) -> Settings:
    made = Settings()
    made.context.device_target, made.context.device_id, made.context.max_device_memory = target, number, memory
    made.use_parallel = parallel
    return made


def test_a_cpu_has_no_number(given: list[tuple]) -> None:
    device.set_device(settings())
    assert given == [("context", {"mode": 0}), ("device", "CPU", None)]


def test_a_card_has_one_and_a_memory_limit(given: list[tuple]) -> None:
    device.set_device(settings("Ascend", 3, "58GB"))
    assert given[1:] == [("device", "Ascend", 3), ("memory", {"max_size": "58GB"})]


def test_ranks_of_msrun_are_numbered_by_mindspore(given: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    device.set_device(settings("Ascend", 3, parallel=True))
    assert given[1:] == [("device", "Ascend", None), ("init",), ("parallel", {"parallel_mode": "data_parallel"})]


@pytest.mark.parametrize(
    ("target", "number", "reason", "kept"),
    [
        ("CPU", 0, IN_USE, True),
        ("CPU", 0, "The 'mindspore.set_device' can not be modified.", True),
        ("CPU", 0, "The 'set_memory' can not be set repeatedly.", True),
        ("CPU", 0, "the driver is broken", False),
        ("Ascend", 0, IN_USE, False),
    ],
)
def test_a_device_in_use(
    given: list[tuple], monkeypatch: pytest.MonkeyPatch, target: str, number: int, reason: str, kept: bool
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(ms, "set_device", refuse)
    monkeypatch.setattr(ms, "get_context", {"device_target": "CPU", "device_id": 0}.get)
    if kept:
        device.set_device(settings(target, number))
    else:
        with pytest.raises(RuntimeError, match=reason):
            device.set_device(settings(target, number))
