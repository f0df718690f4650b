"""run_glm.py as a process of its own: exit status, streams, messages."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import (
    CONFIGS,
    DEV_RECORDS,
    REPOSITORY,
    SMALL_NETWORK,
    SMALL_TRAINING,
    TRAIN_RECORDS,
    environment_of_a_user,
    load_script,
    read_jsonl,
    run_apart,
    tiny_arguments,
    write_small_vocabulary,
)
from safetensors.numpy import load_file, save_file

from glm_ms import load_pretrained

ASCEND = [path for path in sorted((CONFIGS / "glm3").glob("run_glm3_6b_finetune_*.yaml")) if "_eval" not in path.name]
ONE_STEP = (
    *SMALL_NETWORK, "model.model_config.num_attention_heads=4", "model.model_config.padded_vocab_size=auto",
    "model.init=random", "train_dataset.num_samples=4", "runner_config.batch_size=2", "runner_config.max_steps=1",
    "logging.tensorboard=False", "train_dataset.num_parallel_workers=1",
    # Rows of 2048 tokens are not what is tested here.
    "model.model_config.seq_length=96", "train_dataset.max_source_length=40", "train_dataset.max_target_length=55",
)  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def trained(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a very small network was trained into `run`, with relative paths only."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, "--output_dir", "run/")
    done = run_apart(arguments, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # no result, so nothing; the logs of MindFormers are no result either
    assert "step 12: loss" in done.stderr
    assert "INFO" not in done.stderr
    assert "WARNING" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["run"]  # nothing beside the output folder
    return folder


def assert_refused(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_help_is_quick(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = run_apart(["--help"], tmp_path)
    assert time.perf_counter() - start < 2
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--config", "--run_mode", "--load_checkpoint", "--train_dataset", "--eval_dataset",
                 "--predict_data", "--device_target", "--device_id", "--use_parallel", "--output_dir",
                 "--resume_training", "--epochs", "--batch_size", "--seed"):  # fmt: skip
        assert flag in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--epoch", "3"], ["--epoch", "did you mean --epochs"]),
        (["runner_config.epoch=3"], ["epoch", "did you mean epochs"]),
        (["runner_config.epochs=three"], ["runner_config.epochs", "three"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--run_mode", "finetun"], ["run_mode", "did you mean finetune"]),
        (["lr_schedule.type=LinearWithWarmupLR"], ["did you mean LinearWithWarmUpLR"]),
        (["train_dataset.data_loader.dataset_dir=no.json"], ["no.json", "no such file"]),
        (["--load_checkpoint", "missing"], ["load_checkpoint", "missing", "no such file or folder"]),
        (["model.model_config.seq_length=100"], ["seq_length", "max_target_length"]),
        (["--predict_data"], ["--predict_data: a value must follow"]),
        (["--run_mode", "predict", "--predict_data", "missing.txt"], ["missing.txt", "no such file"]),
        (["--device_target", "Ascent"], ["did you mean Ascend"]),
    ]
)  # fmt: skip
def test_settings_are_refused_at_once(vocabulary: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    start = time.perf_counter()
    done = run_apart(tiny_arguments("finetune", vocabulary, *arguments), tmp_path)
    assert_refused(done, 2, *parts)
    assert time.perf_counter() - start < 5  # before the imports that take seconds
    assert not list(tmp_path.iterdir())


def test_without_config(tmp_path: Path) -> None:
    assert_refused(run_apart([], tmp_path), 2, "--config is missing", "--help")
    assert_refused(run_apart(["--config", "no.yaml"], tmp_path), 2, "no.yaml")


@pytest.mark.parametrize("path", ASCEND, ids=lambda path: path.stem)
def test_ascend_config_says_how_to_run_on_a_cpu(vocabulary: Path, tmp_path: Path, path: Path) -> None:
    arguments = [
        "--config", str(path), "--train_dataset", str(TRAIN_RECORDS), "--load_checkpoint", "",
        f"processor.tokenizer.vocab_file={vocabulary}", *ONE_STEP,
    ]  # fmt: skip
    if Path("/dev/davinci0").exists():
        pytest.skip("this machine has an Ascend card")
    done = run_apart(arguments, tmp_path)
    assert_refused(done, 2, "has no Ascend card", "--device_target CPU --use_parallel False")


@pytest.mark.slow
@pytest.mark.parametrize("path", ASCEND, ids=lambda path: path.stem)
def test_ascend_config_trains_on_a_cpu(vocabulary: Path, tmp_path: Path, path: Path) -> None:
    arguments = [
        "--config", str(path), "--device_target", "CPU", "--use_parallel", "False", "--output_dir", "out",
        "--train_dataset", str(TRAIN_RECORDS), "--load_checkpoint", "",
        f"processor.tokenizer.vocab_file={vocabulary}", *ONE_STEP,
    ]  # fmt: skip
    done = run_apart(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    (line,) = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert 5 < line["loss"] < 8
    assert line["grad_norm"] > 0
    assert line["learning_rate"] > 0
    assert load_pretrained(tmp_path / "out").config.compute_dtype == "float32"


def test_predict_writes_answers_to_stdout_only(vocabulary: Path, trained: Path) -> None:
    arguments = tiny_arguments(
        "predict", vocabulary, *SMALL_NETWORK, "--predict_data", "-", "--load_checkpoint", "run", "--batch_size", 2,
        "--output_dir", "answers", "generation.max_new_tokens=4"
    )  # fmt: skip
    done = run_apart(arguments, trained, stdin="类型#裙\n类型#上衣*颜色#白色\n")
    assert done.returncode == 0, done.stderr
    results = read_jsonl(trained / "answers" / "predict_results.jsonl")
    assert [line["prompt"] for line in results] == ["类型#裙", "类型#上衣*颜色#白色"]
    assert done.stdout == "".join(f"{line['prompt']}\n -> {line['answers'][0]}\n" for line in results)
    assert "weights: run/checkpoint/step_00000012" in done.stderr


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained checkpoint, to be spoilt."""
    return Path(shutil.copytree(trained / "run" / "checkpoint" / "step_00000012", tmp_path / "weights"))


