"""MindFormers' `Trainer` with YAMLs of this project: the same numbers as run_glm.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import yaml
from engine_helpers import (
    CONFIGS,
    DEV_RECORDS,
    REPOSITORY,
    SMALL_NETWORK,
    TRAIN_RECORDS,
    curve,
    environment_of_a_user,
    read_jsonl,
    run_here,
    tiny_arguments,
)
from mindformers import AutoModel, AutoTokenizer, MindFormerConfig, Trainer, TrainingArguments
from mindformers.dataset import build_dataset
from mindformers_helpers import QUESTION, TEXT, losses, yaml_of
from mindspore import dataset as ds

from glm_ms import load_pretrained
from glm_ms.engine.batches import DatasetRows
from glm_ms.mindformers_api.run_yaml import settings_of
from glm_ms.settings import SettingsError
from glm_ms.storage.run_folder import resolve_checkpoint

PAGE = (REPOSITORY / "docs" / "mindformers.md").read_text(encoding="utf-8")
# The block that uses the classes of MindFormers.
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "mindformers" in block)


def test_training_has_the_losses_of_run_glm(run: Path, tmp_path: Path):
    trainer = Trainer(args=yaml_of(run, tmp_path), task="text_generation")
    trainer.train()
    assert len(losses(run)) == 12
    np.testing.assert_allclose(losses(tmp_path), losses(run), atol=1e-6, rtol=0)
    ours, theirs = load_pretrained(tmp_path).parameters(), load_pretrained(run).parameters()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name].asnumpy(), parameter.asnumpy(), atol=1e-6, err_msg=name)


def test_evaluation_and_prediction_are_those_of_run_glm(
    run: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = [*SMALL_NETWORK, "eval_dataset.num_samples=4", "generation.max_new_tokens=12"]
    with_weights = ["--load_checkpoint", run, *small]
    line = tiny_arguments("eval", vocabulary, *with_weights, "--output_dir", tmp_path / "eval")
    assert run_here(line) == 0
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (QUESTION, "类型#上衣")))
    line = tiny_arguments(
        "predict", vocabulary, *with_weights, "--output_dir", tmp_path / "predict", "--predict_data", questions
    )
    assert run_here(line) == 0
    capsys.readouterr()

    path = yaml_of(
        run, tmp_path / "mf", load_checkpoint=str(run), generation__max_new_tokens=12, context__use_fused_kernels=True
    )
    trainer = Trainer(args=path, task="text_generation", eval_dataset=str(DEV_RECORDS))
    trainer.evaluate()
    expected = json.loads((tmp_path / "eval" / "eval_scores.json").read_text())
    assert trainer.trainer.scores == pytest.approx(expected, rel=1e-6)
    said = capsys.readouterr()
    assert f"perplexity: {expected['perplexity']:.4f}" in said.out
    assert "portable operators: the device is CPU" in said.err
    predictions = [read_jsonl(tmp_path / name / "eval_predictions.jsonl") for name in ("mf", "eval")]
    assert predictions[0] == predictions[1]

    answers = trainer.predict(input_data=[QUESTION, "类型#上衣"], batch_size=1)
    expected = read_jsonl(tmp_path / "predict" / "predict_results.jsonl")
    assert [item[TEXT] for item in answers] == [item["answers"] for item in expected]
    assert trainer.predict(input_data=str(questions)) == answers
    short = trainer.predict(input_data=QUESTION, max_new_tokens=2)[0][TEXT][0]
    assert answers[0][TEXT][0].startswith(short)


def test_weights_of_a_call_come_before_those_of_the_yaml(
    run: Path, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    path = yaml_of(run, tmp_path, runner_config__max_steps=1, metric__type=["PerplexityMetric"])
    trainer = Trainer(args=path, task="text_generation")
    trainer.finetune(finetune_checkpoint=str(weights))
    started_trained = losses(tmp_path)[0]
    assert started_trained < losses(run)[0] - 0.1
    assert f"weights: {weights}" in capfd.readouterr().err
    trainer.evaluate(eval_checkpoint=str(weights))
    scores = trainer.trainer.scores
    assert f"weights: {weights}" in capfd.readouterr().err
    trainer.evaluate()  # those just trained
    assert f"weights: {resolve_checkpoint(tmp_path)}" in capfd.readouterr().err
    assert trainer.trainer.scores["loss"] != scores["loss"]


def test_the_checkpoint_of_the_yaml_is_never_ignored(run: Path, tmp_path: Path):
    """The stock Trainer forgets it in finetune, evaluate and predict."""
    path = yaml_of(run, tmp_path, load_checkpoint=str(run), runner_config__max_steps=1)
    trainer = Trainer(args=path, task="text_generation")
    trainer.finetune()
    assert losses(tmp_path)[0] < losses(run)[0] - 0.1
    gone = yaml_of(run, tmp_path / "gone", load_checkpoint=str(tmp_path / "nowhere"))
    for job in ("train", "finetune", "evaluate"):
        with pytest.raises(ValueError, match=r"load_checkpoint: .*nowhere: no such file or folder"):
            getattr(Trainer(args=gone, task="text_generation"), job)()


@pytest.mark.slow
def test_resuming_goes_on_with_the_same_losses(run: Path, tmp_path: Path):
    path = yaml_of(run, tmp_path, checkpoint__save_steps=5)
    Trainer(args=path, task="text_generation").train()
    shutil.rmtree(tmp_path / "checkpoint" / "step_00000012")  # as if it had been interrupted
    trainer = Trainer(args=path, task="text_generation")
    trainer.train(resume_from_checkpoint=str(tmp_path), resume_training=True)
    assert losses(tmp_path) == losses(run)
    assert not (tmp_path / "earlier_runs").exists()


@pytest.mark.slow
def test_a_given_model_is_trained_itself(run: Path, vocabulary: Path, tmp_path: Path):
    path = yaml_of(run, tmp_path)
    model, tokenizer = AutoModel.from_config(path), AutoTokenizer.from_pretrained(path)
    before = model.core.parameters()["transformer.output_layer.weight"].asnumpy().copy()
    callback = CountSteps()
    trainer = Trainer(args=path, task="text_generation", model=model, tokenizer=tokenizer, callbacks=callback)
    trainer.train()
    assert callback.steps == 12
    after = model.core.parameters()["transformer.output_layer.weight"].asnumpy()
    assert not np.array_equal(before, after)
    stored = load_pretrained(tmp_path).parameters()["transformer.output_layer.weight"].asnumpy()
    np.testing.assert_array_equal(after, stored)
    answers = trainer.predict(input_data=QUESTION, max_length=40)
    ids = tokenizer.build_prompt(QUESTION).token_ids
    expected = model.generate(ids, max_length=40, eos_token_id=tokenizer.stop_token_ids)[0][len(ids) :]
    assert answers[0][TEXT][0] == tokenizer.decode(
        [token for token in expected if token not in tokenizer.stop_token_ids]
    ).strip()  # fmt: skip


class CountSteps(ms.train.Callback):
    """Counts."""

    steps = 0

    def on_train_step_end(self, run_context: ms.RunContext) -> None:
        self.steps += 1


def test_a_given_data_set_trains_like_its_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = MindFormerConfig(yaml_of(run, tmp_path))
    dataset = build_dataset(config.train_dataset_task)
    assert (dataset.get_batch_size(), dataset.get_dataset_size()) == (4, 6)
    assert "records used" in capsys.readouterr().err
    Trainer(args=config, task="text_generation", train_dataset=dataset).train()
    # The first epoch is the same; the file is shuffled anew for the second, the data set keeps its order.
    np.testing.assert_allclose(losses(tmp_path)[:6], losses(run)[:6], atol=1e-6, rtol=0)
    assert len(losses(tmp_path)) == 12


def test_rows_of_a_data_set():
    ids = np.array([[0, 0, 5, 6], [7, 8, 9, 10]], np.int64)
    columns = {
        "input_ids": ids,
        "labels": np.where(ids > 5, ids, -100),
        "attention_mask": (ids > 0).astype(int),
    }
    rows = DatasetRows(ds.NumpySlicesDataset(columns, shuffle=False).batch(2))
    assert (len(rows), rows.batch_size, rows.seq_length) == (2, 2, 4)
    assert rows[0]["position_ids"].tolist() == [0, 0, 0, 1]
    assert rows[1]["labels"].tolist() == [7, 8, 9, 10]
    assert all(value.dtype == np.int32 for value in rows[0].values())
    bare = DatasetRows(ds.NumpySlicesDataset({"input_ids": ids, "labels": ids}, shuffle=False))
    assert bare[0]["attention_mask"].tolist() == [1, 1, 1, 1]
    assert bare.sha256 != rows.sha256
    with pytest.raises(ValueError, match="has no column labels; its columns are input_ids"):
        DatasetRows(ds.NumpySlicesDataset({"input_ids": ids}, shuffle=False))
    with pytest.raises(ValueError, match="labels: expected rows of integers of one length, found float64"):
        DatasetRows(ds.NumpySlicesDataset({"input_ids": ids, "labels": ids / 2}, shuffle=False))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ptuning2"])
@pytest.mark.parametrize("given", [True, False])
def test_adapters_are_trained_and_used(run: Path, weights: Path, tmp_path: Path, kind: str, given: bool):
    path = yaml_of(
        run, tmp_path, model__pet_config={"pet_type": kind}, load_checkpoint=str(weights),
        lr_schedule__learning_rate=0.05, metric__type=["PerplexityMetric"]
    )  # fmt: skip
    model = AutoModel.from_pretrained(str(weights)) if given else None
    trainer = Trainer(args=path, task="text_generation", model=model)
    trainer.finetune()
    trainer.evaluate()
    adapted = trainer.trainer.scores["perplexity"]
    base = Trainer(args=yaml_of(run, tmp_path / "base", metric__type=["PerplexityMetric"]), task="text_generation")
    base.evaluate(eval_checkpoint=str(weights))
    assert abs(adapted - base.trainer.scores["perplexity"]) > 1  # it acts
    again = Trainer(args=path, task="text_generation")
    again.evaluate(eval_checkpoint=str(tmp_path))  # an adapter, on the base that the YAML names
    assert again.trainer.scores["perplexity"] == pytest.approx(adapted, rel=1e-6)


def test_changes_in_python_count(run: Path, tmp_path: Path):
    config = MindFormerConfig(str(run / "settings.yaml"))
    config.output_dir = str(tmp_path)
    config.runner_config.max_steps = 2
    config.lr_schedule.learning_rate = 1e-3
    Trainer(args=config, task="text_generation", train_dataset=str(TRAIN_RECORDS)).train()
    lines = curve(tmp_path)
    assert len(lines) == 2
    assert max(line["learning_rate"] for line in lines) == pytest.approx(1e-3)
    stored = yaml.safe_load((tmp_path / "settings.yaml").read_text(encoding="utf-8"))
    assert stored["runner_config"]["max_steps"] == 2


# ------------------------------------------------------------------ mistakes


def test_training_arguments_are_refused(run: Path):
    config = MindFormerConfig(str(run / "settings.yaml"))
    TrainingArguments(output_dir="nowhere").convert_args_to_mindformers_config(config)
    with pytest.raises(ValueError, match=r"TrainingArguments.*not supported with glm_ms; give the path of a YAML"):
        settings_of(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("runner_config.epoch", 3, r"runner_config\.epoch: unknown key; did you mean epochs"),
        ("runner_config.epochs", 0, r"changed in Python: runner_config\.epochs: found 0, must be at least 1"),
        ("output_dirr", "x", r"output_dirr: unknown key; did you mean output_dir"),
        ("processor.tokenizer.vocab_file", "nowhere.model", r"nowhere\.model: no such file"),
        ("train_dataset.data_loader.dataset_dir", "nowhere.json", r"nowhere\.json: no such file"),
    ],
)
def test_changes_in_python_are_checked(run: Path, tmp_path: Path, key: str, value: Any, message: str):
    config = MindFormerConfig(str(run / "settings.yaml"))
    config.output_dir = str(tmp_path)
    trainer = Trainer(args=config, task="text_generation")
    config.set_value(key, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_evaluation_runs_in_one_process(run: Path, tmp_path: Path):
    trainer = Trainer(args=yaml_of(run, tmp_path, use_parallel=True), task="text_generation")
    with pytest.raises(SettingsError, match="use_parallel: True: eval runs in one process; set False") as caught:
        trainer.evaluate()
    assert len(caught.value.problems) == 1  # none that asks for several processes


def test_what_the_yaml_decides_is_refused_in_the_call(run: Path, weights: Path, tmp_path: Path):
    path = yaml_of(run, tmp_path)
    model = AutoModel.from_pretrained(str(weights))
    optimizer = ms.nn.SGD(model.trainable_params())
    with pytest.raises(ValueError, match=r"Trainer\(optimizers=\.\.\.\): not supported"):
        Trainer(args=path, task="text_generation", optimizers=optimizer).train()
    sharded = {"use_parallel": True, "parallel": {"parallel_mode": 1}}
    with pytest.raises(ValueError, match=r"Trainer\(model=\.\.\.\): a sharded run loads the slices of its own network"):
        Trainer(args=yaml_of(run, tmp_path / "sharded", **sharded), task="text_generation", model=model).train()
    with pytest.raises(ValueError, match=r"Trainer\(model=\.\.\.\): resume: True"):  # of which model are the results?
        Trainer(args=yaml_of(run, tmp_path / "resume", resume=True), task="text_generation", model=model).evaluate()
    other = yaml_of(run, tmp_path / "other", model__model_config__num_layers=2)
    with pytest.raises(ValueError, match=r"different networks: .*num_layers: 2, in the model 1"):
        Trainer(args=other, task="text_generation", model=model).train()
    with pytest.raises(ValueError, match=r"predict\(top_q=\.\.\.\): unknown option; did you mean top"):
        Trainer(args=path, task="text_generation", model=model).predict(input_data="x", top_q=1)


@pytest.mark.slow
def test_the_example_of_the_documentation(vocabulary: Path, tmp_path: Path):
    """As it stands, on fewer records."""
    sample = tmp_path / "configs" / "tiny" / "sample"
    sample.mkdir(parents=True)
    shutil.copy(CONFIGS / "tiny" / "finetune_glm3_tiny.yaml", sample.parent)
    for path, count in ((TRAIN_RECORDS, 64), (DEV_RECORDS, 4)):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (sample / path.name).write_text("".join(lines), encoding="utf-8")
    (tmp_path / "output" / "tiny").mkdir(parents=True)
    shutil.copy(vocabulary, tmp_path / "output" / "tiny" / "tokenizer.model")
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLE],
        cwd=tmp_path, env={**environment_of_a_user(), "PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True, encoding="utf-8", timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\nperplexity: " in done.stdout
    before, _, text = done.stdout.partition("[gMASK]sop<|user|>")
    assert text.strip().endswith(before.splitlines()[-1].strip())
