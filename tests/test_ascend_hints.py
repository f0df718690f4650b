"""Known errors of MindSpore, CANN and HCCL, and what is said about them."""

from __future__ import annotations

import pytest

from glm_ms.ascend_hints import error_lines, hints, host_log_folder, overflow_mode_note

# Messages as MindSpore 2.9, CANN and HCCL write them -> what the first hint must name.
KNOWN = {
    "For 'MatMul', the shape 65024 cannot be divisible by strategy value 3": "model_parallel must divide",
    "The inputs of 'tuple_div' operator should be divisible, but they are not divisible now": "model_parallel",
    "Device_num must be divisible by the stage_num, got device_num: 8": "number of cards",
    "ModuleNotFoundError: No module named 'te'": "set_env.sh",
    "No module named 'tbe'": "set_env.sh",
    "ModuleNotFoundError: No module named 'tvm'": "set_env.sh",
    "Sync stream failed, stream id: 0": "the first ERROR in the log of the rank that failed first",
    "Exec graph failed": "tools/check_device.py",
    "Execute graph failed, graph id: 3": "npu-smi info",
    "No module named 'hccl'": "hccl-*.whl",
    "No module named 'schedule_search'": "set_env.sh",
    'MindSpore relies on whl package "te" in Ascend AI software package': "te-*.whl",
    "libascend_hal.so: cannot open shared object file: No such file or directory": "driver",
    "Load dynamic library: libmindspore_ascend.so.2 failed. libcann_kb.so: cannot open": "8.2, 8.3, 8.5 or 9.0",
    "libge_runner.so: cannot open shared object file: No such file or directory": "set_env.sh",
    "Memory not enough: alloc size[5368709120] is larger than available": "recompute=True",
    "Allocate memory failed, memory size:1024": "recompute=True",
    "Allocate device memory failed!": "recompute=True",
    "Out of memory, Alloc GE memory failed, size: 12": "recompute=True",
    "Memory_Allocation_Failure(EL0004): Failed to allocate memory requested by GE module.": "recompute=True",
    "EJ0001: Failed to initialize the HCCP process. Reason: Maybe the last training process is running.": "10 seconds",
    "EI0006: Getting socket times out. Reason: Remote Rank did not send the data in time": "HCCL_CONNECT_TIMEOUT",
    "wait socket establish timeout, role[0] rank[0] timeout[120 s]": "HCCL_CONNECT_TIMEOUT",
    "EI0002: The wait execution of the Notify register times out": "HCCL_EXEC_TIMEOUT",
    "EI0004: The ranktable is invalid": "tools/hccl_tools.py",
    "EI0005: inconsistent arguments between ranks": "same YAML",
    "EI0009: transport init error": "hccn_tool -i N -link -g",
    "EI9999: Inner error of HCCL": "hccn_tool",
    "Ascend kernel runtime initialization failed. The details refer to 'Ascend Error Message'.": "npu-smi info",
    "5 updates in a row have overflowed and the loss scale has fallen below 1": "INFNAN_MODE",
}  # fmt: skip


@pytest.mark.parametrize("message", KNOWN)
def test_known_errors(message: str) -> None:
    assert KNOWN[message] in hints(message, {"HOME": "/home/me"})[0]


@pytest.mark.parametrize(
    "message",
    [
        "config.yaml:3: model.model_config.num_layer: unknown key; did you mean num_layers?",
        "num_attention_heads = 6 is not a multiple of multi_query_group_num = 4",
        "data/train.json:7: content: missing",
        "checkpoint: out of the 199 tensors 3 are missing",
        "No module named 'tensorboard'",
        "",
    ],
)
def test_other_errors_get_no_hint(message: str) -> None:
    assert error_lines(ValueError(message)) == [f"error: {message}"]


def test_errors_of_a_card_tell_where_its_logs_are() -> None:
    lines = error_lines(RuntimeError("EI0006: Getting socket times out"), {"HOME": "/home/me"})
    assert lines[0] == "error: EI0006: Getting socket times out"
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) == 3
    assert "/home/me/ascend/log" in lines[2]
    assert "ASCEND_GLOBAL_LOG_LEVEL" in lines[2]
    # A size that does not divide is no matter of the card.
    assert len(hints("cannot be divisible by strategy value 3")) == 1


def test_call_stacks_of_mindspore_are_left_out() -> None:
    ruler = "-" * 52
    message = f"Memory not enough: 3\n\n{ruler}\n- C++ Call Stack: (For framework developers)\n{ruler}\na.cc:1 F\n"
    assert error_lines(RuntimeError(message))[0] == "error: Memory not enough: 3"
    ours = f"two problems:\n- one\n{ruler}\n- two"
    assert error_lines(ValueError(ours)) == [f"error: {ours}"]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "/home/me"}, "/home/me/ascend/log"),
        ({"HOME": "/home/me", "ASCEND_WORK_PATH": "/work"}, "/work/log"),
        ({"ASCEND_WORK_PATH": "/work", "ASCEND_PROCESS_LOG_PATH": "/logs"}, "/logs"),
    ],
)
def test_host_log_folder(environment: dict[str, str], folder: str) -> None:
    assert host_log_folder(environment) == folder


@pytest.mark.parametrize(
    ("soc", "mode", "expected"),
    [
        ("ascend910b", None, None),
        ("ascend910b", "INFNAN_MODE", None),
        ("ascend910b", "SATURATION_MODE", "unset it"),
        ("ascend910_93", "SATURATION_MODE", "unset it"),
        ("ascend910", "SATURATION_MODE", None),
        ("ascend910", "INFNAN_MODE", "can only saturate"),
        ("ascend910b", "1", "must be INFNAN_MODE or SATURATION_MODE"),
        ("", "SATURATION_MODE", None),
    ],
)
def test_overflow_mode(soc: str, mode: str | None, expected: str | None) -> None:
    environment = {} if mode is None else {"MS_ASCEND_CHECK_OVERFLOW_MODE": mode}
    note = overflow_mode_note(soc, environment)
    assert note is None if expected is None else expected in note
