"""The driver gives the same lines on every instruction set, and the sanitizers find nothing in it.

AVX-512 is translated by SIMDe where the processor lacks it, NEON runs in qemu: no other machine is needed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cpu_kernels import build_driver, kernels, run

from glm_ms.ops.cpu import build

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.slow


def lines(program: Path, isa: str, *before: str) -> list[str]:
    """What the driver prints with the kernels of `isa`, which must be usable."""
    done = run([*before, str(program)], GLM_MS_ISA=isa)
    assert done.stderr.splitlines()[0] == isa
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines of the kernels without any instruction set, compiled for this machine."""
    found = lines(build_driver(tmp_path_factory.mktemp("driver") / "driver"), "scalar")
    assert len(found) > 300
    assert all(line.endswith(" wrong=0") for line in found if line.startswith("parts"))
    assert len({line for line in found if line.startswith("contention")}) == 1
    attention = [line for line in found if line.startswith("attention ")]
    assert attention[: len(attention) // 3] * 3 == attention, "with 1, 2 and 5 threads"
    assert len(set(attention)) == len(attention) // 3 == 27
    return found


def test_sanitizers(expected: list[str], tmp_path: Path):
    kernels()
    options = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build_driver(tmp_path / "driver", options=options)
    for isa in dict.fromkeys(("scalar", kernels().glm_ms_isa().decode())):
        assert lines(program, isa) == expected, isa


def test_thread_sanitizer(expected: list[str], tmp_path: Path):
    program = build_driver(tmp_path / "driver", options=("-O1", "-g", "-fsanitize=thread"))
    assert lines(program, kernels().glm_ms_isa().decode()) == expected


def test_avx512(expected: list[str], tmp_path: Path):
    if build.architecture() != "x86_64":
        pytest.skip("AVX-512 is for x86-64")
    if kernels().glm_ms_isa() == b"avx512":
        assert lines(build_driver(tmp_path / "native"), "avx512") == expected
        return
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("no SIMDe (package libsimde-dev)")
    # g++ 12 fails in its pass "esra" over some translated functions.
    options = ("-O1", "-w", "-fno-tree-sra", f'-DGLM_TRANSLATED="{HERE / "avx512_translated.h"}"')
    flags = {"isa_avx512.cpp": build.INSTRUCTION_SETS["x86_64"]["avx2"]}
    assert lines(build_driver(tmp_path / "driver", options=options, flags=flags), "avx512") == expected


def test_neon(expected: list[str], tmp_path: Path):
    if build.architecture() == "aarch64":
        compiler, emulator = "", ()
    elif shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64"):
        compiler, emulator = "aarch64-linux-gnu-g++ -static", ("qemu-aarch64",)
    else:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64")
    program = build_driver(tmp_path / "driver", compiler=compiler, machine="aarch64")
    for isa in ("neon", "neondot"):
        assert lines(program, isa, *emulator) == expected, isa
