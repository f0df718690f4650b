"""vec.h computes the same bits on every instruction set; `exp` and `silu` are as exact as float32 allows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cpu_kernels import kernels, run

from glm_ms.ops.cpu import build

HERE = Path(__file__).resolve().parent


def lines(folder: Path, isa: str, compiler: str = "", options: tuple[str, ...] = (), before: tuple[str, ...] = ()):
    """What vec.cpp prints, compiled for an instruction set."""
    program = folder / isa
    command = [*(compiler or build.find_compiler()).split(), *build.FLAGS, *options, f"-I{build.SOURCES}"]
    run([*command, "-Wno-unused-function", f"-DGLM_{isa.upper()}", str(HERE / "vec.cpp"), "-o", str(program)])
    return run([*before, str(program)]).stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines without any instruction set."""
    kernels()  # skips without a compiler
    return lines(tmp_path_factory.mktemp("vec"), "scalar")


def test_errors_and_limits(expected: list[str]):
    found = dict(line.rsplit(" ", 1) for line in expected)
    assert float(found["error exp"]) < 1.5  # units in the last place
    assert float(found["error silu"]) < 3
    assert [line for line in expected if line.startswith("exp(")] == [
        "exp(-inf) = 0", "exp(inf) = inf", "exp(nan) = nan", "exp(-1e+30) = 0", "exp(1e+30) = inf", "exp(0) = 1",
        "exp(-103) = 1.4013e-45", "exp(88.8) = inf",
    ]  # fmt: skip


def test_this_machine(expected: list[str], tmp_path: Path):
    isa = kernels().glm_ms_isa().decode()
    if isa == "scalar":
        pytest.skip("this machine has no vector instructions that the kernels use")
    flags = build.INSTRUCTION_SETS[build.architecture()][isa]
    assert lines(tmp_path, isa.replace("neondot", "neon"), options=flags) == expected


@pytest.mark.slow
def test_translated_avx512(expected: list[str], tmp_path: Path):
    if build.architecture() != "x86_64" or not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("no x86-64, or no SIMDe (package libsimde-dev)")
    translated = ("-w", f'-DGLM_TRANSLATED="{HERE / "avx512_translated.h"}"')
    flags = build.INSTRUCTION_SETS["x86_64"]["avx2"]
    assert lines(tmp_path, "avx512", options=(*translated, *flags)) == expected


@pytest.mark.slow
def test_neon(expected: list[str], tmp_path: Path):
    if not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")):
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64")
    assert lines(tmp_path, "neon", "aarch64-linux-gnu-g++ -static", before=("qemu-aarch64",)) == expected
