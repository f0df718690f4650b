"""Going on with a run: killed at any moment, it continues the same curve; what does not fit is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_attempts import Attempt
from engine_helpers import SMALL_TRAINING, TRAIN_RECORDS, curve, run_here, tiny_arguments
from marks import slow_unless

from glm_ms.storage.run_folder import list_checkpoints

# 6 steps an epoch, so that step 4 lies in the middle of the first and step 8 in the middle of the second.
TRAINING = (
    "runner_config.batch_size=2", "runner_config.gradient_accumulation_steps=2", "checkpoint.save_steps=4",
    "model.model_config.hidden_dropout=0.1", "model.model_config.attention_dropout=0.1",
)  # fmt: skip
ADAPTERS = {
    "lora": (
        "model.pet_config.pet_type=lora", "model.pet_config.lora_dropout=0.2", "lr_schedule.learning_rate=0.02",
        "model.pet_config.target_modules=[query_key_value,dense]",  # in an order of its own
        "adapter_model.safetensors",
    ),
    "ptuning2": (
        "model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=4", "model.pet_config.dropout_prob=0.2",
        "prefix_encoder.safetensors",
    ),
}  # fmt: skip
NUM_STEPS = 12


@pytest.fixture(scope="module")
def unbroken(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted, with the checkpoints of steps 4, 8 and 12. Dropout is on."""
    return finetune(tmp_path_factory.mktemp("unbroken"), *TRAINING, "checkpoint.keep_max=9")


