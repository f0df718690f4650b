"""do_eval: the same scores as --run_mode eval, training goes on as if nothing had happened, the best is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engine_helpers import DEV_RECORDS, SMALL_TRAINING, TRAINED_NETWORK, curve, read_jsonl, run_here, tiny_arguments

from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import list_checkpoints, resolve_checkpoint

# 8 steps an epoch; the network learns enough for its scores to move.
LEARNING = (
    *TRAINED_NETWORK, "train_dataset.num_samples=64", "runner_config.batch_size=8", "runner_config.epochs=2",
    "lr_schedule.learning_rate=0.01", "model.model_config.hidden_dropout=0.1", "checkpoint.save_steps=null",
    "checkpoint.keep_max=1", f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}", "eval_dataset.num_samples=6",
    "generation.max_new_tokens=16",
)  # fmt: skip
EVALUATED = (
    "do_eval=True", "eval_step_interval=5", "eval_epoch_interval=1", "checkpoint.best_metric=perplexity",
    "logging.tensorboard=True",
)  # fmt: skip
STEPS = [5, 8, 10, 15, 16]


@pytest.fixture(scope="module")
def plain(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(tmp_path_factory.mktemp("plain"), *LEARNING)


@pytest.fixture(scope="module")
def compilations(finetune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    """An evaluated run; graphs compiled up to the end of each evaluation; what was said."""
    import contextlib
    import io

    from mindspore.common import api

    from glm_ms.engine.evaluate import Evaluator

    compiled, counts = [], []
    compile_once, evaluate = api._CellGraphExecutor.compile, Evaluator.__call__

    def counted(self, obj, *args, **kwargs):
        phase, fresh = compile_once(self, obj, *args, **kwargs)
        compiled.extend([phase] * bool(fresh))
        return phase, fresh

    def measured(self, model):
        scores = evaluate(self, model)
        counts.append(len(compiled))
        return scores

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(api._CellGraphExecutor, "compile", counted)
        patch.setattr(Evaluator, "__call__", measured)
        run = finetune(tmp_path_factory.mktemp("evaluated"), *LEARNING, *EVALUATED)
    return run, [*counts, len(compiled)], said.getvalue()


@pytest.fixture(scope="module")
def evaluated(compilations: tuple[Path, list[int], str]) -> Path:
    return compilations[0]


def test_training_goes_on_as_if_nothing_had_happened(plain: Path, evaluated: Path) -> None:
    assert curve(evaluated) == curve(plain)
    ends = [run / "checkpoint" / "step_00000016" for run in (plain, evaluated)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


def test_nothing_is_compiled_twice(compilations: tuple[Path, list[int], str]) -> None:
    _, counts, _ = compilations
    assert counts[0] > 1  # the training step, and what the evaluation needs
    assert set(counts) == {counts[0]}


def test_lines_and_tensorboard(evaluated: Path) -> None:
    lines = read_jsonl(evaluated / "eval_metrics.jsonl")
    assert [(line["step"], line["epoch"]) for line in lines] == [(step, step / 8) for step in STEPS]
    names = {
        "rouge-1",
        "rouge-2",
        "rouge-l",
        "bleu-4",
        "num_samples",
        "num_empty",
        "loss",
        "perplexity",
        "num_tokens",
    }
    assert all(set(line) == {"step", "epoch", *names} for line in lines)
    assert lines[-1]["perplexity"] < lines[0]["perplexity"]
    events = b"".join(path.read_bytes() for path in (evaluated / "tensorboard").iterdir())
    assert all(f"eval/{name}".encode() in events for name in ("perplexity", "rouge-l"))
    assert len(read_jsonl(evaluated / "eval_predictions.jsonl")) == 6


def test_same_scores_as_the_run_mode(
    compilations: tuple[Path, list[int], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command that the run has printed."""
    run, _, said = compilations
    (command,) = (line for line in said.splitlines() if line.startswith("to evaluate: "))
    assert run_here([*command.split()[4:], "--output_dir", str(tmp_path)]) == 0
    best = json.loads((run / "checkpoint" / "best.json").read_text())
    (line,) = (line for line in read_jsonl(run / "eval_metrics.jsonl") if line["step"] == best["step"])
    scores = json.loads((tmp_path / "eval_scores.json").read_text())
    assert {name: line[name] for name in scores} == scores
    assert f"perplexity: {best['value']:.4f}" in capsys.readouterr().out
    if best["step"] == 16:
        assert (tmp_path / "eval_predictions.jsonl").read_bytes() == (run / "eval_predictions.jsonl").read_bytes()


