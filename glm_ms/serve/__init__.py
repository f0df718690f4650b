"""Serving: one running batch for many requests, and the doors to it. Nothing here imports mindformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm_ms.serve.server import launch_server
    from glm_ms.serve.terminal import launch_cli_demo
    from glm_ms.serve.web_demo import launch_web_demo

# Function -> the module that it is loaded from on first use.
_HOME = {
    "launch_cli_demo": "glm_ms.serve.terminal",
    "launch_server": "glm_ms.serve.server",
    "launch_web_demo": "glm_ms.serve.web_demo",
}

__all__ = ["launch_cli_demo", "launch_server", "launch_web_demo"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'glm_ms.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
