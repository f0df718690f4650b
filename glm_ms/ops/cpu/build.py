"""Compiles the C++ kernels of this folder into one library, without a Python symbol in it.

    python -m glm_ms.ops.cpu.build

setup.py loads this file by its path when the package is installed: it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
LIBRARY = "_kernels.so"
COMPILERS = ("c++", "g++", "clang++")
# No option may change a result: each operation is rounded as written.
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-fast-math", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall",
    "-Wextra",
)  # fmt: skip
# Architecture -> instruction sets with their compiler options, the lowest first. The linker keeps the first copy of an
# inline function that several files have: it must be one that runs on every machine.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "scalar": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": (
            "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
            "-mprefer-vector-width=512",
        ),
    },
    "aarch64": {"scalar": (), "neon": (), "neondot": ("-march=armv8.2-a+dotprod",)},
}  # fmt: skip
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(Exception):
    """The library cannot be built; the message says why and what to do."""


def architecture(machine: str | None = None) -> str:
    """Name of the processor's architecture in `INSTRUCTION_SETS`, or as the system calls it."""
    name = (machine or platform.machine()).lower()
    return _ALIASES.get(name, name)


def source_files(machine: str | None = None) -> dict[Path, tuple[str, ...]]:
    """C++ file -> its compiler options beside `FLAGS`, in the order for the linker."""
    sets = INSTRUCTION_SETS.get(architecture(machine), {"scalar": ()})
    common = [path for path in sorted(SOURCES.glob("*.cpp")) if not path.name.startswith("isa_")]
    return {**dict.fromkeys(common, ()), **{SOURCES / f"isa_{name}.cpp": flags for name, flags in sets.items()}}


def sources_digest() -> str:
    """SHA-256 over names and contents of all C++ files and of this file."""
    digest = hashlib.sha256()
    for path in (Path(__file__).resolve(), *sorted(SOURCES.iterdir())):
        if path.suffix in (".py", ".cpp", ".h", ".def"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of `COMPILERS` that is installed.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name.split()[0])
        if found:
            return " ".join([found, *name.split()[1:]])
    if wanted:
        raise BuildError(f"CXX={wanted}: no such compiler")
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}); install g++ 9 or later, or set CXX")


def build(
    output: Path | None = None, *, compiler: str | None = None, machine: str | None = None, options: Sequence[str] = ()
) -> Path:
    """Compiles the library into a file of its own and puts it in place of an older one in one step.

    Args:
        output: Path of the library (default: beside this file).
        compiler: Command of the compiler, with options behind it (default: `find_compiler`).
        machine: Architecture to compile for (default: this one); `compiler` must be one for it.
        options: More options for every file.

    Raises:
        BuildError: no compiler, or it failed; with its last lines.
    """
    output = output or Path(__file__).resolve().parent / LIBRARY
    command = [*(compiler or find_compiler()).split(), *FLAGS, *options]
    with tempfile.TemporaryDirectory() as folder:

        def compile_file(item: tuple[Path, tuple[str, ...]]) -> None:
            path, flags = item
            define = f'-DGLM_MS_SOURCES="{sources_digest()}"'
            _run([*command, *flags, define, "-c", str(path), "-o", str(Path(folder) / f"{path.stem}.o")])

        files = source_files(machine)
        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
            list(pool.map(compile_file, files.items()))
        objects = [str(Path(folder) / f"{path.stem}.o") for path in files]
        linked = Path(folder) / LIBRARY
        _run([*command, "-shared", "-o", str(linked), *objects])
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            fresh = output.with_name(f"{output.name}.{os.getpid()}")
            shutil.copy2(linked, fresh)
            os.replace(fresh, output)
        except OSError as error:
            raise BuildError(f"{output}: not written: {error.strerror or error}") from None
    return output


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror or error}") from None
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BuildError(f"{' '.join(command)}: failed with status {done.returncode}\n{last}")


def main() -> int:
    """Builds the library beside this file; returns the exit status."""
    try:
        path = build()
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
