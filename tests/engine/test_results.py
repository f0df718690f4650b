"""Results of eval and predict: written as they come, continued, moved aside. A stub stands for the network."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_helpers import DEV_RECORDS, SMALL_NETWORK, read_jsonl, tiny_arguments

from glm_ms import ChatGLM3Tokenizer
from glm_ms.settings import Settings, settings_from_command_line
from glm_ms.storage.errors import CheckpointError, DataError, WriteError

PROMPTS = [record["content"] for record in read_jsonl(DEV_RECORDS)[:5]]
NUM_RECORDS = 11


class Stub:
    """Answers a prompt with its own first ids; the loss of a row is the number of its tokens."""

    config = SimpleNamespace(seq_length=512)
    network = SimpleNamespace(get_parameters=lambda: [])

    def __init__(self) -> None:
        self.calls = 0

    def answers(self, prompts: list[list[int]], slots: int, **_: Any) -> Iterator[tuple[int, list[list[int]]]]:
        for start in range(0, len(prompts), slots):  # of those that run at a time the last one ends first
            for number in range(start, min(start + slots, len(prompts)))[::-1]:
                self.calls += 1
                yield number, [prompts[number][5:12]]

    def stream(self, prompt: list[int], **_: Any) -> Iterator[list[int]]:
        return ([token] for token in prompt[5:12])

    def loss_sum(self, columns: tuple[Any, ...]) -> tuple[float, int]:
        self.calls += 1
        count = int((columns[1] != -100).sum())
        return count / 3, count


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(vocabulary)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def settings(vocabulary: Path, folder: Path) -> Callable[..., Settings]:
    def build(job: str, *arguments: object) -> Settings:
        given = {
            "predict": ("--predict_data", folder.with_name("prompts.jsonl"), "--batch_size", 2),
            "eval": (f"eval_dataset.num_samples={NUM_RECORDS}", "--batch_size", 4),
        }[job]
        if "--predict_data" in arguments:
            given = ("--batch_size", 2)
        line = tiny_arguments(
            job, vocabulary, *SMALL_NETWORK, "--load_checkpoint", "", "model.init=random", "--output_dir", folder,
            *given, *arguments
        )  # fmt: skip
        return settings_from_command_line(line)

    return build


@pytest.fixture
def predict(settings, tokenizer: ChatGLM3Tokenizer) -> Callable[..., list]:
    from glm_ms.engine.predict import predict as predict_all

    def run(*arguments: object, model: Any = None, show: Callable[[str], None] = lambda _: None) -> list:
        return predict_all(settings("predict", *arguments), model or Stub(), tokenizer, show, lambda _: None)

    return run


@pytest.fixture
def evaluate(settings, tokenizer: ChatGLM3Tokenizer) -> Callable[..., dict]:
    from glm_ms.engine.evaluate import evaluate as evaluate_all

    def run(*arguments: object, model: Any = None, say: Callable[[str], None] = lambda _: None) -> dict:
        return evaluate_all(settings("eval", *arguments), model or Stub(), tokenizer, say)

    return run


def kill_after(file: Path, lines: int) -> bytes:
    """As if the process had been killed in the middle of the next line; returns the whole content."""
    whole = file.read_bytes()
    parts = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(parts[:lines]) + parts[lines][:10])
    return whole


def test_answers_are_written_before_they_are_shown(predict, folder: Path) -> None:
    file, seen = folder / "predict_results.jsonl", []
    predict(show=lambda _: seen.append(len(read_jsonl(file))))
    assert seen == [1, 2, 3, 4, 5]


def test_a_closed_display_costs_no_answer(predict, folder: Path) -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    whole = predict()
    for arguments in ((), ("--predict_data", PROMPTS[0])):  # the second is streamed
        with pytest.raises(BrokenPipeError):
            predict(*arguments, show=closed)
        assert read_jsonl(folder / "predict_results.jsonl") == [whole[0]._asdict()]


def test_prediction_continues(predict, folder: Path) -> None:
    file, whole = folder / "predict_results.jsonl", predict()
    content, model = kill_after(file, 3), Stub()
    assert predict("--resume", model=model) == whole
    assert (file.read_bytes(), model.calls) == (content, 2)  # of the broken line, and of the last
    assert predict("--resume", model=model) == whole
    assert model.calls == 2
    with pytest.raises(CheckpointError, match=r"predict_run.json: .* another job \(seed: 0 then, 1 now\)"):
        predict("--resume", "--seed", 1)
    with pytest.raises(CheckpointError, match=r"another job \(kv_cache: float32 then, int8 now\)"):
        predict("--resume", "--kv_cache", "int8")
    with pytest.raises(CheckpointError, match="number of prompts: 5 then, 1 now"):
        predict("--resume", "--predict_data", PROMPTS[0])
    assert predict("--resume", "--kv_cache", "float32", model=model) == whole  # what null means
    identity = folder / "predict_run.json"
    earlier = json.loads(identity.read_text())
    del earlier["generation"]["min_p"], earlier["kv_cache"]  # as a version without these keys wrote it
    identity.write_text(json.dumps(earlier))
    with pytest.raises(CheckpointError, match=r"do_sample: False then, True now; generation.min_p: 0.0 then"):
        predict("--resume", "generation.do_sample=True", "generation.min_p=0.1")
    assert predict("--resume", model=model) == whole
    assert (file.read_bytes(), model.calls) == (content, 2)


def test_nothing_to_continue(predict) -> None:
    with pytest.raises(CheckpointError, match=r"predict_run.json: no such file: there are no results to continue"):
        predict("--resume")


def test_earlier_results_are_moved(predict, evaluate, folder: Path) -> None:
    predict()
    files = {path.name: path.read_bytes() for path in folder.glob("predict_*")}
    assert sorted(files) == ["predict_results.jsonl", "predict_run.json", "predict_settings.yaml"]
    evaluate()
    assert not (folder / "earlier_runs").exists()  # those of another mode stay
    predict("--seed", 1)
    assert {path.name: path.read_bytes() for path in (folder / "earlier_runs" / "1").iterdir()} == files
    said: list[str] = []
    evaluate(say=said.append)
    assert (folder / "earlier_runs" / "2" / "eval_scores.json").is_file()
    assert f"earlier results in {folder} have been moved to {folder / 'earlier_runs' / '2'}" in said


def test_a_lost_folder_ends_the_run(predict, folder: Path) -> None:
    def lose(_: str) -> None:
        if folder.exists():
            folder.rename(folder.with_name("elsewhere"))

    with pytest.raises(WriteError, match=r"predict_results.jsonl: this file, or its folder, has been removed, renamed"):
        predict(show=lose)
    assert not folder.exists()
    assert len(read_jsonl(folder.with_name("elsewhere") / "predict_results.jsonl")) == 1


def test_two_at_a_time(predict, folder: Path) -> None:
    with (folder / ".predict.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run writes results of predict into this folder"):
            predict()


def test_evaluation_continues(evaluate, folder: Path) -> None:
    both = "metric.type=[ADGENMetric,PerplexityMetric]"
    files = [folder / "eval_predictions.jsonl", folder / "eval_losses.jsonl"]
    scores, model = evaluate(both), Stub()
    contents = [kill_after(file, lines) for file, lines in zip(files, (9, 1))]
    (folder / "eval_scores.json").unlink()
    assert evaluate(both, "--resume", model=model) == scores
    assert [file.read_bytes() for file in files] == contents
    assert model.calls == 2 + 2
    assert json.loads((folder / "eval_scores.json").read_text()) == scores
    with pytest.raises(CheckpointError, match=r"another job \(.*metric: "):
        evaluate("metric.type=ADGENMetric", "--resume")
    with pytest.raises(CheckpointError, match=r"data_loader.origin_columns: .*content.* then, .*summary.* now"):
        evaluate(both, "--resume", "eval_dataset.data_loader.origin_columns=[summary,content]")
    for damaged in (b"(", b'{"x": "y"}\n{'):  # no JSON, a line of something else
        files[0].write_bytes(contents[0].replace(b"{", damaged, 1))
        with pytest.raises(DataError, match=r"eval_predictions.jsonl:1: damaged; start without resume"):
            evaluate(both, "--resume")


def test_weights_that_give_no_number(evaluate, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "loss_sum", lambda *_: (math.nan, 3))
    with pytest.raises(FloatingPointError, match="evaluation: a loss is nan: the weights"):
        evaluate("metric.type=PerplexityMetric")
    assert not (folder / "eval_scores.json").exists()


def test_training_has_a_flag_of_its_own(
    settings, vocabulary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        settings_from_command_line(tiny_arguments("finetune", vocabulary, "--output_dir", folder, "--resume"))
    assert (
        "resume: True has no effect with run_mode finetune; training continues with --resume_training"
        in capsys.readouterr().err
    )
