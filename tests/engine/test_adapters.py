"""LoRA and P-Tuning from run_glm.py: training, evaluation, prediction, training on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from engine_helpers import TRAINED_NETWORK, curve, last_of_each, read_jsonl, run_here, tiny_arguments
from marks import slow_unless

from glm_ms import load_pretrained
from glm_ms.convert.reader import open_checkpoint
from glm_ms.peft.adapter import read_adapter
from glm_ms.storage.run_folder import list_checkpoints

TRAINING = (
    *TRAINED_NETWORK, "runner_config.max_steps=30", "runner_config.batch_size=8", "logging.tensorboard=False",
    "checkpoint.save_steps=null", "train_dataset.num_samples=240", "lr_schedule.type=ConstantWarmUpLR",
    "lr_schedule.warmup_ratio=null", "lr_schedule.lr_end=0.0",
)  # fmt: skip
# The base writes adverts from attributes; adapters learn to read the attributes off an advert.
BACKWARDS = "origin_columns=[summary,content]"
KINDS = {
    "lora": (
        "model.pet_config.pet_type=lora", "model.pet_config.lora_rank=4",
        "model.pet_config.target_modules=[query_key_value, dense_4h_to_h]", "lr_schedule.learning_rate=0.02",
    ),
    "ptuning2": (
        "model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=6",
        "model.pet_config.prefix_projection=True", "model.pet_config.projection_dim=24",
        "lr_schedule.learning_rate=0.02",
    ),
}  # fmt: skip
MINDFORMERS_PREFIX = "prefix_encoder.mindpet_delta_ptuning2_"
FILES = {
    "lora": {"adapter_config.json", "adapter_model.safetensors"},
    "ptuning2": {"config.json", "prefix_encoder.safetensors"},
}


@pytest.fixture(scope="module")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has seen one task."""
    folder = tmp_path_factory.mktemp("base")
    line = tiny_arguments(
        "finetune", vocabulary, *TRAINING, "--output_dir", folder, "lr_schedule.learning_rate=0.004"
    )  # fmt: skip
    assert run_here(line) == 0
    return folder


@pytest.fixture(scope="module", params=slow_unless(["lora"], KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def adapted(kind: str, base: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an adapter run."""
    folder = tmp_path_factory.mktemp(kind)
    line = tiny_arguments(
        "finetune", vocabulary, *TRAINING, *KINDS[kind], "--load_checkpoint", base, "--output_dir", folder,
        f"train_dataset.data_loader.{BACKWARDS}"
    )  # fmt: skip
    assert run_here(line) == 0
    return folder


def scores(vocabulary: Path, output_dir: Path, *arguments: object) -> dict[str, float]:
    line = tiny_arguments(
        "eval", vocabulary, *TRAINED_NETWORK, "--output_dir", output_dir, "metric.type=PerplexityMetric",
        f"eval_dataset.data_loader.{BACKWARDS}", *arguments
    )  # fmt: skip
    assert run_here(line) == 0
    return json.loads((output_dir / "eval_scores.json").read_text())


def test_the_adapter_alone_is_saved(kind: str, adapted: Path, base: Path) -> None:
    folder = list_checkpoints(adapted)[-1][1]
    assert {path.name for path in folder.iterdir()} == FILES[kind] | {
        "optimizer.safetensors",
        "manifest.json",
    }
    weights = list_checkpoints(base)[-1][1] / "model.safetensors"
    assert sum(path.stat().st_size for path in folder.iterdir()) < weights.stat().st_size
    stored = read_adapter(adapted)
    assert all(tensor.dtype == np.float32 for tensor in stored.tensors.values())
    losses = [line["loss"] for line in curve(adapted)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_it_lowers_held_out_perplexity(
    adapted: Path, base: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = scores(vocabulary, tmp_path, "--load_checkpoint", base)
    capsys.readouterr()
    after = scores(vocabulary, tmp_path, "--load_checkpoint", base, "--load_adapter", adapted)
    assert after["perplexity"] < 0.5 * before["perplexity"]
    assert after["num_tokens"] == before["num_tokens"]
    stored, shown = read_adapter(adapted), capsys.readouterr().err
    count = len(stored.tensors)
    assert f"{count} of {count} tensors matched" in shown
    assert "largest logit change on a probe prompt" in shown


def test_it_answers(adapted: Path, base: Path, vocabulary: Path, tmp_path: Path) -> None:
    """predict and the Python interface give the same tokens."""
    line = tiny_arguments(
        "predict", vocabulary, *TRAINED_NETWORK, "--output_dir", tmp_path, "--load_checkpoint", base,
        "--load_adapter", adapted, "--predict_data", "类型#裙*颜色#红色", "generation.max_new_tokens=12"
    )  # fmt: skip
    assert run_here(line) == 0
    from glm_ms import ChatGLM3Tokenizer

    tokenizer = ChatGLM3Tokenizer(vocabulary)
    prompt = tokenizer.build_chat_input("类型#裙*颜色#红色")["input_ids"]
    model = load_pretrained(base, adapter=adapted)
    sequence = model.generate(prompt, max_new_tokens=12, eos_token_id=tokenizer.stop_token_ids)[0]
    answer = read_jsonl(tmp_path / "predict_results.jsonl")[0]["answers"][0]
    tokens = [token for token in sequence[len(prompt) :] if token not in tokenizer.stop_token_ids]
    assert answer == tokenizer.decode(tokens).strip()


@pytest.mark.slow
def test_training_on_begins_where_it_ended(
    kind: str, adapted: Path, base: Path, vocabulary: Path, tmp_path: Path
) -> None:
    line = tiny_arguments(
        "finetune", vocabulary, *TRAINING, *KINDS[kind], "--load_checkpoint", base, "--load_adapter", adapted,
        "--output_dir", tmp_path, "runner_config.max_steps=3", f"train_dataset.data_loader.{BACKWARDS}"
    )  # fmt: skip
    assert run_here(line) == 0
    assert curve(tmp_path)[0]["loss"] < np.mean([line["loss"] for line in curve(adapted)[:5]])


@pytest.fixture(scope="module")
def joint(kind: str, adapted: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapter as MindFormers saves them, in one file."""
    stored, path = read_adapter(adapted), tmp_path_factory.mktemp("joint") / "glm.ckpt"
    tensors = {
        name.replace("lora_A.weight", "mindpet_delta_lora_a")
        .replace("lora_B.weight", "mindpet_delta_lora_b")
        .replace("transformer.prefix_encoder.embedding.weight", f"{MINDFORMERS_PREFIX}embedding.embedding_table")
        .replace("transformer.prefix_encoder.trans.0.", f"{MINDFORMERS_PREFIX}dense_in.")
        .replace("transformer.prefix_encoder.trans.2.", f"{MINDFORMERS_PREFIX}dense_out."): tensor
        for name, tensor in stored.tensors.items()
    }
    with open_checkpoint(list_checkpoints(base)[-1][1]) as reader:
        tensors.update({name: reader.read(name) for name in reader.names()})
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(tensor)} for name, tensor in tensors.items()], str(path))
    return path


