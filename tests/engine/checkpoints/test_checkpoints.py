"""Checkpoints of a run: what is in them, how many stay, runs that share an output folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import curve
from safetensors.numpy import load_file
from tolerances import LOGITS

from glm_ms import GLMConfig, load_pretrained
from glm_ms.settings import load_settings
from glm_ms.storage.run_folder import list_checkpoints

IDS = np.arange(2, 34).reshape(2, 16)


def steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoint_is_the_trained_network(finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.engine.step import training as module

    built, original = [], module.build_model
    monkeypatch.setattr(module, "build_model", lambda *args: built.append(original(*args)) or built[0])
    run = finetune(tmp_path, "checkpoint.save_steps=5", "checkpoint.keep_max=9")
    (model,) = built
    newest = run / "checkpoint" / "step_00000012"
    loaded = {path: load_pretrained(path) for path in (run, newest, newest.with_name("step_00000005"))}
    for name, parameter in model.parameters().items():
        earlier, *last = (one.parameters()[name].asnumpy() for one in reversed(loaded.values()))
        for weights in last:
            np.testing.assert_array_equal(weights, parameter.asnumpy(), name)
        assert not np.array_equal(earlier, parameter.asnumpy())
    model.network.set_train(False)
    np.testing.assert_allclose(loaded[run](IDS).asnumpy(), model(IDS).asnumpy(), **LOGITS)
    assert GLMConfig.from_pretrained(newest) == model.config


@pytest.fixture(scope="module")
def finished(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps."""
    return finetune(tmp_path_factory.mktemp("finished"), "runner_config.epochs=1")


@pytest.fixture
def earlier(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_optimizer_state_is_complete(finished: Path) -> None:
    folder = finished / "checkpoint" / "step_00000006"
    weights, state = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    moments = {name for name in state if name.startswith("adam_")}
    assert len(moments) == 2 * len(weights)
    assert all(np.any(state[name]) for name in moments if name.endswith("output_layer.weight"))
    (counter,) = (name for name in state if "global_step" in name)
    assert float(state[counter].reshape(())) == 6


@pytest.mark.parametrize(("keep_max", "kept"), [(2, [10, 12]), pytest.param(1, [12], marks=pytest.mark.slow)])
def test_the_newest_are_kept(finetune, tmp_path: Path, keep_max: int, kept: list[int]) -> None:
    run = finetune(tmp_path, "checkpoint.save_steps=5", f"checkpoint.keep_max={keep_max}")
    assert steps(run) == kept
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == [f"step_{i:08d}" for i in kept]


def test_earlier_runs_are_moved_and_whole(finetune, earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (earlier / "earlier_runs" / "1").mkdir(parents=True)
    names = ("checkpoint/", "metrics.jsonl", "settings.yaml")
    kept = {name: content for name, content in files_of(earlier).items() if name.startswith(names)}
    assert len(kept) == 6
    finetune(earlier, "runner_config.epochs=1", "--seed", 1)
    moved = earlier / "earlier_runs" / "2"
    assert f"{moved}" in capsys.readouterr().err
    assert {name: content for name, content in files_of(moved).items() if name.startswith(names)} == kept
    assert (moved / "plots" / "loss.png").is_file()
    assert not any((earlier / "earlier_runs" / "1").iterdir())
    assert (len(curve(earlier)), steps(earlier), steps(moved)) == (6, [6], [6])
    assert curve(earlier) != curve(moved)
    settings = [load_settings(run / "settings.yaml", check_files=False) for run in (earlier, moved)]
    assert [one.seed for one in settings] == [1, 0]


@pytest.mark.parametrize("place", ["", "checkpoint/step_00000006"])
def test_a_run_may_begin_with_the_weights_in_its_own_folder(finetune, earlier: Path, place: str) -> None:
    before = curve(earlier)
    finetune(earlier, "runner_config.epochs=1", "--load_checkpoint", earlier / place)
    assert curve(earlier)[0]["loss"] < before[2]["loss"]


def test_a_run_that_cannot_begin_moves_nothing(finetune, earlier: Path) -> None:
    before = files_of(earlier / "checkpoint")
    with pytest.raises(AssertionError):
        finetune(earlier, "--load_checkpoint", earlier / "settings.yaml")
    assert files_of(earlier / "checkpoint") == before
