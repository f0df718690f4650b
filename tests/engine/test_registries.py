"""A metric, a data format, a family, an optimizer and a schedule that only these tests know: a line in a table each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import DEV_RECORDS, SMALL_TRAINING, TRAIN_RECORDS, curve, read_jsonl, run_here, tiny_arguments
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file

from glm_ms import ChatGLM3Tokenizer, GLMConfig, load_pretrained
from glm_ms.convert.conversion import plan_conversion
from glm_ms.data.encoder import Message, Messages
from glm_ms.data.formats import FORMATS, DataFormat
from glm_ms.data.messages import LastAnswerEncoder
from glm_ms.families import FAMILIES
from glm_ms.metrics import LOWER, METRICS, TEXT, Metric
from glm_ms.settings import settings_from_command_line
from glm_ms.settings.optimizers import OPTIMIZERS, SCHEDULES
from glm_ms.storage.errors import DataError
from glm_ms.storage.run_folder import resolve_checkpoint


class LengthMetric(Metric):
    """Mean characters of the answers; a shorter answer is better."""

    input = TEXT
    better = {"characters": LOWER}  # noqa: RUF012

    def __init__(self) -> None:
        self._lengths: list[int] = []

    def update(self, predictions: list[str], references: list[str]) -> list[dict[str, float]]:
        assert len(predictions) == len(references)
        self._lengths += map(len, predictions)
        return [{"characters": float(len(text))} for text in predictions]

    def result(self) -> dict[str, Any]:
        return {"characters": sum(self._lengths) / len(self._lengths)}


def test_metric(finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "LengthMetric", LengthMetric)
    run = finetune(
        tmp_path, "runner_config.max_steps=4", "do_eval=True", "eval_step_interval=1", "eval_epoch_interval=-1",
        "metric.type=[ADGENMetric,LengthMetric]", "checkpoint.best_metric=characters",
        f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}", "eval_dataset.num_samples=3",
        "generation.max_new_tokens=8", "lr_schedule.learning_rate=0.05"
    )  # fmt: skip
    lines = read_jsonl(run / "eval_metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    values = [line["characters"] for line in lines]
    assert len(set(values)) > 1
    best = json.loads((run / "checkpoint" / "best.json").read_text())
    assert best == {"step": 1 + values.index(min(values)), "metric": "characters", "value": min(values)}
    predictions = read_jsonl(run / "eval_predictions.jsonl")
    assert [line["characters"] for line in predictions] == [len(line["prediction"]) for line in predictions]
    assert all("rouge-l" in line for line in predictions)
    assert (run / "plots" / "eval_scores.png").is_file()


def read_pair(value: Any, place: str, columns: Sequence[str]) -> Messages | None:
    """An object of two texts, `{"q": question, "a": answer}`."""
    if not isinstance(value, dict) or set(value) != {"q", "a"}:
        raise DataError(f"{place}: expected q and a")
    question, answer = value["q"], value["a"]
    return (Message("user", question), Message("assistant", answer, loss=True)) if answer else None


def test_data_format(vocabulary, finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, the losses and the evaluated prompts are those of the same records in another format."""
    monkeypatch.setitem(FORMATS, "PairDataLoader", DataFormat(read_pair, unused_keys=("data_loader.origin_columns",)))
    records = read_jsonl(TRAIN_RECORDS)[:26]
    pairs, ends = tmp_path / "pairs.json", []
    lines = [{"q": item["content"], "a": item["summary"]} for item in records] + [{"q": "empty", "a": ""}]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plain = [f"eval_dataset.data_loader.dataset_dir={TRAIN_RECORDS}"]
    toy = [
        f"{part}_dataset.data_loader.{key}"
        for part in ("train", "eval")
        for key in ("type=PairDataLoader", f"dataset_dir={pairs}")
    ]
    for name, arguments in (("plain", plain), ("toy", toy)):
        run = finetune(
            tmp_path / name, *arguments, "runner_config.max_steps=2", "do_eval=True", "generation.max_new_tokens=4",
            "eval_dataset.num_samples=3"
        )  # fmt: skip
        ends.append((curve(run), read_jsonl(run / "eval_predictions.jsonl")))
    assert ends[0] == ends[1]
    assert [line["prompt"] for line in ends[1][1]] == [item["content"] for item in records[:3]]
    settings = settings_from_command_line(
        tiny_arguments("finetune", vocabulary, *toy, "train_dataset.data_loader.origin_columns=[a,b]")
    )
    assert "train_dataset.data_loader.origin_columns: no effect with PairDataLoader" in settings.notes


class ToyTokenizer(ChatGLM3Tokenizer):
    """ChatGLM3 with another prompt template and another stop token."""

    stop_tokens = ("<|system|>",)

    def build_chat_input(self, query: str, history: Any = None, role: str = "user") -> dict[str, list[int]]:
        return super().build_chat_input(f"Q: {query}", history, role)