@pytest.mark.slow
def test_base_and_adapter_in_one_file(
    kind: str, joint: Path, adapted: Path, base: Path, vocabulary: Path, tmp_path: Path, capsys
) -> None:
    """load_checkpoint alone names both."""
    pet = tuple(key for key in KINDS[kind] if key.startswith("model.pet_config."))
    apart = scores(vocabulary, tmp_path, "--load_checkpoint", base, "--load_adapter", adapted)
    capsys.readouterr()
    assert scores(vocabulary, tmp_path, "--load_checkpoint", joint, *pet) == apart
    count = len(read_adapter(adapted).tensors)
    assert f"{count} of {count} tensors matched" in capsys.readouterr().err
    arguments = tiny_arguments(
        "finetune", vocabulary, *TRAINING, "--load_checkpoint", joint, "--output_dir", tmp_path / "run"
    )
    assert run_here(arguments) == 1
    assert "contains an adapter beside the weights" in capsys.readouterr().err
    again = tiny_arguments(
        "finetune", vocabulary, *TRAINING, *KINDS[kind], "--load_checkpoint", joint, "--output_dir", tmp_path / "run",
        "runner_config.max_steps=2", f"train_dataset.data_loader.{BACKWARDS}"
    )  # fmt: skip
    assert run_here(again) == 0
    assert curve(tmp_path / "run")[0]["loss"] < np.mean([line["loss"] for line in curve(adapted)[:5]])


