"""Plots of a run: what is drawn, what is left out and why, whole files, long and short runs."""

from __future__ import annotations

import ast
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_ms.engine.report import plots
from glm_ms.engine.report.plots import Curve, smooth, thin, write_plots

Image = pytest.importorskip("PIL.Image")
EVALUATION = (0xD9, 0x54, 0x1E)
WARNING = (0xC0, 0x00, 0x00)


def _training(steps: int, **changes: Any) -> list[dict[str, Any]]:
    """Lines as a run writes them; `changes` are functions of the step, or values."""
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step, "epoch": round(step / 75, 4), "loss": 7 * math.exp(-step / 40) + 0.1,
            "learning_rate": 1e-3 * (1 - step / steps), "grad_norm": 1 + step % 7, "tokens_per_second": 9e3,
        }  # fmt: skip
        for name, value in changes.items():
            line[name] = value(step) if callable(value) else value
        lines.append(line)
    return lines


def _evaluation(*steps: int) -> list[dict[str, Any]]:
    scores = {"rouge-1": 40.0, "rouge-2": 20.0, "rouge-l": 35.0, "bleu-4": 10.0}
    return [{"step": step, "epoch": step / 75, **scores, "loss": 2.0, "perplexity": math.exp(2)} for step in steps]


def _write(folder: Path, training: list[Any], evaluation: list[Any] = ()) -> Path:
    for name, lines in (("metrics.jsonl", training), ("eval_metrics.jsonl", evaluation)):
        if lines:
            text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def _pixels(path: Path, color: tuple[int, int, int]) -> int:
    """How many pixels have nearly this color."""
    image = np.asarray(Image.open(path).convert("RGB"), np.int64)
    return int((np.abs(image - np.array(color)).max(axis=-1) < 12).sum())


def _names(paths: list[Path]) -> set[str]:
    assert all(path.parent.name == "plots" and path.is_file() for path in paths)
    return {path.name for path in paths}


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_run_with_evaluations(tmp_path: Path, said: list[str]) -> None:
    written = write_plots(_write(tmp_path, _training(150), _evaluation(75, 150)), said.append)
    assert said == []
    assert _names(written) == {"loss.png", "learning_rate.png", "grad_norm.png", "eval_scores.png"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == _names(written)
    for path in written:
        image = Image.open(path)
        image.load()
        assert image.width >= 900
        assert image.height >= 400
    assert _pixels(tmp_path / "plots" / "loss.png", EVALUATION) > 100
    # perplexity has a panel of its own
    assert Image.open(tmp_path / "plots" / "eval_scores.png").height > Image.open(written[0]).height * 1.5


def test_without_evaluations_there_is_no_plot_of_them(tmp_path: Path, said: list[str]) -> None:
    _write(tmp_path, _training(30), _evaluation(30))
    write_plots(tmp_path, said.append)
    (tmp_path / "eval_metrics.jsonl").unlink()
    written = write_plots(tmp_path, said.append)
    assert _names(written) == {"loss.png", "learning_rate.png", "grad_norm.png"}
    assert not (tmp_path / "plots" / "eval_scores.png").exists()  # of the earlier run
    assert _pixels(tmp_path / "plots" / "loss.png", EVALUATION) == 0
    assert said == []


def test_one_metric_alone_has_one_panel(tmp_path: Path, said: list[str]) -> None:
    lines = [{"step": 5, "epoch": 1.0, "loss": 1.0, "perplexity": math.e}]
    write_plots(_write(tmp_path, _training(5), lines), said.append)
    assert Image.open(tmp_path / "plots" / "eval_scores.png").height < 600
    assert said == []


def test_single_points_can_be_seen(tmp_path: Path, said: list[str]) -> None:
    """One update, one evaluation; and in a long run a value between two that are not finite."""
    write_plots(_write(tmp_path, _training(1), _evaluation(1)), said.append)
    legend_and_point = _pixels(tmp_path / "plots" / "loss.png", EVALUATION)
    assert legend_and_point > 60
    alone = _training(80, grad_norm=lambda step: 3.0 if step == 40 else None)
    other = tmp_path / "other"
    other.mkdir()
    write_plots(_write(other, alone), said.append)
    marker = (0x1F, 0x5F, 0x99)
    assert _pixels(other / "plots" / "grad_norm.png", marker) > 10
    assert said == []


def test_values_that_are_not_finite_are_marked(tmp_path: Path, said: list[str]) -> None:
    lines = _training(60, loss=lambda step: None if step in (20, 21) else 1.0)
    write_plots(_write(tmp_path, lines), said.append)
    assert _pixels(tmp_path / "plots" / "loss.png", WARNING) > 30
    assert _pixels(tmp_path / "plots" / "grad_norm.png", WARNING) == 0


def test_overflows_of_float16_are_marked_and_the_scale_is_drawn(tmp_path: Path, said: list[str]) -> None:
    lines = _training(
        60,
        grad_norm=lambda step: None if step == 3 else 1.0,
        overflow=lambda step: step == 3,
        loss_scale=lambda step: 65536.0 if step < 3 else 32768.0,
    )
    written = write_plots(_write(tmp_path, lines), said.append)
    assert "loss_scale.png" in _names(written)
    assert _pixels(tmp_path / "plots" / "grad_norm.png", WARNING) == 0  # an overflow is no accident
    assert said == []


@pytest.mark.parametrize(
    ("line", "number"),
    [("{\"step\": 31, \"lo\n", 31), ("[1, 2]\n", 31), ('{"loss": 1.0}\n', 31), ('{"step": "7"}\n', 31),
     ('{"step": -1}\n', 31), ("\ufffd\x00\n", 31)]
)  # fmt: skip
def test_a_broken_line_is_left_out_and_named(tmp_path: Path, said: list[str], line: str, number: int) -> None:
    written = write_plots(_write(tmp_path, [*_training(30), line]), said.append)
    assert len(written) == 3
    assert len(said) == 1
    assert f"1 of 31, the first is line {number}" in said[0]
    assert "metrics.jsonl" in said[0]


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path, said: list[str]) -> None:
    lines = _training(30, loss=lambda step: "high" if step == 3 else 1.0, learning_rate=10**400)
    written = write_plots(_write(tmp_path, lines), said.append)
    assert _names(written) == {"loss.png", "grad_norm.png"}