class ToyEncoder(LastAnswerEncoder):
    def read(self, value: Any, place: str) -> Messages | None:
        messages = super().read(value, place)
        return messages and tuple(
            message._replace(content=f"Q: {message.content}") if message.role == "user" else message
            for message in messages
        )


class ToyConfig(GLMConfig):
    model_type = "toyglm"


def test_family(finetune, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = dataclasses.replace(
        FAMILIES["chatglm3"], name="toy", generation=9, tokenizer=ToyTokenizer, encoder=ToyEncoder, config=ToyConfig,
        parameter_names={"toy.embedding.weight": "transformer.embedding.embedding_table"}
    )  # fmt: skip
    monkeypatch.setitem(FAMILIES, "toy", toy)
    chosen = "processor.tokenizer.type=ToyTokenizer"
    run = finetune(
        tmp_path / "run", chosen, "runner_config.max_steps=2", "do_eval=True", "metric.type=ADGENMetric",
        f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}", "eval_dataset.num_samples=2",
        "generation.max_new_tokens=6"
    )  # fmt: skip
    assert all(line["prompt"].startswith("Q: ") for line in read_jsonl(run / "eval_predictions.jsonl"))

    line = tiny_arguments(
        "predict", vocabulary, *SMALL_TRAINING[:4], chosen, "--predict_data", "类型#裙", "--output_dir",
        tmp_path / "out", "--load_checkpoint", run, "generation.max_new_tokens=6"
    )  # fmt: skip
    assert run_here(line) == 0
    model, tokenizer = load_pretrained(run), ToyTokenizer(vocabulary)
    assert type(model.config) is ToyConfig
    ids = ChatGLM3Tokenizer(vocabulary).build_chat_input("Q: 类型#裙")["input_ids"]
    (sequence,) = model.generate(ids, max_new_tokens=6, eos_token_id=[tokenizer.get_command("<|system|>")])
    from glm_ms.engine.predict import answer_text

    (answer,) = read_jsonl(tmp_path / "out" / "predict_results.jsonl")[0]["answers"]
    assert answer == answer_text(tokenizer, sequence[len(ids) :])

    folder = tmp_path / "hf"
    plan_conversion(resolve_checkpoint(run), folder).run()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "toyglm"
    assert "toy.embedding.weight" in load_file(folder / "model.safetensors")
    again = load_pretrained(folder)
    for name, value in model.parameters().items():
        assert (again.parameters()[name].asnumpy() == value.asnumpy()).all(), name


class HalvingLR(nn.learning_rate_schedule.LearningRateSchedule):
    """Half the rate after every update."""

    def __init__(self, learning_rate: float, warmup_steps: int, total_steps: int) -> None:
        super().__init__()
        assert (warmup_steps, total_steps) == (0, 4)
        self.rate = Tensor(learning_rate)

    def construct(self, global_step: Tensor) -> Tensor:
        return self.rate * ops.pow(0.5, global_step)


class SignDescent(nn.Optimizer):
    """Moves every weight by the learning rate against the sign of its gradient."""

    def __init__(self, params: Any, learning_rate: Any, weight_decay: float, **_: Any) -> None:
        super().__init__(learning_rate, params)
        assert weight_decay == 0.25

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        rate = ops.reshape(self.get_lr(), ())
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        for i in range(len(gradients)):
            ops.assign_sub(self.parameters[i], rate * ops.sign(gradients[i]))
        return rate


@pytest.mark.parametrize("optimizer", ["GLMAdamW", "SignDescent"])
def test_optimizer_and_schedule(finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    monkeypatch.setitem(SCHEDULES, "HalvingLR", f"{__name__}:HalvingLR")
    monkeypatch.setitem(OPTIMIZERS, "SignDescent", f"{__name__}:SignDescent")
    run = finetune(
        tmp_path, "runner_config.max_steps=4", "lr_schedule.type=HalvingLR", "lr_schedule.learning_rate=0.125",
        f"optimizer.type={optimizer}", "optimizer.weight_decay=0.25"
    )  # fmt: skip
    lines = curve(run)
    assert [line["learning_rate"] for line in lines] == [0.125, 0.0625, 0.03125, 0.015625]
    assert lines[-1]["loss"] != lines[0]["loss"]
    state = load_file(run / "checkpoint" / "step_00000004" / "optimizer.safetensors")
    assert any(name.startswith("adam_m") for name in state) == (optimizer == "GLMAdamW")


def test_unknown_optimizer_is_refused(vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = tiny_arguments("finetune", vocabulary, "--output_dir", tmp_path, "optimizer.type=GLMAdam")
    with pytest.raises(SystemExit):
        run_here(line)
    assert "did you mean GLMAdamW" in capsys.readouterr().err