def test_an_adapter_that_is_nowhere(kind: str, base: Path, vocabulary: Path, tmp_path: Path, capsys) -> None:
    line = tiny_arguments(
        "eval", vocabulary, *TRAINED_NETWORK, *KINDS[kind][:1], "--load_checkpoint", base, "--output_dir", tmp_path
    )
    assert run_here(line) == 2
    assert "no adapter to load; name it (--load_adapter PATH)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lora(base: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple]:
    """Output folder of a LoRA run of one step, and its arguments."""
    folder = tmp_path_factory.mktemp("one_step")
    arguments = (*TRAINING, *KINDS["lora"], "runner_config.max_steps=1", "--load_checkpoint", base)
    assert run_here(tiny_arguments("finetune", vocabulary, *arguments, "--output_dir", folder)) == 0
    return folder, arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pet_config.lora_rank=2", "model.pet_config.lora_rank: 2, in the adapter 4"),
        ("model.pet_config.lora_alpha=7", "model.pet_config.lora_alpha"),
        ("model.pet_config.target_modules=[dense]", "model.pet_config.target_modules"),
        ("--load_checkpoint={adapter}", "contains an adapter, not weights"),
        ("--load_adapter={base}", "no adapter"),
        ("model.model_config.hidden_size=32", "describe different networks"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: str, message: str, base: Path, lora: tuple, vocabulary: Path, tmp_path: Path, capsys
) -> None:
    folder, arguments = lora
    change = change.format(adapter=folder, base=base)
    flag, _, value = change.partition("=")
    line = tiny_arguments("finetune", vocabulary, *arguments, "--load_adapter", folder, "--output_dir", tmp_path)
    if flag in line:
        line[line.index(flag) + 1] = value
    else:
        line = last_of_each([*line, change])
    capsys.readouterr()
    assert run_here(line) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_an_adapter_of_peft_resumes_with_its_own_scale(
    base: Path, lora: tuple, vocabulary: Path, tmp_path: Path
) -> None:
    """`use_rslora` is in no settings: a resumed run takes it from its checkpoint."""
    folder, arguments = lora
    stored = tmp_path / "rslora"
    shutil.copytree(list_checkpoints(folder)[-1][1], stored)
    (stored / "manifest.json").unlink()
    config = json.loads((stored / "adapter_config.json").read_text())
    (stored / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    arguments = (
        *arguments, "--load_adapter", stored, "runner_config.max_steps=4", "checkpoint.save_steps=2",
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert run_here(tiny_arguments("finetune", vocabulary, *arguments)) == 0
    unbroken = curve(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step_00000004")
    assert run_here(tiny_arguments("finetune", vocabulary, *arguments, "--resume_training")) == 0
    assert curve(tmp_path / "run") == unbroken
    assert read_adapter(tmp_path / "run").config.use_rslora


def test_the_folder_of_the_base_is_not_for_its_adapter(base: Path, vocabulary: Path, capsys) -> None:
    """An earlier run is moved aside, and the base would go with it."""
    before = list_checkpoints(base)
    line = tiny_arguments(
        "finetune", vocabulary, *TRAINING, *KINDS["lora"], "--load_checkpoint", base, "--output_dir", base
    )
    assert run_here(line) == 1
    assert "contains the base weights of this run" in capsys.readouterr().err
    assert list_checkpoints(base) == before


@pytest.mark.slow
def test_another_base_of_the_same_shape_is_remarked_on(
    base: Path, lora: tuple, vocabulary: Path, tmp_path: Path, capsys
) -> None:
    retrained = tmp_path / "retrained"
    line = tiny_arguments("finetune", vocabulary, *TRAINING, "--output_dir", retrained, "runner_config.max_steps=1")
    assert run_here(line) == 0
    for weights, remarks in ((base, 0), (retrained, 1)):
        capsys.readouterr()
        scores(vocabulary, tmp_path, "--load_checkpoint", weights, "--load_adapter", lora[0])
        assert capsys.readouterr().err.count("was trained on other weights than") == remarks


def test_the_advice_for_another_adapter_run_names_the_right_flag(
    lora: tuple, vocabulary: Path, tmp_path: Path, capsys
) -> None:
    folder, arguments = lora
    checkpoint = list_checkpoints(folder)[-1][1]
    line = tiny_arguments(
        "finetune", vocabulary, *arguments, "--output_dir", tmp_path, f"--resume_training={checkpoint}", "--seed", "9"
    )
    assert run_here(line) == 1
    assert f"start a new run with --load_adapter {checkpoint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [
        (
            "model.pet_config.prefix_projection=False",
            "model.pet_config.projection_dim=24",
        ),  # a width without use
        pytest.param(
            ("model.pet_config.prefix_projection=True", "model.pet_config.projection_dim=null"), marks=pytest.mark.slow
        ),
    ],
)
def test_prefixes_resume(keys: tuple[str, ...], base: Path, vocabulary: Path, tmp_path: Path) -> None:
    arguments = (
        *TRAINING, *KINDS["ptuning2"], *keys, "--load_checkpoint", base, "--output_dir", tmp_path,
        "runner_config.max_steps=4", "checkpoint.save_steps=2",
    )  # fmt: skip
    assert run_here(tiny_arguments("finetune", vocabulary, *arguments)) == 0
    unbroken = curve(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint" / "step_00000004")
    assert run_here(tiny_arguments("finetune", vocabulary, *arguments, "--resume_training")) == 0
    assert curve(tmp_path) == unbroken
