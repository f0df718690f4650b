"""One flipped bit in each file of a run, of an adapter run and of a Hugging Face folder: every door refuses by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_helpers import SMALL_NETWORK, SMALL_TRAINING, load_script, run_here, tiny_arguments

from glm_ms import load_pretrained
from glm_ms.convert.conversion import plan_conversion
from glm_ms.peft.adapter import read_adapter
from glm_ms.storage.errors import FileError
from glm_ms.storage.run_folder import list_checkpoints

LORA = ("model.pet_config.pet_type=lora", "model.pet_config.lora_rank=2", "lr_schedule.learning_rate=0.02")
WEIGHTS = ("model.safetensors", "config.json", "manifest.json")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "manifest.json")


@pytest.fixture(scope="module")
def base(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(tmp_path_factory.mktemp("base"), "runner_config.max_steps=1")


@pytest.fixture(scope="module")
def adapter(finetune, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return finetune(folder, *LORA, "--load_checkpoint", base, "runner_config.max_steps=1")


@pytest.fixture(scope="module")
def hugging_face(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    plan_conversion(base, folder, max_shard_size=50_000).run()
    return folder


def places(path: Path) -> Iterator[int]:
    """Bytes to damage: in the length and the text of a header, in the middle, at the end."""
    size = path.stat().st_size
    yield from {0, 9, size // 2, size - 2}


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.fixture
def doors(base: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Name of a door -> a function of a run folder that returns what the door says when it refuses."""

    def command(function: Callable[[list[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        try:
            status = function([str(argument) for argument in arguments])
        except SystemExit as end:  # settings that do not fit
            status = end.code
        assert status in (1, 2)
        return capsys.readouterr().err

    def run(job: str, *arguments: object) -> str:
        line = tiny_arguments(job, vocabulary, *SMALL_NETWORK, "--output_dir", tmp_path / "out", *arguments)
        return command(run_here, *line)

    def python(function: Callable[..., object], *arguments: object, **named: object) -> str:
        with pytest.raises(FileError) as error:
            function(*arguments, **named)
        return str(error.value)

    convert, merge = (load_script(f"tools/{name}.py").main for name in ("convert_weight", "merge_lora"))
    eval_keys = ("eval_dataset.num_samples=1", "metric.type=PerplexityMetric")
    weights = {
        "load_pretrained": lambda path: python(load_pretrained, path),
        "eval": lambda path: run("eval", *eval_keys, "--load_checkpoint", path),
        "predict": lambda path: run("predict", "--predict_data", "a", "--load_checkpoint", path),
        "finetune": lambda path: run("finetune", *SMALL_TRAINING, "--load_checkpoint", path),
        "convert": lambda path: command(convert, "--input", path, "--output", tmp_path / "converted"),
        "merge": lambda path: command(
            merge, "--base", path, "--adapter", path.parent / "adapter", "--output", tmp_path / "merged"
        ),
    }
    adapters = {
        "read_adapter": lambda path: python(read_adapter, path),
        "load_pretrained": lambda path: python(load_pretrained, base, adapter=path),
        "eval": lambda path: run("eval", *eval_keys, "--load_checkpoint", base, "--load_adapter", path),
        "predict": lambda path: run(
            "predict", "--predict_data", "a", "--load_checkpoint", base, "--load_adapter", path
        ),
        "finetune": lambda path: run(
            "finetune", *SMALL_TRAINING, *LORA, "--load_checkpoint", base, "--load_adapter", path
        ),
        "merge": lambda path: command(merge, "--base", base, "--adapter", path, "--output", tmp_path / "merged"),
    }
    return {"weights": weights, "adapter": adapters}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_a_run(name: str, base: Path, adapter: Path, doors: dict, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    check_doors(name, base, doors["weights"], tmp_path)


@pytest.mark.parametrize("name", ADAPTER)
def test_adapter_of_a_run(name: str, adapter: Path, doors: dict, tmp_path: Path) -> None:
    check_doors(name, adapter, doors["adapter"], tmp_path)


def check_doors(name: str, run: Path, doors: dict[str, Callable[[Path], str]], tmp_path: Path) -> None:
    """Damages a file of the last checkpoint in several places; the doors take turns."""
    original = list_checkpoints(run)[-1][1]
    turns = list(doors.values())
    for place in places(original / name):
        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        file = copy / original.relative_to(run) / name
        damage(file, place)
        for door in turns:
            said = door(copy)
            assert str(file) in said, (place, door, said)
            assert "Traceback" not in said
        shutil.rmtree(copy)


def test_a_hugging_face_folder(hugging_face: Path, doors: dict, tmp_path: Path) -> None:
    """Without recorded sums: whatever cannot be read is refused by name."""
    copy = tmp_path / "model"
    for original in sorted(hugging_face.iterdir()):
        for place in (0, 9) if original.suffix == ".safetensors" else (0,):
            shutil.copytree(hugging_face, copy)
            damage(copy / original.name, place)
            for name in ("load_pretrained", "eval", "convert"):
                said = doors["weights"][name](copy)
                assert str(copy / original.name) in said, (original.name, place, said)
            shutil.rmtree(copy)


def test_the_vocabulary_of_a_run(base: Path, vocabulary: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "tokenizer.model"
    for place in places(vocabulary):
        shutil.copy(vocabulary, file)
        damage(file, place)
        for job, keys in (("eval", ("metric.type=PerplexityMetric",)), ("predict", ("--predict_data", "a"))):
            capsys.readouterr()
            line = tiny_arguments(
                job, file, *SMALL_NETWORK, *keys, "--load_checkpoint", base, "--output_dir", tmp_path / "out"
            )
            assert run_here(line) == 1
            assert str(file) in capsys.readouterr().err
