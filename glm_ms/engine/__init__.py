"""Training, evaluation and prediction from settings, through MindFormers."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import FrameType


def _is_imported_for_a_submodule() -> bool:
    """Whether `import glm_ms.engine.x` runs this file, and not `import glm_ms.engine` itself.

    Python imports a package before its submodules and does not tell it why. The frames of the import system do.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        is_import = frame.f_globals.get("__name__") == "importlib._bootstrap"
        if is_import and str(frame.f_locals.get("name", "")).startswith(f"{__name__}."):
            return True
        frame = frame.f_back
    return False


if not _is_imported_for_a_submodule():
    warnings.warn(
        "import glm_ms.engine registers the classes for MindFormers in this version only: import "
        "glm_ms.mindformers_api for them",
        DeprecationWarning,
        stacklevel=2,
    )
    importlib.import_module("glm_ms.mindformers_api")
    for _name in ("config", "dataset", "generation", "model", "tokenizer", "trainer"):
        sys.modules[f"{__name__}.mf_{_name}"] = importlib.import_module(f"glm_ms.mindformers_api.{_name}")
