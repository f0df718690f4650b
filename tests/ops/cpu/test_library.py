"""The library of C++ kernels: it is built, loaded once, and its absence is said once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from glm_ms.ops.cpu import build, library

TELL = """
import warnings
from glm_ms.ops.cpu import library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(library.load() is not None, library.load() is not None, len(caught))
print(library.reason())
print(library.description())
"""


def tell(**environment: str) -> list[str]:
    """Lines of TELL in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", TELL], capture_output=True, text=True, timeout=60, check=True,
        cwd=Path(__file__).resolve().parents[3], env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_the_library_names_its_instruction_set():
    lines = tell(GLM_MS_ISA="scalar")
    if lines[0].startswith("False"):
        pytest.skip(lines[1])
    assert lines[0] == "True True 0"
    assert lines[1] == "None"
    assert lines[2].startswith("scalar, ")
    assert lines[2].endswith(str(library.path()))


def test_an_unknown_instruction_set_is_refused():
    if library.reason() is not None:
        pytest.skip(library.reason())
    lines = tell(GLM_MS_ISA="mmx")
    assert lines[0] == "False False 1"
    assert lines[1].startswith("GLM_MS_ISA=mmx: not an instruction set of this machine (avx512, avx2, ")
    assert lines[2] == f"none: {lines[1]}"


@pytest.fixture
def other_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`library` looks for its file in a folder of the test, and has forgotten what it loaded."""
    file = tmp_path / "_kernels.so"
    monkeypatch.setattr(library, "path", lambda: file)
    for cached in (library._load, library._warn):
        cached.cache_clear()
    yield file
    for cached in (library._load, library._warn):
        cached.cache_clear()


def test_a_missing_library_is_said_once(other_path: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (library.load(), library.load()) == (None, None)
    (said,) = caught
    assert str(said.message) == f"portable operators in place of C++ kernels: {library.reason()}"
    assert library.reason() == (
        f"{other_path}: missing; build it with `python -m glm_ms.ops.cpu.build` (it needs a C++ compiler)"
    )


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_of_other_sources_is_refused(other_path: Path, content: bytes):
    other_path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert library.load() is None
    assert library.reason().startswith(f"{other_path}: not built from the sources beside it")


def test_a_damaged_library_is_refused(other_path: Path):
    other_path.write_bytes(f"sources {build.sources_digest()}".encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert library.load() is None
    assert library.reason().startswith(f"{other_path}: not usable (")


def test_errors_of_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(build.BuildError, match="CXX=no-such-compiler -O3: no such compiler"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler .*install g\+\+"):
        build.build(tmp_path / "library.so")
    monkeypatch.undo()
    with pytest.raises(build.BuildError, match="failed with status"):
        build.build(tmp_path / "library.so", compiler=sys.executable)
    assert not (tmp_path / "library.so").exists()


def test_every_source_is_compiled_or_included():
    """A file in src/ that nothing uses is an error of its author."""
    compiled = {path.name for machine in build.INSTRUCTION_SETS for path in build.source_files(machine)}
    text = "".join(path.read_text(encoding="utf-8") for path in build.SOURCES.iterdir())
    for path in build.SOURCES.iterdir():
        assert path.name in compiled or f'#include "{path.name}"' in text, path


def test_architectures():
    assert build.architecture("AMD64") == "x86_64"
    assert build.architecture("arm64") == "aarch64"
    assert [path.name for path in build.source_files("riscv64")][-1] == "isa_scalar.cpp"
    names = [path.name for path in build.source_files("x86_64")]
    assert names.index("isa_scalar.cpp") < names.index("isa_avx2.cpp") < names.index("isa_avx512.cpp")
