"""What the project takes from MindFormers and MindSpore beyond their documented interfaces, in one place.

When a new version moves a name, this is the file to change; tests/engine/test_mindformers_internals.py names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from mindformers import MindFormerConfig
from mindformers.core.context import build_context
from mindformers.core.optim import build_optim
from mindformers.mindformer_book import MindFormerBook
from mindformers.models.auto.configuration_auto import CONFIG_MAPPING
from mindformers.tools.logger import get_logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS
from mindformers.trainer.trainer import SUPPORT_MODEL_NAMES
from mindformers.utils.file_utils import set_output_path
from mindformers.wrapper import build_wrapper
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell as VirtualDatasetCell

from glm_ms.engine.process import is_verbose, no_warnings

# Handed on; the rest is used below.
__all__ = [
    "CONFIG_MAPPING",
    "MindFormerModuleType",
    "VirtualDatasetCell",
    "build_context",
    "build_optim",
    "build_wrapper",
]


class NameTakenError(RuntimeError):
    """MindFormers has another class under a name of glm_ms; registering ours would replace it silently."""


def register_class(cls: type, kind: str, name: str | None = None) -> None:
    """Enters a class into MindFormers' registry of a MindFormerModuleType; safe to call again.

    `name` is its name in YAML files, by default that of the class. Raises NameTakenError if another class has it.
    """
    name = name or cls.__name__
    found = MindFormerRegister.registry.get(kind, {}).get(name)
    check_name_is_free(found, name, cls, f"registry of kind {kind}")
    MindFormerRegister.register_cls(cls, kind, alias=name)


def check_name_is_free(found: type | None, name: str, cls: type, where: str) -> None:
    """Raises NameTakenError if `found`, which MindFormers has under `name`, is not the class `cls`."""
    if found is not None and (found.__module__, found.__qualname__) != (cls.__module__, cls.__qualname__):
        raise NameTakenError(
            f"MindFormers' {where} has {found.__module__}.{found.__qualname__} as {name!r}, which glm_ms needs for its "
            "own class; run glm_ms without the package that registered it"
        )


def log_to_folder(output_dir: str) -> None:
    """MindFormers writes its log, one for each output folder, below `output_dir`; quiets the terminal."""
    with nullcontext() if is_verbose() else no_warnings():  # the call logs, through a logger that it has just created
        set_output_path(output_dir)
    quiet_terminal()


def quiet_terminal() -> None:
    """Lets MindFormers print errors only, unless GLM_MS_VERBOSE is set; its log file gets everything."""
    for handler in [] if is_verbose() else get_logger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)


def add_model_name(name: str, path: str) -> None:
    """Makes `Trainer(task="text_generation", model_name=name)`, `model=name`, or a pipeline read the YAML at `path`.

    Raises NameTakenError if it reads another one.
    """
    names = MindFormerBook.get_trainer_support_task_list()["text_generation"]
    if names.setdefault(name, path) != path:
        raise NameTakenError(f"MindFormers has {names[name]} for the model {name!r}, glm_ms has {path}")
    SUPPORT_MODEL_NAMES.add(name)  # the names for `model=`, computed when MindFormers was imported
    MindFormerBook.get_pipeline_support_task_list()["text_generation"].setdefault(name, path)
    kind = name.split("_")[0]  # the errors about unknown names list these
    for table in (
        MindFormerBook.get_config_support_list(), MindFormerBook.get_model_support_list(),
        MindFormerBook.get_tokenizer_support_list(), MindFormerBook.get_processor_support_list()
    ):  # fmt: skip
        if name not in table.setdefault(kind, []):
            table[kind].append(name)


def section_keys(section: str) -> set[str]:
    """Keys of MindFormers in a section of a YAML; "" for the top level."""
    if not section:
        return {*CONFIG_NAME_TO_CLASS, *CONFIG_NAME_TO_CLASS["general_config"].keys()}
    template = CONFIG_NAME_TO_CLASS.get(section)
    return set(template.keys()) if template else set()


def extend_yaml_reader(accepts: Callable[[str], bool], read: Callable[[str], dict[str, Any]]) -> None:
    """Makes `MindFormerConfig(path)` call `read` for accepted paths. A second call changes nothing.

    This replaces a method, because every interface of MindFormers reads YAML files with it and none has a hook.
    """
    original = MindFormerConfig._file2dict
    if original.__module__ == __name__:
        return

    def extended(filename: str = "") -> dict[str, Any]:
        return read(filename) if accepts(filename) else original(filename)

    MindFormerConfig._file2dict = staticmethod(extended)


def extend_from_pretrained(auto_class: type, accepts: Callable[[str], bool], load: Callable[..., Any]) -> None:
    """Makes `auto_class.from_pretrained(path)` call `load` for accepted paths. A second call changes nothing.

    This replaces a method, because MindFormers chooses by the name of a file or folder: it takes a YAML file or a model
    name for a download, and with `trust_remote_code=True` runs the Python files of a folder.
    """
    original = auto_class.from_pretrained  # type: ignore[attr-defined]
    if original.__module__ == __name__:
        return

    def extended(*args: Any, **kwargs: Any) -> Any:
        path = kwargs.get("pretrained_model_name_or_path") or next(iter(args), None)
        return load(*args, **kwargs) if isinstance(path, str) and accepts(path) else original(*args, **kwargs)

    auto_class.from_pretrained = staticmethod(extended)  # type: ignore[attr-defined]