@pytest.fixture
def attempt(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Status and stderr of a run in this process: what is tested is the message."""
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path / "logs"))
    main = load_script("run_glm.py").main

    def run(job: str, *arguments: object) -> tuple[int, str]:
        line = tiny_arguments(job, vocabulary, *SMALL_NETWORK, "--output_dir", tmp_path / "out", *arguments)
        status = main(line)
        shown = capsys.readouterr()
        # MindFormers remarks on the runtime that earlier tests of this process have started; a run has its own.
        out = [text for text in shown.out.splitlines() if "The runtime has been initialized" not in text]
        assert status == 0 or not out
        return status, shown.err

    return run


@pytest.fixture
def evaluate(attempt):
    """An `attempt` to evaluate two records with given weights."""
    short = ("metric.type=PerplexityMetric", "eval_dataset.num_samples=2")
    return lambda weights, *arguments: attempt("eval", *short, "--load_checkpoint", weights, *arguments)


@pytest.mark.parametrize("stdin", ["", "\n \n"])
def test_empty_standard_input(attempt, trained: Path, monkeypatch: pytest.MonkeyPatch, stdin: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    status, shown = attempt("predict", "--predict_data", "-", "--load_checkpoint", trained / "run")
    assert status == 1
    assert "error: standard input: no prompt" in shown


def test_broken_record(attempt, tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    records.write_text(DEV_RECORDS.read_text(encoding="utf-8") + '{"content": "a"\n', encoding="utf-8")
    status, shown = attempt("finetune", f"train_dataset.data_loader.dataset_dir={records}")
    assert status == 1
    assert f"error: {records}:61: " in shown


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which nobody can make a folder")
def test_output_folder_that_cannot_be_made(attempt) -> None:
    status, shown = attempt("finetune", "--output_dir", "/proc/glm_ms")
    assert status == 2
    assert "error: --output_dir: /proc/glm_ms: cannot be made: " in shown


def test_weights_of_another_shape(evaluate, checkpoint: Path) -> None:
    status, shown = evaluate(checkpoint, "model.model_config.ffn_hidden_size=40")
    assert status == 1
    assert "model.model_config.ffn_hidden_size: 40, in config.json 48" in shown
    (checkpoint / "config.json").unlink()
    status, shown = evaluate(checkpoint, "model.model_config.ffn_hidden_size=40")
    assert status == 1
    assert "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight" in shown
    assert "dense.weight" not in shown.replace("dense_", "")  # those that fit are not listed
    status, shown = evaluate(checkpoint, "model.model_config.num_layers=2")
    assert status == 1
    assert "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight" in shown


def test_unknown_weight(evaluate, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), "transformer.extra.weight": np.zeros(3, np.float32)}, file)
    status, shown = evaluate(checkpoint)
    assert status == 1
    assert "transformer.extra.weight" in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_ratio", 50.0), ("layernorm_epsilon", 0.001), ("apply_residual_connection_post_layernorm", True)],
)
def test_config_beside_the_weights_contradicts(evaluate, checkpoint: Path, name: str, value: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, name: value}))
    (checkpoint / "manifest.json").unlink()  # it would tell that the file has changed
    status, shown = evaluate(checkpoint)
    assert status == 1
    assert str(checkpoint / "config.json") in shown
    assert "eval_glm3_tiny.yaml" in shown
    assert f"model.model_config.{name}: " in shown
    assert f"in config.json {value}" in shown
    assert evaluate(checkpoint, f"model.model_config.{name}={value}")[0] == 0


def test_vocabulary_too_small(evaluate, checkpoint: Path) -> None:
    status, shown = evaluate(checkpoint, "model.model_config.padded_vocab_size=500")
    assert status == 2
    assert "padded_vocab_size: 500 is too small for the tokenizer" in shown


@pytest.mark.parametrize("content", [b"", b"not weights", b"\xff" * 100])
def test_files_that_are_no_weights(evaluate, tmp_path: Path, content: bytes) -> None:
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(content)
        status, shown = evaluate(tmp_path / name)
        assert status == 1
        assert str(tmp_path / name) in shown


@pytest.mark.slow
def test_logs_stay_out_of_stdout_wherever_they_are_kept(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engine_helpers

    user = {**engine_helpers.environment_of_a_user(), "LOCAL_DEFAULT_PATH": str(tmp_path / "logs")}
    monkeypatch.setattr(engine_helpers, "environment_of_a_user", lambda: user)
    arguments = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, "--output_dir", tmp_path / "run")
    done = run_apart(arguments, tmp_path)
    assert done.returncode == 0
    assert done.stdout == ""


def test_a_closed_output_is_no_error(vocabulary: Path, trained: Path) -> None:
    """As with `| head -1`: nothing is said, and the exit status is that of SIGPIPE."""
    arguments = tiny_arguments(
        "predict", vocabulary, *SMALL_NETWORK, "--predict_data", "-", "--load_checkpoint", "run",
        "--output_dir", "closed", "generation.max_new_tokens=4"
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "run_glm.py"), *arguments], cwd=trained, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_of_a_user()
    )  # fmt: skip
    process.stdout.close()
    process.stdin.write("类型#裙\n" * 3)
    process.stdin.close()
    said = process.stderr.read()
    assert process.wait(60) == 141, said
    assert "error" not in said
    assert "Broken pipe" not in said
