"""What the project takes from MindFormers and MindSpore beyond their documented interfaces, in one place.

When a new version moves a name, this is the file to change; tests/engine/test_mindformers_internals.py names it.
"""

from __future__ import annotations

import logging

from mindformers.core.context import build_context
from mindformers.core.optim import build_optim
from mindformers.tools.logger import get_logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.utils.file_utils import set_output_path
from mindformers.wrapper import build_wrapper
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell as VirtualDatasetCell

from glm_ms.engine.process import is_verbose, no_warnings

__all__ = [
    "MindFormerModuleType",
    "MindFormerRegister",
    "NameTakenError",
    "VirtualDatasetCell",
    "build_context",
    "build_optim",
    "build_wrapper",
    "check_name_is_free",
    "log_to_folder",
    "register_class",
]


class NameTakenError(RuntimeError):
    """MindFormers has another class under a name of glm_ms; registering ours would replace it silently."""


def register_class(cls: type, kind: str) -> None:
    """Enters a class into MindFormers' registry under its own name; safe to call again.

    Args:
        cls: the class.
        kind: of MindFormerModuleType.

    Raises:
        NameTakenError: another class has the name.
    """
    found = MindFormerRegister.registry.get(kind, {}).get(cls.__name__)
    check_name_is_free(found, cls.__name__, cls, f"registry of kind {kind}")
    MindFormerRegister.register_cls(cls, kind)


def check_name_is_free(found: type | None, name: str, cls: type, where: str) -> None:
    """Raises NameTakenError if `found`, which MindFormers has under `name`, is not the class `cls`."""
    if found is not None and (found.__module__, found.__qualname__) != (cls.__module__, cls.__qualname__):
        raise NameTakenError(
            f"MindFormers' {where} has {found.__module__}.{found.__qualname__} as {name!r}, which glm_ms needs for its "
            "own class; run glm_ms without the package that registered it"
        )


def log_to_folder(output_dir: str) -> None:
    """MindFormers writes its log below `output_dir`; the terminal gets errors only, unless GLM_MS_VERBOSE is set.

    MindFormers has one logger for each output folder.
    """
    if is_verbose():
        set_output_path(output_dir)
        return
    with no_warnings():  # the call itself logs, through a logger that it has just created
        set_output_path(output_dir)
    for handler in get_logger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
