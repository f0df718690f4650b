"""Files that belong to the project but not to its Python modules: configurations, tools, the program run_glm.py."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(relative: str) -> Path:
    """The path of "configs", "tools", "run_glm.py" or a file below them, such as "configs/tiny/eval_glm3_tiny.yaml".

    A checkout has them at the top level; an installed package has the folders in `glm_ms/` and `run_glm.py` beside it.
    """
    for folder in (_PACKAGE, _PACKAGE.parent):
        path = folder / relative
        if path.exists():
            return path
    raise FileNotFoundError(f"{relative}: not a file of glm_ms {_PACKAGE}; reinstall the package")
