"""tools/check_device.py: on a CPU as a user starts it, and its judgement with stand-ins for kernels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import mindspore as ms
import pytest
from marks import slow_unless
from mindspore import Tensor, nn

from glm_ms.kernels.cases import SMALL
from glm_ms.ops import registry
from glm_ms.ops.cpu import library
from glm_ms.ops.portable import ApplyRotary, GroupedAttention, RMSNormalize
from glm_ms.selfcheck import device as engine
from glm_ms.selfcheck.golden import golden_rows
from glm_ms.selfcheck.kernels import fused_rows
from glm_ms.selfcheck.rows import Row, row_lines

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOOL = REPOSITORY / "tools" / "check_device.py"


@pytest.fixture
def compiled() -> Iterator[None]:
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=mode)


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_device_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(lines: list[str]) -> list[list[str]]:
    """Cells of the rows of a table, without its head."""
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.count("|") == 7]
    assert [*rows[0][:5], rows[0][7]] == ["check", "shape", "dtype", "max diff", "allowed", "result"]
    return rows[1:]


@pytest.mark.slow
def test_a_cpu_as_a_user_checks_it(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(TOOL)],
        cwd=tmp_path,
        env={**os.environ, "GLOG_v": "3"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"device: CPU, MindSpore {ms.__version__}"
    assert lines[1] == f"C++ kernels: {library.description()}"
    assert lines[2].startswith("Fused kernels are NOT run: the device is CPU")
    assert lines[-1] == "11 of 11 passed"
    rows = table(lines)
    assert [row[0] for row in rows] == [
        "RMS norm", "rotary embedding", "attention", "attention, one token",
        "attention over pages", "attention over pages, one token", "int8 product", "int4 product",
        "portable training: loss", "portable training: gradient", "portable generation: tokens",
    ]  # fmt: skip
    for _, shape, dtype, difference, allowed, fused, portable, verdict in rows:
        assert shape
        assert (dtype, fused, verdict) == ("float32", "-", "pass")
        assert 0 <= float(difference) <= float(allowed)
        assert float(portable) > 0
    assert float(rows[0][3]) > 0  # nothing is compared with itself
    assert list(tmp_path.iterdir()) == []


def with_fused(monkeypatch: pytest.MonkeyPatch, cells: dict[str, Callable[[ms.Type], nn.Cell]]) -> None:
    """Registers kernels for this device: those given, the portable operator itself for the others."""
    for operator in registry.operators_of(registry.PORTABLE):
        build = cells.get(operator)

        class Kernel:
            @staticmethod
            def why_not(cell: nn.Cell, dtype: ms.Type) -> None:
                return None

            @staticmethod
            def replacing(cell: nn.Cell, dtype: ms.Type, build=build) -> nn.Cell:
                return cell if build is None else build(dtype)

        monkeypatch.setitem(registry.OPERATORS, (operator, "CPU"), Kernel)


class Wrong(nn.Cell):
    """A norm that is a hundredth too large, several times what is allowed for float16."""

    def __init__(self, dtype: ms.Type) -> None:
        super().__init__()
        self.norm = RMSNormalize(1e-5)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, weight) * 1.01


class Cut(nn.Cell):
    """Rotary that forgets its last channel."""

    def __init__(self, dtype: ms.Type) -> None:
        super().__init__()
        self.rotary = ApplyRotary(SMALL.dim, dtype)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.rotary(x, cos, sin)[..., :-1]


class NotFinite(nn.Cell):
    """Rotary that gives NaN."""

    def __init__(self, dtype: ms.Type) -> None:
        super().__init__()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * float("nan")


class Missing(nn.Cell):
    """A kernel that the card does not have."""

    def __init__(self, dtype: ms.Type) -> None:
        super().__init__()
        raise RuntimeError("Unsupported op [FlashAttentionScore]\n----\n- C++ Call Stack: x.cc:1")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rotary", slow_unless([NotFinite], [NotFinite, Cut]))
def test_wrong_broken_and_missing_kernels_fail_alone(monkeypatch: pytest.MonkeyPatch, rotary: type[nn.Cell]) -> None:
    def flash(dtype: ms.Type) -> nn.Cell:
        built.append(dtype)
        return Missing(dtype) if len(built) < 3 else GroupedAttention(SMALL.heads, SMALL.groups, SMALL.dim)

    built: list[ms.Type] = []
    with_fused(monkeypatch, {"RMS norm": Wrong, "rotary embedding": rotary, "attention": flash})
    rows = {row.check: row for row in fused_rows(SMALL, "float16")}
    assert list(rows) == [
        "RMS norm", "RMS norm, gradient", "rotary embedding", "rotary embedding, gradient",
        "attention", "attention, gradient", "attention, one token", "attention over pages",
        "attention over pages, one token", "int8 product", "int4 product",
    ]  # fmt: skip
    assert [name for name, row in rows.items() if row.passed] == list(rows)[-5:]
    assert rows["RMS norm"].allowed < rows["RMS norm"].difference < 0.1
    if rotary is Cut:
        assert "shape (2, 24, 6, 15), expected (2, 24, 6, 16)" in rows["rotary embedding"].message
    else:
        assert rows["rotary embedding"].difference != rows["rotary embedding"].difference
    assert list(row_lines(rows["attention"]))[1].strip() == ("RuntimeError: Unsupported op [FlashAttentionScore]")


@pytest.mark.usefixtures("compiled")
def test_a_cell_without_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.OPERATORS, ("new operator", "CPU"), nn.Cell)
    (row,) = fused_rows(SMALL, "float32")
    assert (row.check, row.passed) == ("new operator", False)
    assert "no case for this operator" in row.message


@pytest.mark.usefixtures("compiled")
def test_right_kernels_pass_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    with_fused(monkeypatch, {})
    rows = list(fused_rows(SMALL, "float16"))
    assert len(rows) == 11
    for row in rows:
        assert row.passed, (row.check, row.message)
        assert row.difference == 0
        assert row.fused_ms > 0
        assert row.portable_ms > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_kernels_that_are_not_there_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernels themselves, on a device without them."""
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    rows = list(fused_rows(SMALL, "float16"))
    assert len(rows) == 11
    assert not any(row.passed for row in rows)
    assert all(row.message for row in rows)


