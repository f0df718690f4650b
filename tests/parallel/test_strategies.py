"""Strategies through MindSpore's own parallel compiler, for 8 pretended Ascend cards: see the rig's README.

What a pass shows: the compiler accepts the network with its strategies, and cuts every parameter as said here. No
kernel runs, so nothing is said of numbers or speed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import last_of_each
from marks import slow_unless
from safetensors.numpy import load_file

from glm_ms import GLMForCausalLM
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.reader import open_checkpoint
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.model.config import GLMConfig
from glm_ms.peft.adapter import AdapterConfig, read_adapter
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.plan import plan_run
from glm_ms.settings import load_settings
from tests.parallel.collectives import loss_divisors, sent_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
RIG = Path(os.environ.get("GLM_MS_SHARED", REPOSITORY.parent / "shared")) / "rig" / "run.sh"
CONFIG = REPOSITORY / "configs" / "glm3" / "run_glm3_6b_finetune_800_32G.yaml"
CONFIGS = sorted(
    path for path in (REPOSITORY / "configs").rglob("*.yaml") if "parallel_mode: 1" in path.read_text(encoding="utf-8")
)
# hidden 64, 8 heads of 8, 2 key/value heads, MLP 96, vocabulary 128.
TINY = {
    "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 8, "num_attention_heads": 8, "padded_vocab_size": 128,
    "multi_query_group_num": 2, "seq_length": 192,
}  # fmt: skip
SMALL = tuple(f"model.model_config.{key}={value}" for key, value in TINY.items())
BLOCK = "transformer.encoder.layers.{}."
NORM, QUERY, KEY = "input_layernorm.weight", "self_attention.query_key_value.query.weight", (
    "self_attention.query_key_value.key.weight"
)  # fmt: skip
BIAS, DENSE = "self_attention.query_key_value.query.bias", "self_attention.dense.weight"
GATE, DOWN = "mlp.dense_h_to_4h.gate.weight", "mlp.dense_4h_to_h.weight"
EMBEDDING, HEAD = "transformer.embedding.embedding_table", "transformer.output_layer.weight"

pytestmark = [
    pytest.mark.skipif(not RIG.is_file(), reason=f"needs the rig ({RIG}), which pretends a cluster"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the rig needs gcc"),
]


def compile_ranks(script: str, out: Path, *arguments: object, ranks: str = "", graphs: Path | None = None) -> str:
    """Runs a script for every rank of 8, or those named; returns what the rig printed. MindSpore saves its graphs."""
    only = ["--only", ranks] if ranks else []
    line = [str(RIG), "--ranks", "8", *only, "--target", "ascend", "--out", str(out), "--timeout", "500", "--",
            str(Path(__file__).with_name(script)), *map(str, arguments)]  # fmt: skip
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path}
    if graphs is not None:
        environment.update(MS_DEV_SAVE_GRAPHS="1", MS_DEV_SAVE_GRAPHS_PATH=str(graphs))
    done = subprocess.run(
        line, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def split(data: int, model: int = 1, stages: int = 1, sharded: bool = False, *more: str) -> tuple[str, ...]:
    """The keys of a split of 8 cards, as a YAML has them."""
    micro = 2 * stages if stages > 1 else 1
    return (
        f"parallel_config.data_parallel={data}", f"parallel_config.model_parallel={model}",
        f"parallel_config.pipeline_stage={stages}", f"parallel_config.micro_batch_num={micro}",
        f"parallel.enable_parallel_optimizer={sharded}", "runner_config.batch_size=1",
        f"recompute_config.parallel_optimizer_comm_recompute={sharded and stages == 1}", *more,
    )  # fmt: skip


def stored_bytes(found: dict[str, list[int]]) -> tuple[int, int]:
    """Bytes of float32 weights and of both moments in what a rank has written."""
    weights = sum(4 * math.prod(shape) for name, shape in found.items() if not name.startswith("adam_m."))
    return weights, sum(2 * 4 * math.prod(shape) for name, shape in found.items() if name.startswith("adam_m."))


WHOLE = {NORM: [64], QUERY: [64, 64], KEY: [16, 64], DENSE: [64, 64], GATE: [96, 64], DOWN: [64, 96]}
# Name -> keys, what a card of each stage stores of one block, of the embedding and of the output layer. Below 64 KB
# nothing is cut by optimizer sharding; the larger vocabulary is for that.
BY_FOUR = {
    NORM: [64],
    QUERY: [16, 64],
    BIAS: [16],
    KEY: [16, 64],
    DENSE: [64, 16],
    GATE: [24, 64],
    DOWN: [64, 24],
}
LAYOUTS = {
    "dp8": (split(8), WHOLE, [128, 64], [128, 64]),
    "dp8, optimizer": (
        split(8, 1, 1, True, "model.model_config.padded_vocab_size=1024", "model.model_config.ffn_hidden_size=512"),
        {**WHOLE, GATE: [512 // 8, 64], DOWN: [64 // 8, 512]}, [128, 64], [128, 64],
    ),
    "dp2 x mp4": (split(2, 4), BY_FOUR, [128, 64], [32, 64]),
    "dp2 x mp4, optimizer": (
        split(2, 4, 1, True, "model.model_config.padded_vocab_size=1024"), BY_FOUR, [1024 // 8, 64], [1024 // 8, 64],
    ),
    "dp2 x mp4, sequence, four groups": (
        split(2, 4, 1, False, "parallel_config.use_seq_parallel=True", "model.model_config.multi_query_group_num=4"),
        {**BY_FOUR, KEY: [8, 64]}, [128, 64], [32, 64],
    ),
    "mp8, vocabulary": (
        split(1, 8, 1, False, "parallel_config.vocab_emb_dp=False"),
        {NORM: [64], QUERY: [8, 64], KEY: [16, 64], DENSE: [64, 8], GATE: [12, 64], DOWN: [64, 12]}, [16, 64], [16, 64],
    ),
    "pp2 x mp2 x dp2": (
        split(2, 2, 2), {NORM: [64], QUERY: [32, 64], KEY: [8, 64], DENSE: [64, 32], GATE: [48, 64], DOWN: [64, 48]},
        [128, 64], [64, 64],
    ),
    "pp2 x mp2 x dp2, optimizer, sequence": (
        split(2, 2, 2, True, "parallel_config.use_seq_parallel=True", "model.model_config.padded_vocab_size=1024"),
        {NORM: [64], QUERY: [32, 64], KEY: [8, 64], DENSE: [64, 32], GATE: [48, 64], DOWN: [64, 48]},
        [1024 // 4, 64], [1024 // 4, 64],
    ),
    "dp2 x mp4, lora on everything": (
        split(2, 4, 1, False, "model.pet_config.pet_type=lora", "model.pet_config.target_modules=.*"),
        {**BY_FOUR, "self_attention.query_key_value.lora_A.weight": [8, 64],
         "self_attention.query_key_value.lora_B.weight": [96, 8], "self_attention.dense.lora_A.weight": [8, 16],
         "mlp.dense_4h_to_h.lora_A.weight": [8, 24], "mlp.dense_4h_to_h.lora_B.weight": [64, 8]},
        [128, 64], [32, 64],
    ),
    "dp2 x mp4, prefix": (
        split(2, 4, 1, False, "model.pet_config.pet_type=ptuning2", "model.pet_config.prefix_projection=True"),
        BY_FOUR, [128, 64], [32, 64],
    ),
    "dp4 x mp2, dropout": (
        split(4, 2, 1, False, "model.model_config.hidden_dropout=0.1", "model.model_config.attention_dropout=0.1"),
        {NORM: [64], QUERY: [32, 64], KEY: [8, 64], DENSE: [64, 32], GATE: [48, 64], DOWN: [64, 48]},
        [128, 64], [64, 64],
    ),
}  # fmt: skip
EVERY_DAY = ("dp2 x mp4",)


@pytest.mark.parametrize("name", slow_unless(EVERY_DAY, LAYOUTS))
def test_slices_of_every_parameter(name: str, tmp_path: Path) -> None:
    """The script holds each slice to the rules of `glm_ms.parallel.partition`; here they stand as numbers."""
    keys, block, embedding, head = LAYOUTS[name]
    ranks = "0,5" if name in EVERY_DAY else ""
    compile_ranks("rig_step.py", tmp_path / "out", CONFIG, 2, *SMALL, *keys, ranks=ranks)
    stages = 2 if name.startswith("pp2") else 1
    files = sorted((tmp_path / "out").glob("slices_rank_*.json"))
    assert len(files) == (2 if ranks else 8)
    settings = load_settings(CONFIG, [*SMALL, *keys, "model.model_config.num_layers=2"], check_files=False)
    planned = plan_run(settings, 8).stages
    for file in files:
        stage = int(file.stem.rpartition("_")[2]) * stages // 8
        found = json.loads(file.read_text(encoding="utf-8"))
        mine = range(2) if stages == 1 else [stage]
        for layer in mine:
            for ending, shape in block.items():
                assert found[BLOCK.format(layer) + ending] == shape, (file.name, ending)
        assert stored_bytes(found) == (planned[stage].weights, planned[stage].optimizer)
        assert found.get(EMBEDDING) == (embedding if stage == 0 else None)
        assert found.get(HEAD) == (head if stage == stages - 1 else None)


SHARDED_BY_FOUR = split(
    2, 4, 1, True, "model.model_config.padded_vocab_size=1024", "model.model_config.ffn_hidden_size=512"
)
TRAFFIC = {
    "dp8": split(8),
    "dp8, optimizer": split(8, 1, 1, True, "model.model_config.padded_vocab_size=1024"),
    "dp2 x mp4, optimizer": SHARDED_BY_FOUR,
    "without recompute": (*SHARDED_BY_FOUR, "recompute_config.recompute=False"),
    "sums kept": (*SHARDED_BY_FOUR, "recompute_config.mp_comm_recompute=False"),
    "gathered weights kept": (*SHARDED_BY_FOUR, "recompute_config.parallel_optimizer_comm_recompute=False"),
    "sequence, vocabulary": split(
        2, 4, 1, False, "parallel_config.use_seq_parallel=True", "parallel_config.vocab_emb_dp=False"
    ),
    "sequence, without recompute": split(
        2, 4, 1, False, "parallel_config.use_seq_parallel=True", "recompute_config.recompute=False"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAFFIC)
def test_what_is_sent_and_divided(name: str, tmp_path: Path) -> None:
    """The compiled step sends what is planned, but for a few scalars; and the derivative of the loss, which every card
    has, is divided by the cards."""
    compile_ranks(
        "rig_step.py", tmp_path / "out", CONFIG, 2, *SMALL, *TRAFFIC[name], ranks="0", graphs=tmp_path / "graphs"
    )
    keys = [*SMALL, *TRAFFIC[name], "model.model_config.num_layers=2"]
    plan = plan_run(load_settings(CONFIG, keys, check_files=False), 8)
    sent = sent_bytes(tmp_path / "graphs", 8)
    assert 0 <= sum(sent.values()) - sum(plan.sent.values()) < 100
    assert loss_divisors(tmp_path / "graphs") == {8}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_files_compile_at_full_width(path: Path, tmp_path: Path) -> None:
    compile_ranks("rig_step.py", tmp_path / "out", path, 2, "use_parallel=True", ranks="0,7")
    settings = load_settings(path, ["model.model_config.num_layers=2", "use_parallel=True"], check_files=False)
    found = json.loads((tmp_path / "out" / "slices_rank_7.json").read_text(encoding="utf-8"))
    card = plan_run(settings, 8).stages[-1]
    assert stored_bytes(found) == (card.weights, card.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [split(2, 4, 1, True), split(2, 2, 2)], ids=["dp2 x mp4", "pp2 x mp2 x dp2"])
def test_weights_go_through_a_sharded_run(
    keys: tuple[str, ...], tmp_path: Path, vocab_file: Path, adgen_file: Path
) -> None:
    """run_glm.py itself on 8 cards that compute nothing: the slices it loads, saves and resumes from, merged, are the
    weights it began with, bit for bit."""
    weights = write_base(tmp_path / "base")
    line = run_line(tmp_path, vocab_file, adgen_file, keys)
    compile_ranks("rig_run.py", tmp_path / "out", *line)
    if "parallel_config.pipeline_stage=1" in keys:
        # A card has not written its part of the newest: the one before is the newest that all have.
        shutil.rmtree(tmp_path / "run" / "slices" / "rank_3" / "checkpoint" / "step_00000002")
        again = compile_ranks("rig_run.py", tmp_path / "again", *line, "--resume_training", "True", ranks="0")
        assert "1 of 2 steps are done" in again
    merge(tmp_path)
    use("convert_weight.py", "--input", tmp_path / "merged", "--output", tmp_path / "exported")
    with open_checkpoint(tmp_path / "exported") as reader:
        assert sorted(reader.names()) == sorted(weights)
        for name, value in weights.items():
            np.testing.assert_array_equal(reader.read(name), value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "ptuning2"])
def test_adapters_go_through_a_sharded_run(kind: str, tmp_path: Path, vocab_file: Path, adgen_file: Path) -> None:
    """The slices of an adapter, merged, are the adapter that a run on one card begins with, in the same files."""
    weights = write_base(tmp_path / "base")
    pet = [f"model.pet_config.pet_type={kind}", "seed=7"]
    adapter: AdapterConfig = PrefixConfig(16, True)
    if kind == "lora":
        pet += ["model.pet_config.lora_rank=4", "model.pet_config.target_modules=.*"]
        adapter = LoraConfig(4, 32.0, 0.1, ".*")
    else:
        pet += ["model.pet_config.pre_seq_len=16", "model.pet_config.prefix_projection=True"]
    line = run_line(tmp_path, vocab_file, adgen_file, split(2, 4, 1, False, *pet))
    compile_ranks("rig_run.py", tmp_path / "out", *line)
    merge(tmp_path)
    config = GLMConfig.from_pretrained(tmp_path / "base")
    model = GLMForCausalLM.from_parameters(config, weights.items())
    model.add_adapter(adapter, 7)
    (tmp_path / "alone").mkdir()
    model.adapter.save(tmp_path / "alone", str(tmp_path / "base"))
    for file in (tmp_path / "alone").iterdir():
        ours = tmp_path / "merged" / file.name
        if file.suffix == ".safetensors":
            found, known = load_file(ours), load_file(file)
            assert found.keys() == known.keys()
            for name, value in known.items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert json.loads(ours.read_text(encoding="utf-8")) == json.loads(file.read_text(encoding="utf-8"))
    assert read_adapter(tmp_path / "merged").config == read_adapter(tmp_path / "alone").config


def write_base(folder: Path) -> dict[str, np.ndarray]:
    """Random weights of two blocks, and their config, in a folder."""
    config = GLMConfig(**{**TINY, "padded_vocab_size": 65024}, num_layers=2)
    shapes, generator = expected_shapes(config), np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", shapes, "float32", iter(weights.values()), {"format": "np"})
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()), encoding="utf-8")
    return weights


def run_line(folder: Path, vocab_file: Path, adgen_file: Path, keys: tuple[str, ...]) -> tuple[object, ...]:
    """Arguments of run_glm.py for two steps on `folder/base`, each of which is saved, with output in `folder/run`."""
    line = (
        "--config", CONFIG, "--load_checkpoint", folder / "base", "--train_dataset", adgen_file, "--output_dir",
        folder / "run", f"processor.tokenizer.vocab_file={vocab_file}", *SMALL, "runner_config.batch_size=1",
        "model.model_config.padded_vocab_size=65024", "model.model_config.num_layers=2", *keys,
        "runner_config.max_steps=2", "checkpoint.save_steps=1",
    )  # fmt: skip
    return tuple(last_of_each(list(map(str, line))))


def merge(folder: Path) -> None:
    """Merges the slices of `folder/run` into `folder/merged`."""
    use("transform_ckpt.py", "--src_ckpt_strategy", folder / "run" / "strategy", "--src_ckpt_dir",
        folder / "run" / "slices", "--dst_ckpt_dir", folder / "merged", "--prefix", "glm_")  # fmt: skip


def use(tool: str, *arguments: object) -> None:
    """Runs a tool of the repository, which must succeed."""
    line = [sys.executable, REPOSITORY / "tools" / tool, *arguments]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
