"""Causes and remedies of error messages of MindSpore, CANN and HCCL, in one table.

Error codes are those of CANN's troubleshooting reference ("HCCL Errors", EI0001 and following, EJ0001); texts are
those of MindSpore 2.9.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh in this shell"
_LINK = "check every card with hccn_tool -i N -link -g, hccn_tool -i N -net_health -g and hccn_tool -i N -tls -g"
# CANN versions that MindSpore 2.9 accepts, from its own check (mindspore/run_check/_check_version.py).
_CANN = "8.2, 8.3, 8.5 or 9.0"


class Hint(NamedTuple):
    """One known cause."""

    pattern: str  # matches somewhere in the message, in upper or lower case
    text: str  # cause and remedy
    of_device: bool = True  # the logs of the card have details


_HINTS = (
    Hint(r"(can ?not|can't|must|should) be (evenly )?(divisible|divided)|not divisible",
         "a size is not divisible by the number of its parts. parallel_config.model_parallel must divide "
         "num_attention_heads, hidden_size and ffn_hidden_size of model.model_config, and padded_vocab_size where "
         "vocab_emb_dp is False; data_parallel and micro_batch_num the rows of a step (runner_config.batch_size); "
         "pipeline_stage num_layers; data_parallel * model_parallel * pipeline_stage is the number of cards", False),
    Hint(r"No module named '?(te|tbe|tvm|topi|hccl|schedule_search|auto_tune|op_test_frame|opc_tool)\b|"
         r"whl package \"?te\"?|Cannot find the tbe operator|\btvm\b",
         f"the Python parts of CANN are not on the path of this interpreter: {_SET_ENV}; if they are still missing, "
         "pip install sympy $ASCEND_HOME_PATH/lib64/te-*.whl $ASCEND_HOME_PATH/lib64/hccl-*.whl", False),
    Hint(r"libascend_hal\.so|libdrv|Cannot find driver so",
         "the driver is not found: npu-smi info must list the cards, and LD_LIBRARY_PATH must have "
         "/usr/local/Ascend/driver/lib64/driver and /usr/local/Ascend/driver/lib64/common; in a container, mount "
         "/usr/local/Ascend/driver and pass the cards (/dev/davinci*, davinci_manager, devmm_svm, hisi_hdc)", False),
    Hint(r"lib(ge|graph|ascendcl|hccl|runtime|cann|acl|opapi|nnopbase|error_manager|register)\w*\.so|"
         r"libmindspore_ascend\.so|Cannot find opp path|ASCEND_OPP_PATH",
         f"CANN is not found, or not of a version that MindSpore 2.9 works with ({_CANN}): {_SET_ENV} and compare "
         "with the table on https://www.mindspore.cn/install", False),
    Hint(r"memory not enough|memory is not enough|out of (device )?memory|alloc\w* [\w ]*memory[\w ]* (failed|error)|"
         r"allocate memory failed|AllocFeatureMemory|EL0004|EI0007|EI0011",
         "the card has not enough free memory. Try a smaller runner_config.batch_size, "
         "recompute_config.recompute=True, parallel.enable_parallel_optimizer=True or more model_parallel; "
         "tools/plan.py --config ... --memory 32GB names the nearest setting that fits. npu-smi info shows other "
         "processes on the card, context.max_device_memory is what MindSpore may take", False),
    Hint(r"EJ0001|HCCP process",
         "an earlier process still uses the card: end it (npu-smi info lists processes), wait 10 seconds, start again"),
    Hint(r"EI0006|get(ting)? socket|wait socket establish|socket timeout|HCCL_CONNECT_TIMEOUT",
         "not all ranks connected in time. Find the rank that failed first: the others wait for it. If none failed, "
         f"allow more time (export HCCL_CONNECT_TIMEOUT=600, 120 to 7200 seconds, 120 if unset) and {_LINK}"),
    Hint(r"EI0002|Notify (register|wait)|HCCL_EXEC_TIMEOUT",
         "a rank waited too long for another one. Find the rank with the earlier error; if a rank only does slow work, "
         f"such as writing checkpoints, increase HCCL_EXEC_TIMEOUT (seconds); {_LINK}"),
    Hint(r"EI0004|EI0014|EI0017|rank[_ ]?table",
         "the rank table does not fit the machine: make a new one with tools/hccl_tools.py on every server and "
         "tools/merge_hccl.py on one; device_ip must be the output of hccn_tool -i N -ip -g. msrun needs no rank "
         "table: unset RANK_TABLE_FILE"),
    Hint(r"EI0001", "an HCCL environment variable has a value that is not allowed; the message names it", False),
    Hint(r"EI0003|EI0005",
         "the ranks do not run the same program: same YAML, same flags, same version on every server"),
    Hint(r"EI0008", "the servers have different versions of CANN"),
    Hint(r"EI0009|EI0010|EI0012|EI0013|EI0015", f"the link between two cards fails: {_LINK}"),
    Hint(r"EI0019|EI0020", "an address or port for HCCL is taken: end the other job, or change HCCL_IF_BASE_PORT"),
    Hint(r"Ascend kernel runtime initialization failed|device.{0,20}(is )?(busy|occupied)",
         "the card cannot be opened: npu-smi info shows its health and the process that uses it; "
         "context.device_id selects another one"),
    Hint(r"sync(hronize)? stream (failed|error)|stream synchronize failed|SyncStream|"
         r"exec(ute)? (the )?graph fail|graph exec(ution)? fail|stream execute failed",
         "the card stopped while it computed; the cause is the first ERROR in the log of the rank that failed first. "
         "Usual causes: another rank has ended or waits, too little memory (npu-smi info; try a smaller "
         "runner_config.batch_size), a kernel that fails on this card (tools/check_device.py). context.mode=1 names "
         "the operator"),
    Hint(r"updates? in a row (have|has) overflowed|loss scale has fallen",
         "on 800T A2 and later cards an overflow gives infinities: unset MS_ASCEND_CHECK_OVERFLOW_MODE or set it to "
         "INFNAN_MODE (SATURATION_MODE hides them). Otherwise the run diverges: lower the learning rate, or compute in "
         "bfloat16, which needs no loss scaling", False),
    Hint(r"\bE[IJ]\d{4}\b|\bHCCL\b.*(error|fail)", f"communication between cards failed: {_LINK}"),
)  # fmt: skip


def hints(message: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Known causes of an error, the most specific first, with remedies and the place of the card's logs."""
    found = [hint for hint in _HINTS if re.search(hint.pattern, message, re.IGNORECASE)]
    if len(found) > 1:  # the last entry matches every code
        found = [hint for hint in found if hint is not _HINTS[-1]]
    lines = [hint.text for hint in found]
    if any(hint.of_device for hint in found):
        place = f"the card's own logs are in {host_log_folder(environment)} (debug/plog, one file per process)"
        lines.append(f"{place}; export ASCEND_GLOBAL_LOG_LEVEL=1 logs more")
    return lines


