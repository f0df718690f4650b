"""Every YAML under configs: all keys are known, the values fit, the header's command works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from glm_ms.settings import load_settings, parse_args, resolve_vocab_size
from glm_ms.settings.schema import Settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
REAL = [path for path in FILES if path.parent.name in ("glm2", "glm3")]
TINY = [path for path in FILES if path.parent.name == "tiny"]
SIZES_6B = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
}


def _name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def _load(path: Path) -> Settings:
    return load_settings(path, check_files=False)


def _generation(path: Path) -> str:
    return re.search(r"glm([23])", path.name).group(1)


def test_the_runs_of_the_field_are_there() -> None:
    names = {_name(path) for path in FILES}
    for glm in ("glm2", "glm3"):
        for device in ("800_32G", "800T_A2_64G"):
            for run in (
                "run_{}_6b_finetune",
                "run_{}_6b_finetune_2k",
                "run_{}_6b_finetune_eval",
                "predict_{}_6b",
            ):
                assert f"{glm}/{run.format(glm)}_{device}.yaml" in names
        for run in ("finetune", "eval", "predict"):
            assert f"tiny/{run}_{glm}_tiny.yaml" in names


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_keys_are_known_and_a_network_can_be_described(path: Path) -> None:
    settings = _load(path)
    resolve_vocab_size(settings, 1007 if path in TINY else 64798)
    assert settings.glm_config().seq_length == settings.model.model_config.seq_length
    assert settings.processor.tokenizer.type == f"ChatGLM{_generation(path)}Tokenizer"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_run_mode_fits(path: Path) -> None:
    """A file may be used with another --run_mode; lengths must not stand in the way."""
    own = _load(path).run_mode
    for run_mode in {own, "predict"}:
        load_settings(path, ["predict_data=x"], {"run_mode": run_mode}, check_files=False)
    if own == "finetune":
        load_settings(path, flags={"run_mode": "eval"}, check_files=False)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_header_command_names_the_file_and_is_understood(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    command = re.search(r"#   (?:python|msrun) .*?(?:[^\\]\n#|[^\\]$)", header, re.DOTALL).group()
    tokens = shlex.split(re.sub(r"\\\n", "", command).replace("#", " "))
    arguments = parse_args(tokens[tokens.index("run_glm.py") + 1 :])
    assert arguments.config == f"configs/{_name(path)}"
    settings = load_settings(path, arguments.overrides, arguments.flags, check_files=False)
    assert settings.use_parallel == (tokens[0] == "msrun")
    if settings.use_parallel:
        split = settings.parallel_config
        cards = split.data_parallel * split.model_parallel * split.pipeline_stage
        assert tokens[tokens.index("--worker_num") + 1] == str(cards) == "8"


@pytest.mark.parametrize("path", REAL, ids=_name)
def test_real_sizes(path: Path) -> None:
    settings = _load(path)
    config = settings.glm_config().to_dict()
    assert {name: config[name] for name in SIZES_6B} == SIZES_6B
    assert settings.context.device_target == "Ascend"
    if settings.run_mode == "finetune":
        assert config["seq_length"] == (2048 if "_2k_" in path.name else 192)
    types = {config["compute_dtype"], config["param_init_type"]}
    if path.name.endswith("800_32G.yaml"):  # Ascend 910A has no bfloat16
        assert types == {"float16"}
        assert settings.context.max_device_memory == "30GB"
    else:
        assert config["compute_dtype"] == "bfloat16"
        assert settings.context.max_device_memory == "58GB"


@pytest.mark.parametrize("path", TINY, ids=_name)
def test_tiny_runs_on_a_cpu_with_the_sample(path: Path, repository: Path) -> None:
    settings = _load(path)
    assert settings.context.device_target == "CPU"
    assert settings.model.model_config.padded_vocab_size == "auto"
    parts = {"finetune": ["train", "eval"], "eval": ["eval"], "predict": []}[settings.run_mode]
    for part in parts:
        assert (repository / getattr(settings, f"{part}_dataset").data_loader.dataset_dir).is_file()
    if settings.run_mode == "finetune":
        assert settings.model.init == "random"


@pytest.mark.parametrize("glm", ["glm2", "glm3"])
def test_tiny_eval_and_predict_read_what_finetune_wrote(glm: str) -> None:
    tuned, evaluated, predicted = (
        _load(CONFIGS / "tiny" / f"{run}_{glm}_tiny.yaml") for run in ("finetune", "eval", "predict")
    )
    for later in (evaluated, predicted):
        assert later.load_checkpoint == tuned.output_dir
        assert later.model.model_config == tuned.model.model_config
        assert later.processor == tuned.processor
        assert later.generation.max_new_tokens == tuned.generation.max_new_tokens


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_effective_settings_load_again(path: Path, tmp_path: Path) -> None:
    settings = _load(path)
    written = tmp_path / "effective.yaml"
    written.write_text(settings.to_yaml(), encoding="utf-8")
    assert load_settings(written, check_files=False) == settings
    assert yaml.safe_load(settings.to_yaml()) == settings.to_dict()
