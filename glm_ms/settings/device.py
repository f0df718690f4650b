"""Does this machine have what the settings ask for? Answered without importing MindSpore."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from glm_ms.settings.errors import SettingsError
from glm_ms.settings.parallel_checks import is_sharded, parallel_of
from glm_ms.settings.schema import Settings

_CARD = re.compile(r"davinci\d+")
# float16 matrix products convert the weights at every call on a CPU (7 times slower), bfloat16 has none.
_SLOW_ON_CPU = ("float16", "bfloat16")


def ascend_cards(dev: str | Path = "/dev") -> list[str]:
    """Ascend cards this machine or container shows, by device file: `["davinci0", ...]`."""
    folder = Path(dev)
    if not folder.is_dir():
        return []
    cards = [name for name in os.listdir(folder) if _CARD.fullmatch(name)]
    return sorted(cards, key=lambda name: int(name[len("davinci") :]))


def check_device(
    settings: Settings, dev: str | Path = "/dev", environment: Mapping[str, str] | None = None
) -> None:
    """Holds settings to the machine, and fits them to a CPU with a note for each change.

    Args:
        settings: adjusted in place when `context.device_target` is CPU: `compute_dtype` and
            `param_init_type` become float32.
        dev: folder of device files.
        environment: environment variables; None: those of this process.

    Raises:
        SettingsError: no Ascend card, a card number that is not there, a way of training this version lacks,
            or `use_parallel` that does not fit the way the program was started.
    """
    problems = device_problems(settings, dev, environment)
    if problems:
        raise SettingsError(problems)


def device_problems(
    settings: Settings, dev: str | Path = "/dev", environment: Mapping[str, str] | None = None
) -> list[str]:
    """As `check_device`, but returns the problems: a message each."""
    environment = os.environ if environment is None else environment
    if settings.context.device_target == "Ascend":
        problems = _ascend_problems(settings, ascend_cards(dev), environment)
        return problems or _not_in_this_version(settings) + _launch_problems(settings, environment)
    _fit_to_cpu(settings)
    return _not_in_this_version(settings) + _launch_problems(settings, environment)


def _ascend_problems(settings: Settings, cards: list[str], environment: Mapping[str, str]) -> list[str]:
    if environment.get("MS_SIMULATION_LEVEL"):
        return []  # compiles without a card
    where = settings.where("context.device_target")
    if not cards:
        clue = ""
        if environment.get("ASCEND_HOME_PATH") or shutil.which("npu-smi", path=environment.get("PATH")):
            clue = " (the Ascend software is installed; in a container the cards must be passed in)"
        alone = "" if _workers(environment) > 1 else " --use_parallel False"
        return [
            f"{where}: context.device_target: Ascend, but this machine shows no Ascend card: no /dev/davinci*"
            f"{clue}. To run on the CPU add --device_target CPU{alone}"
        ]
    # Under msrun each process gets its card from its rank.
    if not settings.use_parallel and f"davinci{settings.context.device_id}" not in cards:
        where = settings.where("context.device_id")
        number, listing = settings.context.device_id, ", ".join(cards)
        return [f"{where}: context.device_id: {number}, but the cards here are {listing}"]
    return []


def _not_in_this_version(settings: Settings) -> list[str]:
    """What would be accepted and then computed wrongly, or not at all."""
    problems = []

    def refuse(key: str, value: object, remedy: str) -> None:
        problems.append(f"{settings.where(key)}: {key}: {value}: not in this version; {remedy}")

    if is_sharded(settings) and settings.context.device_target == "CPU":
        problems.append(
            f"{settings.where('parallel.parallel_mode')}: parallel.parallel_mode: 1: splitting weights needs Ascend "
            "cards; a CPU has no sharding strategies, use parallel.parallel_mode=0"
        )
    if settings.is_training():
        config = settings.model.model_config
        if config.param_init_type != "float32" and settings.model.pet_config.pet_type is None:
            remedy = "trained weights and moments are float32; use model.model_config.param_init_type=float32"
            refuse("model.model_config.param_init_type", config.param_init_type, remedy)
        if config.compute_dtype == "float16" and settings.runner_wrapper.scale_sense.type is None:
            problems.append(
                f"{settings.where('model.model_config.compute_dtype')}: model.model_config.compute_dtype: float16: "
                "small gradients vanish without loss scaling; set runner_wrapper.scale_sense.type="
                "DynamicLossScaleUpdateCell, or use bfloat16 or float32"
            )
    return problems


def _fit_to_cpu(settings: Settings) -> None:
    config = settings.model.model_config
    for name in ("param_init_type", "compute_dtype"):
        if getattr(config, name) in _SLOW_ON_CPU:
            settings.notes.append(
                f"model.model_config.{name}: {getattr(config, name)} becomes float32 on CPU; "
                "weights are converted while loading"
            )
            setattr(config, name, "float32")


def _workers(environment: Mapping[str, str]) -> int:
    """Processes that msrun, or a rank table, started; 0 for a program started by itself."""
    text = environment.get("MS_WORKER_NUM") or environment.get("RANK_SIZE") or ""
    return int(text) if text.isdecimal() else 0


def _launch_problems(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """`use_parallel` against the number of processes that msrun (or a rank table) started."""
    where = settings.where("use_parallel")
    workers = _workers(environment)
    if settings.use_parallel and not workers:
        return [
            f"{where}: use_parallel: True, but the program was started as a single process; start it with "
            "msrun --worker_num N --local_worker_num N run_glm.py ..., or add --use_parallel False"
        ]
    if not settings.use_parallel and workers > 1:
        return [
            f"{where}: use_parallel: False, but {workers} processes were started; they would write the same "
            "files. Add --use_parallel True, or start with python"
        ]
    parallel = parallel_of(settings)
    if is_sharded(settings) and workers != parallel.cards:
        where = settings.where("parallel_config.data_parallel")
        product = f"{parallel.data_parallel} x {parallel.model_parallel} x {parallel.pipeline_stages}"
        return [
            f"{where}: parallel_config: data_parallel x model_parallel x pipeline_stage = {product} = "
            f"{parallel.cards}, but {workers} processes were started; change one of them"
        ]
    return []