def test_hints_follow_a_failed_row() -> None:
    lines = list(row_lines(Row("RMS norm", "2x2", "float16", message="RuntimeError: Memory not enough: 3")))
    assert lines[0].endswith("| FAIL")
    assert "recompute_config.recompute=True" in lines[2]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_other_weights_are_noticed(golden: Path, tmp_path: Path) -> None:
    """Golden numbers of one model and weights of another: every row fails."""
    for name in ("train", "models"):
        (tmp_path / name).mkdir()
    for file in ("curves.json", "batches_right_padded.npz"):
        shutil.copy(golden / "train" / file, tmp_path / "train")
    shutil.copytree(golden / "models" / "glm2_tiny", tmp_path / "models" / "glm2_tiny")
    for file in ("model.safetensors", "config.json"):
        shutil.copy(golden / "models" / "glm3_tiny" / file, tmp_path / "models" / "glm2_tiny")
    rows = list(golden_rows(tmp_path, "float32", fused=False))
    assert [row.passed for row in rows] == [False, False, False]
    assert all(row.difference > row.allowed for row in rows)
    (tmp_path / "models" / "glm2_tiny" / "model.safetensors").unlink()
    rows = list(golden_rows(tmp_path, "float32", fused=False))
    assert [row.passed for row in rows] == [False, False]
    assert all("model.safetensors" in row.message or "glm2_tiny" in row.message for row in rows)


@pytest.mark.parametrize("golden_folder", [None, Path("nowhere")])
def test_without_golden_numbers_it_says_so(monkeypatch: pytest.MonkeyPatch, golden_folder: Path | None) -> None:
    monkeypatch.setattr(engine, "portable_rows", lambda sizes: iter([Row("x", "1", "float32", 0.0, 1.0)]))
    lines: list[str] = []
    assert engine.run_checks(golden_folder, lines.append)
    assert lines[-1] == "1 of 1 passed"
    assert lines[-2].startswith("training and generation were not checked")


def test_one_failure_is_an_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("x", "1", "float32", 0.0, 1.0), Row("y", "1", "float32", 2.0, 1.0)]
    monkeypatch.setattr(engine, "portable_rows", lambda sizes: iter(rows))
    lines: list[str] = []
    assert not engine.run_checks(None, lines.append)
    assert lines[-1] == "1 of 2 passed, 1 FAILED"


@pytest.mark.parametrize(
    ("arguments", "cards", "message"),
    [
        (["--device_target", "Ascend"], [], "has no Ascend card"),
        (["--device_id", "1"], [], "a CPU has no number"),
        (["--device_id", "3"], ["davinci0", "davinci1"], "the cards here are 0, 1"),
        (["--device_target", "GPU"], [], "invalid choice"),
        (["--device", "CPU"], [], "unrecognized arguments"),
    ],
)
def test_wrong_usage(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], cards: list[str], message: str
) -> None:  # fmt: skip
    monkeypatch.setattr(tool, "ascend_cards", lambda: cards)
    with pytest.raises(SystemExit) as left:
        tool.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cards", "device"),
    [
        ([], ["davinci2", "davinci3"], ("Ascend", 2)),
        (["--device_id", "3"], ["davinci2", "davinci3"], ("Ascend", 3)),
        (["--device_target", "CPU"], ["davinci0"], ("CPU", 0)),
        ([], [], ("CPU", 0)),
    ],
)
def test_which_device_is_checked(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], cards: list[str], device: tuple
) -> None:
    monkeypatch.setattr(tool, "ascend_cards", lambda: cards)
    chosen = []
    monkeypatch.setattr(engine, "set_device", lambda *device: chosen.append(device))
    monkeypatch.setattr(engine, "run_checks", lambda golden, say: golden.is_dir())
    assert tool.main(arguments) == 0
    assert chosen == [device]


def test_a_card_that_cannot_be_opened(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*device: object) -> None:
        raise RuntimeError("Ascend kernel runtime initialization failed.")

    monkeypatch.setattr(tool, "ascend_cards", lambda: ["davinci0"])
    monkeypatch.setattr(engine, "set_device", fail)
    assert tool.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Ascend kernel runtime initialization failed.\nhint: ")
    assert "npu-smi info" in error