def break_after_step_9(unbroken: Path, into: Path) -> Path:
    shutil.copytree(unbroken / "checkpoint", into / "checkpoint")
    shutil.rmtree(into / "checkpoint" / "step_00000012")
    lines = (unbroken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (into / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    return into


@pytest.fixture
def broken(unbroken: Path, tmp_path: Path) -> Path:
    """The same run as if it had ended without a word after step 9: the last checkpoint is that of step 8."""
    return break_after_step_9(unbroken, tmp_path)


@pytest.fixture
def resume(vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Goes on with the run in a folder; returns exit status and stderr."""

    def run(output_dir: Path, *arguments: object) -> tuple[int, str]:
        line = tiny_arguments(
            "finetune", vocabulary, *SMALL_TRAINING, *TRAINING, "--output_dir", output_dir,
            *(() if any("resume_training" in str(a) for a in arguments) else ("--resume_training", "True")),
            *arguments
        )  # fmt: skip
        return run_here(line), capsys.readouterr().err

    return run


def steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run)]


def test_the_rest_of_the_curve_is_equal(broken: Path, unbroken: Path, resume) -> None:
    status, shown = resume(broken)
    assert status == 0, shown
    assert f"resuming from {broken / 'checkpoint' / 'step_00000008'}: 8 of 12 steps are done" in shown
    assert curve(broken) == curve(unbroken)  # every line once, and equal to the last digit
    for name in ("model.safetensors", "optimizer.safetensors"):
        ends = [run / "checkpoint" / "step_00000012" / name for run in (broken, unbroken)]
        assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.slow
def test_from_a_named_checkpoint_into_another_folder(unbroken: Path, tmp_path: Path, resume) -> None:
    folder = unbroken / "checkpoint" / "step_00000004"
    status, shown = resume(tmp_path, f"resume_training={folder}")
    assert status == 0, shown
    assert curve(tmp_path) == curve(unbroken)[4:]
    assert steps(tmp_path) == [8, 12]


def test_leftovers_are_passed_over(broken: Path, unbroken: Path, resume) -> None:
    for name in (".step_00000012.0a0b0c0d.partial", "step_final", "step_00000099.tmp"):
        (broken / "checkpoint" / name).mkdir()
    (broken / "checkpoint" / "step_00000050").write_text("a file")
    assert resume(broken)[0] == 0
    assert curve(broken) == curve(unbroken)
    assert not (broken / "checkpoint" / ".step_00000012.0a0b0c0d.partial").exists()


@pytest.mark.parametrize("kind", slow_unless(["lora"], ADAPTERS))
def test_an_adapter_goes_on_alike(kind: str, unbroken: Path, finetune, tmp_path: Path, resume) -> None:
    *keys, file = ADAPTERS[kind]
    arguments = (*keys, "--load_checkpoint", unbroken)
    whole = finetune(tmp_path / "whole", *TRAINING, *arguments, "checkpoint.keep_max=9")
    assert all(line["grad_norm"] > 0 for line in curve(whole))
    names = sorted(path.name for path in (whole / "checkpoint" / "step_00000008").iterdir())
    assert file in names
    assert "model.safetensors" not in names
    (tmp_path / "run").mkdir()
    run = break_after_step_9(whole, tmp_path / "run")
    status, shown = resume(run, *arguments)
    assert status == 0, shown
    assert curve(run) == curve(whole)
    for name in names:
        if name != "manifest.json":
            ends = [each / "checkpoint" / "step_00000012" / name for each in (run, whole)]
            assert ends[0].read_bytes() == ends[1].read_bytes(), name
    other_base = unbroken / "checkpoint" / "step_00000004"
    (tmp_path / "other").mkdir()
    status, shown = resume(break_after_step_9(whole, tmp_path / "other"), *keys, "--load_checkpoint", other_base)
    assert status == 1
    assert "base_weights: " in shown


def test_dropout_is_on(unbroken: Path, finetune, tmp_path: Path) -> None:
    still = [f"model.model_config.{name}_dropout=0.0" for name in ("hidden", "attention")]
    without = finetune(tmp_path, *TRAINING, *still, "runner_config.max_steps=1")
    assert curve(without)[0]["loss"] != curve(unbroken)[0]["loss"]


def test_a_finished_run_says_so(unbroken: Path, tmp_path: Path, resume) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    status, shown = resume(tmp_path / "run")
    assert status == 0
    assert "12 of 12 steps are done" in shown
    assert "the run is finished" in shown
    assert curve(tmp_path / "run") == curve(unbroken)


def test_training_on_from_a_finished_run(unbroken: Path, finetune, tmp_path: Path) -> None:
    """A new run may begin with the weights of another; its first loss is that of a trained network."""
    further = finetune(tmp_path, *TRAINING, "--load_checkpoint", unbroken, "runner_config.max_steps=1")
    assert curve(further)[0]["loss"] < curve(unbroken)[2]["loss"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=1", "seed: 0 then, 1 now"),
        ("runner_config.batch_size=4", "batch_size: 2 then, 4 now"),
        ("runner_config.gradient_accumulation_steps=1", "gradient_accumulation_steps: 2 then, 1 now"),
        ("lr_schedule.learning_rate=1.e-3", "learning_rate"),
        ("lr_schedule.type=ConstantWarmUpLR", "lr_schedule"),
        ("optimizer.weight_decay=0.5", "weight_decay"),
        ("runner_wrapper.max_grad_norm=2.0", "max_grad_norm: 1.0 then, 2.0 now"),
        ("train_dataset.data_loader.shuffle=False", "shuffle: True then, False now"),
        ("train_dataset.data_loader.history_column=h", "history_column: null then, h now"),
        ("processor.tokenizer.template=plain", "template: null then, plain now"),
        ("train_dataset.num_samples=23", "num_rows: 24 then, 23 now"),
        ("train_dataset.drop_remainder=False", "drop_remainder"),
        ("model.model_config.hidden_dropout=0.2", "model_config.hidden_dropout: 0.1 then, 0.2 now"),
        ("runner_wrapper.scale_sense.type=DynamicLossScaleUpdateCell", "scale_sense: null then"),
    ],
)
def test_another_curve_is_refused(broken: Path, resume, change: str, key: str) -> None:
    status, shown = resume(broken, change)
    assert status == 1
    assert "made by a run with other settings" in shown
    assert "step_00000008" in shown
    assert key in shown
    assert steps(broken) == [4, 8]  # nothing has been touched


def test_other_records_are_refused(broken: Path, resume, tmp_path: Path) -> None:
    """As many, but others."""
    lines = TRAIN_RECORDS.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "other.json").write_text("".join(lines[100:200]), encoding="utf-8")
    status, shown = resume(broken, f"train_dataset.data_loader.dataset_dir={tmp_path / 'other.json'}")
    assert status == 1
    assert "records: " in shown


def test_no_checkpoint_to_go_on_from(tmp_path: Path, resume) -> None:
    status, shown = resume(tmp_path)
    assert status == 1
    assert f"resume_training: {tmp_path / 'checkpoint'} has no checkpoint" in shown
    assert "leave resume_training out to start a new one" in shown


def test_a_folder_of_weights_cannot_be_resumed_from(tmp_path: Path, resume, golden: Path) -> None:
    status, shown = resume(tmp_path, f"resume_training={golden / 'models' / 'glm3_tiny'}")
    assert status == 1
    assert str(golden / "models" / "glm3_tiny") in shown
    assert "not a training checkpoint, only weights" in shown
    assert f"--load_checkpoint {golden / 'models' / 'glm3_tiny'}" in shown


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


def flip_last_bit(path: Path) -> None:
    """Leaves the file readable, with another number in it."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_header, flip_last_bit, Path.unlink])
def test_damage_is_named(broken: Path, resume, name: str, damage: Callable[[Path], None]) -> None:
    first, second = (broken / "checkpoint" / f"step_0000000{step}" for step in (4, 8))
    damage(second / name)
    status, shown = resume(broken)
    assert status == 1
    assert name in shown
    assert str(second) in shown
    assert f"the last good checkpoint is {first}: resume with --resume_training {first}" in shown
    assert steps(broken) == [4, 8]


def test_what_is_offered_is_good(broken: Path, unbroken: Path, resume) -> None:
    """And goes on with the same curve; a damaged one is not offered, nor one of another run."""
    newest, middle, first = (broken / "checkpoint" / f"step_{step:08d}" for step in (8, 6, 4))
    shutil.copytree(first, middle)  # a copy under another name is no checkpoint of that step
    flip_last_bit(newest / "optimizer.safetensors")
    status, shown = resume(broken)
    assert status == 1
    assert f"the last good checkpoint is {first}" in shown
    status, shown = resume(broken, f"resume_training={first}")
    assert status == 0, shown
    assert curve(broken) == curve(unbroken)


def test_none_is_good(broken: Path, resume) -> None:
    for step in (4, 8):
        flip_last_bit(broken / "checkpoint" / f"step_0000000{step}" / "model.safetensors")
    status, shown = resume(broken)
    assert status == 1
    assert "no other checkpoint of this run is good" in shown


def test_files_of_another_checkpoint_are_foreign(broken: Path, resume) -> None:
    one, other = (broken / "checkpoint" / f"step_0000000{step}" / "optimizer.safetensors" for step in (4, 8))
    shutil.copy(one, other)
    status, shown = resume(broken)
    assert status == 1
    assert f"{other}: damaged or of another checkpoint" in shown


def test_a_renamed_checkpoint_is_refused(broken: Path, resume) -> None:
    folder = broken / "checkpoint" / "step_00000008"
    folder.rename(folder.with_name("step_00000010"))
    status, shown = resume(broken)
    assert status == 1
    assert "step_00000010: contains the checkpoint of step 8" in shown


def test_checkpoints_of_earlier_versions_are_told_apart(broken: Path, resume) -> None:
    folder = broken / "checkpoint" / "step_00000008"
    (folder / "manifest.json").rename(folder / "state.json")
    status, shown = resume(broken)
    assert status == 1
    assert "written by an earlier version of glm_ms" in shown


def test_killed_while_a_checkpoint_is_written(vocabulary: Path, unbroken: Path, resume, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *TRAINING, "--output_dir", run)
    attempt = Attempt(run, line, file_seconds=2)
    assert attempt.kill_when(lambda: attempt.writing(8))
    assert steps(run) == [4]
    assert len(curve(run)) == 8
    assert any((run / "checkpoint").glob(".step_00000008.*.partial"))
    status, shown = resume(run)
    assert status == 0, shown
    assert "4 of 12 steps are done" in shown
    assert curve(run) == curve(unbroken)
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["step_00000008", "step_00000012"]