def test_the_best_is_named(compilations: tuple[Path, list[int], str]) -> None:
    run, _, said = compilations
    values = {line["step"]: line["perplexity"] for line in read_jsonl(run / "eval_metrics.jsonl")}
    best = min(values, key=values.__getitem__)
    assert json.loads((run / "checkpoint" / "best.json").read_text()) == {
        "step": best, "metric": "perplexity", "value": values[best],
    }  # fmt: skip
    assert resolve_checkpoint(run / "checkpoint" / "best").name == f"step_{best:08d}"
    assert resolve_checkpoint(run).name == "step_00000016"
    assert f"weights with the best evaluation: {run / 'checkpoint' / 'best'} (step_{best:08d})" in said


def test_the_best_stays(vocabulary: Path, finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the last one; scores are given, higher is better, a tie is no gain; and after a resume."""
    from glm_ms.engine.evaluate import Evaluator

    scores = iter([10.0, 30.0, 30.0, 20.0])
    monkeypatch.setattr(Evaluator, "__call__", lambda self, model: {"rouge-l": next(scores)})
    arguments = (
        *LEARNING, "do_eval=True", "eval_step_interval=4", "checkpoint.best_metric=rouge-l", "checkpoint.save_steps=3",
    )  # fmt: skip
    run = finetune(tmp_path / "run", *arguments)
    assert [step for step, _ in list_checkpoints(run)] == [8, 16]
    assert json.loads((run / "checkpoint" / "best.json").read_text())["step"] == 8
    shutil.rmtree(run / "checkpoint" / "step_00000016")  # as if killed while it was written
    (run / "checkpoint" / "best.json").unlink()
    scores = iter([5.0, 31.0])
    assert [line["step"] for line in read_jsonl(run / "eval_metrics.jsonl")] == [4, 8, 12, 16]
    finetune(run, *arguments, "--resume_training", "True")
    assert [step for step, _ in list_checkpoints(run)] == [16]
    assert json.loads((run / "checkpoint" / "best.json").read_text()) == {
        "step": 16, "metric": "rouge-l", "value": 31.0,
    }  # fmt: skip
    lines = read_jsonl(run / "eval_metrics.jsonl")
    assert [(line["step"], line["rouge-l"]) for line in lines] == [(4, 10), (8, 30), (12, 5), (16, 31)]


def test_killed_after_the_last_checkpoint(evaluated: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Resuming finishes what was left: the best, old checkpoints, plots; and removes what is half written."""
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    checkpoints, best = run / "checkpoint", (run / "checkpoint" / "best.json").read_bytes()
    names = sorted(path.name for path in checkpoints.iterdir())
    (checkpoints / "best.json").write_text('{"step": 5, "metric": "perplexity", "value": 1.0}')
    shutil.copytree(checkpoints / "step_00000016", checkpoints / "step_00000005")
    for name in (".step_00000010.0123456789abcdef.partial", ".step_00000008.0123456789abcdef.partial"):
        (checkpoints / name).mkdir()
    shutil.rmtree(run / "plots")
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *LEARNING, *EVALUATED, "--output_dir", run)
    assert run_here([*line, "--resume_training", "True"]) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    assert (checkpoints / "best.json").read_bytes() == best
    assert (run / "plots" / "loss.png").is_file()


def test_a_best_that_is_gone_does_not_count(tmp_path: Path) -> None:
    from glm_ms.engine.checkpoints.checkpoints import BestEvaluation

    known = {"step": 4, "metric": "loss", "value": 1.0}
    said: list[str] = []
    assert BestEvaluation(tmp_path, "loss", known, said.append).record is None
    (tmp_path / "checkpoint" / "step_00000004").mkdir(parents=True)
    there = BestEvaluation(tmp_path, "loss", known, said.append)
    assert there.steps == (4,)
    assert not there.improves(5, {"loss": 1.0})
    assert not there.improves(5, {"loss": float("nan")})
    assert there.improves(5, {"loss": 0.5})
    assert BestEvaluation(tmp_path, "bleu-4", known, said.append).record is None
    assert [text.partition("ignored: ")[2] for text in said] == [
        f"its checkpoint, step 4, is not in {tmp_path}", "it was measured by loss",
    ]  # fmt: skip


def test_best_without_a_run_that_keeps_it(plain: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best.json: no such file; .*checkpoint.best_metric"):
        resolve_checkpoint(plain / "checkpoint" / "best")


def test_unusable_records_are_refused_before_anything_is_built(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "dev.json"
    records.write_text('{"content": "a"}\n')
    line = tiny_arguments(
        "finetune", vocabulary, *LEARNING, "do_eval=True", f"eval_dataset.data_loader.dataset_dir={records}",
        "--output_dir", tmp_path / "run"
    )  # fmt: skip
    assert run_here(line) == 1
    shown = capsys.readouterr().err
    assert f"{records}:1" in shown
    assert "weights: random" not in shown
