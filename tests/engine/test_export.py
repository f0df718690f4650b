"""--run_mode export: the files give the logits of the network in MindSpore alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from engine_helpers import TRAINED_NETWORK, run_here, tiny_arguments
from mindspore import Tensor, nn
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


@pytest.mark.slow
def test_prefix_and_lora_are_part_of_the_files(tmp_path: Path) -> None:
    from glm_ms.engine.export import export

    for name in ("ptuning_v2/final.safetensors", "lora/final"):
        model = fresh_golden_model("glm2_tiny")
        model.load_adapter(FOLDER.parent / "train" / name)
        export(SimpleNamespace(predict_batch_size=1, output_dir=tmp_path), model)
        check(tmp_path, model, PROMPTS[:1])


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.engine.export import export

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    model = fresh_golden_model("glm3_tiny")
    with pytest.raises(CheckpointError, match=r"needs \d+\.\d+ GB, 0.00 GB are free"):
        export(SimpleNamespace(predict_batch_size=2, output_dir=tmp_path), model)
    assert not list(tmp_path.iterdir())


def test_one_process_exports(vocabulary: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = tiny_arguments("predict", vocabulary, "--run_mode", "export", "--use_parallel", "--load_checkpoint", trained)
    with pytest.raises(SystemExit):
        run_here(line)
    assert "use_parallel: True, but one process writes the exported files" in capsys.readouterr().err