@pytest.mark.parametrize("lines", [[], ["\n"], [{"step": 1}], [{"step": 1, "loss": None, "grad_norm": None}]])
def test_no_numbers_no_plots(tmp_path: Path, said: list[str], lines: list[Any]) -> None:
    assert write_plots(_write(tmp_path, lines), said.append) == []
    assert "metrics.jsonl has no numbers" in said[-1]
    assert not (tmp_path / "plots").exists()


def test_negative_and_zero_values(tmp_path: Path, said: list[str]) -> None:
    """They have no logarithm."""
    lines = _training(30, loss=lambda step: 10.0 - step, grad_norm=0.0)
    assert len(write_plots(_write(tmp_path, lines), said.append)) == 3
    assert said == []


def test_a_place_that_cannot_be_written(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "plots").write_text("a file")
    assert write_plots(_write(tmp_path, _training(3)), said.append) == []
    assert any("no plot" in line and "loss.png" in line for line in said)


def test_a_failed_rename_leaves_the_old_plot_whole(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plots(_write(tmp_path, _training(3)), said.append)
    before = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    assert write_plots(_write(tmp_path, _training(9)), said.append) == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()} == before
    assert "No space left" in said[0]


def test_without_matplotlib(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert write_plots(_write(tmp_path, _training(3)), said.append) == []
    assert "pip install matplotlib" in said[0]


def test_reasons_are_warnings_where_nobody_listens(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no numbers"):
        write_plots(tmp_path)


def test_matplotlib_is_imported_only_to_draw() -> None:
    """Half a second that training should not wait for."""
    tree = ast.parse(Path(plots.__file__).read_text(encoding="utf-8"))
    imported = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(imported) > 5
    assert not any("matplotlib" in ast.dump(node) for node in imported)


def test_a_long_run_is_thinned_and_quick(tmp_path: Path, said: list[str]) -> None:
    _write(tmp_path, _training(100_000), _evaluation(*range(2000, 100_001, 2000)))
    write_plots(tmp_path, said.append)  # fonts are looked up once
    start = time.process_time()
    assert len(write_plots(tmp_path, said.append)) == 4
    assert time.process_time() - start < 5  # 1.2 s on an idle core
    assert said == []


def test_thinning_keeps_spikes() -> None:
    values = np.ones(50_000)
    values[31_234], values[7] = 1e6, -5
    thinned = thin(Curve(np.arange(50_000), values), 100)
    assert thinned.steps.size <= 100
    assert thinned.values.max() == 1e6
    assert thinned.values.min() == -5
    assert (np.diff(thinned.steps) > 0).all()
    assert thinned.steps[thinned.values.argmax()] == 31_234
    short = Curve(np.arange(100), np.ones(100))
    assert thin(short, 100) is short


def test_smoothing() -> None:
    """Equal to the definition, and without the pull to 0 at the start."""
    values = np.array([4.0, np.nan, 2.0, 8.0])
    smoothed = smooth(Curve(np.arange(4), values), span=3)  # weight 1/2
    assert smoothed.steps.tolist() == [0, 2, 3]
    expected = [4.0, (2 + 0.5 * 4) / 1.5, (8 + 0.5 * 2 + 0.25 * 4) / 1.75]
    assert smoothed.values.tolist() == pytest.approx(expected)
