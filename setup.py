"""Places configs/ and tools/ inside the installed package, where `glm_ms.resources` finds them."""

from pathlib import Path

from setuptools import find_packages, setup

folders = [Path("configs"), *(path for path in sorted(Path("configs").rglob("*")) if path.is_dir())]
configs = [".".join(("glm_ms", *path.parts)) for path in folders]

setup(
    packages=[*find_packages(include=["glm_ms*"]), *configs, "glm_ms.tools"],
    package_dir={"glm_ms.configs": "configs", "glm_ms.tools": "tools"},
    package_data={
        "glm_ms": ["py.typed"],
        "glm_ms.serve": ["web/*"],
        **{name: ["*.yaml", "*.json", "*.md"] for name in configs},
    },
    py_modules=["run_glm"],
)
