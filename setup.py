"""Places configs/ and tools/ inside the installed package, where `glm_ms.resources` finds them, and builds the kernels.

The library of C++ kernels is optional: without a C++ compiler the package installs and runs on portable operators.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

folders = [Path("configs"), *(path for path in sorted(Path("configs").rglob("*")) if path.is_dir())]
configs = [".".join(("glm_ms", *path.parts)) for path in folders]

# By its path: the package itself may need modules that are not installed yet.
_spec = importlib.util.spec_from_file_location("glm_ms_build", "glm_ms/ops/cpu/build.py")
kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)


class BuildKernels(build_ext):
    """Compiles the library as glm_ms.ops.cpu.build does."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_name(kernels.LIBRARY))

    def build_extension(self, extension):
        try:
            kernels.build(Path(self.get_ext_fullpath(extension.name)).resolve())
        except kernels.BuildError as error:
            sys.stderr.write(f"warning: glm_ms is installed without C++ kernels: {error}\n")

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):  # of an installation with -e
        built = Path(self.build_lib, "glm_ms", "ops", "cpu", kernels.LIBRARY)
        if built.exists():
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """The library has no Python symbol: one wheel of a platform is for every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["glm_ms*"]), *configs, "glm_ms.tools", "glm_ms.ops.cpu.src"],
    package_dir={"glm_ms.configs": "configs", "glm_ms.tools": "tools"},
    package_data={
        "glm_ms": ["py.typed"],
        "glm_ms.ops.cpu.src": ["*"],
        "glm_ms.serve": ["web/*"],
        **{name: ["*.yaml", "*.json", "*.md"] for name in configs},
    },
    py_modules=["run_glm"],
    ext_modules=[Extension("glm_ms.ops.cpu._kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
