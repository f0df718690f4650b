"""--run_mode export: the files give the logits of the network in MindSpore alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from engine_helpers import CONFIGS, TRAINED_NETWORK, run_here, tiny_arguments
from mindspore import Tensor, nn
from mindspore.train import serialization
from reference import FOLDER, fresh_golden_model
from tolerances import LOGITS

from glm_ms import GLMForCausalLM, load_pretrained
from glm_ms.generation.graphs import GRAPHS
from glm_ms.storage.errors import CheckpointError

PROMPTS = [[5, 17, 300, 8, 44], [101, 102]]
FILES = ("mindir_full_checkpoint/rank_0_graph.mindir", "mindir_inc_checkpoint/rank_0_graph.mindir")


def int32(array: object) -> Tensor:
    return Tensor(np.array(array, np.int32))


def greedy(folder: Path, prompts: list[list[int]], count: int) -> tuple[list[list[int]], np.ndarray]:
    """Sequences, and the logits [count, B, V] their tokens were chosen from, by the files alone."""
    prefill, step = (nn.GraphCell(ms.load(str(folder / name))) for name in FILES)
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    positions = np.tile(np.arange(lengths.max()), (len(prompts), 1))
    found = [prefill(int32(ids), int32(positions), int32(lengths - 1)).asnumpy()]
    filled = prefill.parameters_dict()
    for name, parameter in step.parameters_dict().items():
        parameter.set_data(filled[name])
    while len(found) < count:
        tokens = found[-1].argmax(axis=1)[:, None]
        found.append(step(int32(tokens), int32(lengths[:, None] + len(found) - 1)).asnumpy())
    new = np.array(found).argmax(axis=2).T.tolist()
    return [prompt + tokens for prompt, tokens in zip(prompts, new)], np.array(found)


def check(folder: Path, model: GLMForCausalLM, prompts: list[list[int]], count: int = 4) -> None:
    sequences, logits = GRAPHS.run(greedy, folder, prompts, count)
    assert sequences == model.generate(prompts, max_new_tokens=count, eos_token_id=[])
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences)):
        expected = model(sequence[:-1]).asnumpy()[0, len(prompt) - 1 :]
        np.testing.assert_allclose(logits[:, row], expected, **LOGITS)


def test_files_of_a_run_give_the_logits_of_the_network(
    vocabulary: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = tiny_arguments(
        "predict", vocabulary, *TRAINED_NETWORK, "--run_mode", "export", "--load_checkpoint", trained, "--batch_size",
        len(PROMPTS), "--output_dir", tmp_path
    )  # fmt: skip
    assert run_here(line) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    for name in FILES:
        assert f"exported: {tmp_path / name}" in shown.err
    check(tmp_path, load_pretrained(trained), PROMPTS)


@pytest.fixture
def export_here(tmp_path: Path, vocabulary: Path):
    """export_here(model, rows): exports a model into the folder of the test."""
    from glm_ms.engine.export import export
    from glm_ms.settings import load_settings

    def run(model: GLMForCausalLM, rows: int) -> list[str]:
        overrides = [f"processor.tokenizer.vocab_file={vocabulary}", f"output_dir={tmp_path}", "load_checkpoint="]
        flags = {"run_mode": "export", "batch_size": rows}
        notes: list[str] = []
        path = CONFIGS / "tiny" / "predict_glm3_tiny.yaml"
        export(load_settings(path, overrides, flags, check_files=False), model, notes.append)
        return notes

    return run


@pytest.mark.slow
def test_prefix_and_lora_are_part_of_the_files(export_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, aside in (("ptuning_v2/final.safetensors", 0), ("lora/final", 1)):
        monkeypatch.setattr(serialization, "TOTAL_SAVE", 0 if aside else 1 << 20)  # KB: weights beside the graph
        model = fresh_golden_model("glm2_tiny")
        model.load_adapter(FOLDER.parent / "train" / name)
        notes = export_here(model, 1)
        check(tmp_path, model, PROMPTS[:1])
        assert sum("have been moved to" in note for note in notes) == aside
        assert (tmp_path / FILES[1]).with_name("rank_0_variables").exists() == bool(aside)


def test_space_is_checked_before_anything_is_written(
    export_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    with pytest.raises(CheckpointError, match=r"needs \d+\.\d+ GB, 0.00 GB are free"):
        export_here(fresh_golden_model("glm3_tiny"), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--use_parallel", "use_parallel: True, but one process writes the exported files"),
        ("--resume", "resume: True, but exported files are written as a whole"),
    ],
)
def test_what_an_export_does_not_do(
    vocabulary: Path, capsys: pytest.CaptureFixture[str], flag: str, message: str
) -> None:
    line = tiny_arguments("predict", vocabulary, "--run_mode", "export", flag, "--load_checkpoint", FOLDER)
    with pytest.raises(SystemExit):
        run_here(line)
    assert message in capsys.readouterr().err