def error_lines(error: BaseException | str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Lines for the terminal: `error: ...`, without MindSpore's C++ call stack, and `hint: ...` per known cause."""
    message = str(error)
    return [f"error: {essence(message)}", *(f"hint: {line}" for line in hints(message, environment))]


def essence(message: str) -> str:
    """A message without the rulers and C++ call stack of MindSpore."""
    head, stack, _ = message.partition("- C++ Call Stack")
    if not stack:
        return message
    return "\n".join(line for line in head.strip().splitlines() if line.strip("- ")) or message


def host_log_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Folder of CANN's logs: ASCEND_PROCESS_LOG_PATH, ASCEND_WORK_PATH/log or ~/ascend/log."""
    if environment.get("ASCEND_PROCESS_LOG_PATH"):
        return environment["ASCEND_PROCESS_LOG_PATH"]
    if environment.get("ASCEND_WORK_PATH"):
        return str(Path(environment["ASCEND_WORK_PATH"]) / "log")
    return str(Path(environment.get("HOME", "~")) / "ascend" / "log")


def overflow_mode_note(soc: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """A remark if MS_ASCEND_CHECK_OVERFLOW_MODE does not suit the chip (`glm_ms.ops.ascend.soc_version`), or None."""
    mode = environment.get("MS_ASCEND_CHECK_OVERFLOW_MODE")
    if not soc or mode is None:
        return None
    name = f"MS_ASCEND_CHECK_OVERFLOW_MODE={mode}"
    if mode not in ("INFNAN_MODE", "SATURATION_MODE"):
        return f"{name}: must be INFNAN_MODE or SATURATION_MODE; unset it for the card's own default"
    if mode == "SATURATION_MODE" and soc != "ascend910":
        return f"{name}: this card ({soc}) gives infinities, which loss scaling and clipping need; unset it"
    if mode == "INFNAN_MODE" and soc == "ascend910":
        return f"{name}: this card (910A) can only saturate; unset it"
    return None
