"""Whether this machine has what the settings need. Imports no MindSpore."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from glm_ms.launch.processes import ascend_cards
from glm_ms.launch.rank_job import JOB_VARIABLES
from glm_ms.ops.cpu import library
from glm_ms.ops.cpu.blas import has_blas, has_native_bfloat16
from glm_ms.settings.checks import Rule, placed, violated
from glm_ms.settings.errors import Problem
from glm_ms.settings.schema import Settings, is_sharded, parallel_of, rounds_products

# What msrun sets for each rank.
_MSRUN = ("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM")
_COUNTS = ("MS_WORKER_NUM", "RANK_SIZE")
# Variables that are converted to a number somewhere, whether the run is parallel or not.
_NUMBERS = (*_COUNTS, "RANK_ID", "DEVICE_ID", "DEVICE_NUM", "LOCAL_RANK_SIZE", "MS_NODE_ID", "MS_SCHED_PORT")
# On a CPU, float16 matrix products of MindSpore convert the weights at every call (7 times slower); bfloat16 has none.
_SLOW_ON_CPU = ("float16", "bfloat16")
# Run modes of the C++ kernels, which read weights of 16 bits. Exported graphs have operators of MindSpore.
_WITH_KERNELS = ("eval", "predict")
_COMPUTE, _STORED = "model.model_config.compute_dtype", "model.model_config.param_init_type"
# What a note adds about a changed type.
_ON_CPU = {"compute_dtype": "", "param_init_type": "; weights are converted while loading"}
# What would be accepted and then computed wrongly, or not at all.
_UNSUPPORTED = (
    Rule("parallel.parallel_mode", lambda s: is_sharded(s) and s.context.device_target == "CPU",
         "1: sharded weights need Ascend cards; a CPU has no sharding strategies, use parallel.parallel_mode=0"),
    Rule(_STORED, lambda s: s.is_training() and s.get(_STORED) != "float32" and s.model.pet_config.pet_type is None,
         f"{{{_STORED}}}: not supported, trained weights are float32; use {_STORED}=float32"),
    Rule(_COMPUTE,
         lambda s: s.is_training() and s.get(_COMPUTE) == "float16" and s.runner_wrapper.scale_sense.type is None,
         "float16: small gradients become zero without loss scaling; set runner_wrapper.scale_sense.type="
         "DynamicLossScaleUpdateCell, or use bfloat16 or float32"),
)  # fmt: skip


def machine_problems(
    settings: Settings, dev: str | Path = "/dev", environment: Mapping[str, str] = os.environ
) -> list[Problem]:
    """Compares settings with the machine: cards, what the device can train, and the number of processes.

    With `context.device_target: CPU`, `compute_dtype` and `param_init_type` become float32, with a note for each
    change. If the CPU kernels are there, training keeps `compute_dtype: bfloat16`, and evaluation and prediction keep
    `param_init_type`. `dev` is the folder of device files.
    """
    if settings.context.device_target == "Ascend":
        problems = list(_card(settings, ascend_cards(dev), environment))
        if problems:
            return placed(settings, problems)
    else:
        _fit_to_cpu(settings)
    return placed(settings, [*violated(settings, _UNSUPPORTED), *_processes(settings, environment)])


def _card(settings: Settings, cards: list[str], environment: Mapping[str, str]) -> Iterator[Problem]:
    if environment.get("MS_SIMULATION_LEVEL"):
        return  # compiles without a card
    number = settings.context.device_id
    if not cards:
        installed = environment.get("ASCEND_HOME_PATH") or shutil.which("npu-smi", path=environment.get("PATH"))
        clue = " (the Ascend software is installed; a container needs access to the cards)" if installed else ""
        alone = "" if _workers(environment) > 1 else " --use_parallel False"
        message = f"Ascend, but this machine has no Ascend card: no /dev/davinci*{clue}"
        yield Problem("context.device_target", f"{message}. To run on the CPU add --device_target CPU{alone}")
    elif not settings.use_parallel and f"davinci{number}" not in cards:  # msrun gives each process its card
        yield Problem("context.device_id", f"{number}, but the cards here are {', '.join(cards)}")


def _fit_to_cpu(settings: Settings) -> None:
    config = settings.model.model_config
    rounded = rounds_products(settings) and settings.is_training() and has_blas()
    if rounded and not has_native_bfloat16():
        remark = "this processor has no instructions for bfloat16; float32 is faster and exact"
        settings.notes.append(f"{_COMPUTE}: {remark}")
    kept = {
        "param_init_type": settings.run_mode in _WITH_KERNELS and library.load() is not None,
        "compute_dtype": rounded,
    }
    for name, keeps in kept.items():
        if getattr(config, name) in _SLOW_ON_CPU and not keeps:
            change = f"{getattr(config, name)} becomes float32 on CPU{_ON_CPU[name]}"
            settings.notes.append(f"model.model_config.{name}: {change}")
            setattr(config, name, "float32")


def _workers(environment: Mapping[str, str]) -> int:
    """Processes that msrun, or a rank table, started; 0 for a program started by itself."""
    text = environment.get("MS_WORKER_NUM") or environment.get("RANK_SIZE") or ""
    return int(text) if text.isdecimal() else 0


def _left_over(environment: Mapping[str, str]) -> str:
    """The variables of a job with their values, and how to remove them."""
    found = [name for name in JOB_VARIABLES if name in environment]
    values = ", ".join(f"{name}={environment[name]}" for name in found)
    return f"{values} in the environment. If they are left over from another job: unset {' '.join(found)}"


def _wrong_variables(environment: Mapping[str, str]) -> Iterator[Problem]:
    """Variables that MindSpore or MindFormers would fail on, or that contradict each other."""
    for name in _NUMBERS:
        text = environment.get(name, "0")
        if not (text.isascii() and text.isdecimal()):
            what = "empty" if not text else "not a whole number"
            yield Problem("", f"{name}={text}: {what}; remove it: unset {name}", where="environment")
    workers, names = _workers(environment), [name for name in _COUNTS if environment.get(name)]
    if len({environment[name] for name in names}) > 1:
        yield Problem("", f"the numbers of processes differ: {_left_over(environment)}", where="environment")
    elif workers and environment.get("RANK_ID", "0").isdecimal() and int(environment.get("RANK_ID", "0")) >= workers:
        message = f"RANK_ID={environment['RANK_ID']}, but {names[0]}={workers}: {_left_over(environment)}"
        yield Problem("", message, where="environment")


def _processes(settings: Settings, environment: Mapping[str, str]) -> Iterator[Problem]:
    wrong = list(_wrong_variables(environment))
    yield from wrong
    workers, parallel = _workers(environment), parallel_of(settings)
    start = "msrun --worker_num N --local_worker_num N run_glm.py ..., or add --use_parallel False"
    if wrong:
        return
    if settings.use_parallel and not workers:
        yield Problem("use_parallel", f"True, but the program was started as a single process; start it with {start}")
    elif settings.use_parallel and not _is_rank(settings, environment):
        tables = ", and a CPU uses no rank table" if environment.get("RANK_TABLE_FILE") else ""
        message = f"True, but this process is not a rank of msrun, which sets {', '.join(_MSRUN)}{tables}"
        yield Problem("use_parallel", f"{message}. Start it with {start}. Set are {_left_over(environment)}")
    elif not settings.use_parallel and workers > 1:
        message = f"False, but {workers} processes were started, which would write the same files, according to"
        yield Problem("use_parallel", f"{message} {_left_over(environment)}. Otherwise add --use_parallel True")
    elif is_sharded(settings) and workers != parallel.cards:
        product = (
            f"{parallel.data_parallel} x {parallel.model_parallel} x {parallel.pipeline_stages} = {parallel.cards}"
        )
        message = f"data_parallel x model_parallel x pipeline_stage = {product}, but {workers} processes were started"
        yield Problem("parallel_config.data_parallel", f"{message}; change one of them")


def _is_rank(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether this process can connect to others: started by msrun, from a rank table, or pretended."""
    if environment.get("MS_SIMULATION_LEVEL") or all(environment.get(name) for name in _MSRUN):
        return True
    table = all(environment.get(name) for name in ("RANK_ID", "RANK_SIZE", "RANK_TABLE_FILE"))
    return table and settings.context.device_target == "Ascend"
