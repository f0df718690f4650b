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


def _header(path: Path) -> list[str]:
    """The lines of the comment at the top, without their marks."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    return [line.removeprefix("#") for line in header]


def _commands(path: Path) -> list[list[str]]:
    """Commands of the header, which are indented and may be continued, as tokens."""
    text = "\n".join(_header(path)).replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^   ((?:python|msrun) .*)$", text, re.MULTILINE)]


def _variations(path: Path) -> list[list[str]]:
    """What the header proposes to add to the command: indented flags, or flags after a colon."""
    lines, found = _header(path), []
    while lines:
        line = lines.pop(0)
        if line.startswith("   --") or ": --" in line:
            while lines and lines[0].startswith("   "):
                line += lines.pop(0)
            found.append(line.partition(": ")[2] or line)
    return [shlex.split(text) for text in found if " TEXT, " not in text]


def test_the_runs_of_the_field_are_there() -> None:
    names = set()
    for glm in ("glm2", "glm3"):
        for device in ("800_32G", "800T_A2_64G"):
            names.add(f"{glm}/predict_{glm}_6b_{device}.yaml")
            names.add(f"{glm}/run_{glm}_6b_finetune_eval_{device}.yaml")
            for method in ("finetune", "lora", "ptuning2"):
                for length in ("", "_2k"):
                    names.add(f"{glm}/run_{glm}_6b_{method}{length}_{device}.yaml")
        for method in ("finetune", "lora", "ptuning2"):
            names.add(f"{glm}/run_{glm}_6b_{method}_eval.yaml")
        for run in ("finetune", "eval", "predict", "lora", "lora_eval", "ptuning2", "ptuning2_eval"):
            names.add(f"tiny/{run}_{glm}_tiny.yaml")
    for device in ("800_32G", "800T_A2_64G"):
        names.add(f"glm3/run_glm3_6b_multiturn_finetune_{device}.yaml")
    names.add("tiny/multiturn_glm3_tiny.yaml")
    # Names of MindFormers' model cards.
    names |= {"glm2/run_glm2_6b.yaml", "glm2/predict_glm2_6b.yaml", "glm2/run_glm2_6b_ptuning2.yaml"}
    names |= {"glm3/run_glm3_6b.yaml", "glm3/predict_glm3_6b.yaml"}
    names |= {"glm2/export_glm2_6b.yaml", "glm3/export_glm3_6b.yaml"}
    assert names == {_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_keys_are_known_and_a_network_can_be_described(path: Path) -> None:
    settings = _load(path)
    resolve_vocab_size(settings, 1007 if path in TINY else 64798)
    assert settings.glm_config().seq_length == settings.model.model_config.seq_length
    assert settings.processor.tokenizer.type == f"ChatGLM{_generation(path)}Tokenizer"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_run_mode_fits(path: Path) -> None:
    """A file may be used with another --run_mode; lengths must not stand in the way."""
    settings = _load(path)
    adapter = {"load_adapter": "adapter"} if settings.model.pet_config.pet_type else {}
    # Weights that are split over cards can be trained only.
    sharded = settings.parallel.parallel_mode == 1
    for run_mode in {settings.run_mode, "predict"}:
        flags = {"run_mode": run_mode, **adapter}
        if sharded and run_mode != settings.run_mode:
            flags["use_parallel"] = False
        load_settings(path, ["predict_data=x"], flags, check_files=False)
    if settings.run_mode == "finetune" and not path.name.startswith("run_glm3_6b_multiturn"):
        flags = {"run_mode": "eval", **adapter, **({"use_parallel": False} if sharded else {})}
        load_settings(path, flags=flags, check_files=False)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_header_commands_name_the_file_and_are_understood(path: Path) -> None:
    commands = [tokens for tokens in _commands(path) if "run_glm.py" in tokens]
    assert commands
    for tokens in commands:
        arguments = parse_args(tokens[tokens.index("run_glm.py") + 1 :])
        assert arguments.config == f"configs/{_name(path)}"
        settings = load_settings(path, arguments.overrides, arguments.flags, check_files=False)
        assert settings.use_parallel == (tokens[0] == "msrun")
        if settings.use_parallel:
            split = settings.parallel_config
            cards = split.data_parallel * split.model_parallel * split.pipeline_stage
            assert tokens[tokens.index("--worker_num") + 1] == str(cards) == "8"
            assert tokens[tokens.index("--log_dir") + 1] == f"{settings.output_dir}/msrun"


def test_variations_are_found() -> None:
    assert len(_variations(CONFIGS / "glm2" / "run_glm2_6b_lora_eval.yaml")) == 3
    assert len(_variations(CONFIGS / "glm2" / "run_glm2_6b_finetune_eval.yaml")) == 1
    assert len(_variations(CONFIGS / "tiny" / "eval_glm3_tiny.yaml")) == 1
    assert len(_variations(CONFIGS / "tiny" / "predict_glm3_tiny.yaml")) == 1
    [tokens] = _variations(CONFIGS / "tiny" / "multiturn_glm3_tiny.yaml")
    assert tokens[0] == "--run_mode"
    assert tokens[-1] == "metric.type=ADGENMetric"
    assert len(_variations(CONFIGS / "glm3" / "run_glm3_6b_multiturn_finetune_800_32G.yaml")) == 1


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_variations_of_the_header_command_are_understood(path: Path) -> None:
    for tokens in _variations(path):
        other = re.search(r"\b(\S+\.yaml) with$", "\n".join(_header(path)), re.MULTILINE)
        file = path.with_name(other[1]) if other else path
        arguments = parse_args(["--config", str(file), *tokens])
        load_settings(file, arguments.overrides, arguments.flags, check_files=False)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_that_the_header_names_exist(path: Path, repository: Path) -> None:
    text = "\n".join(_header(path))
    for name in re.findall(r"\b[\w/]+\.yaml\b", text):
        assert (repository / name).is_file() or path.with_name(name).is_file(), name
    for name in re.findall(r"\btools/\w+\.py\b", text):
        assert (repository / name).is_file(), name


@pytest.mark.parametrize("path", REAL, ids=_name)
def test_real_sizes(path: Path) -> None:
    settings = _load(path)
    config = settings.glm_config().to_dict()
    assert {name: config[name] for name in SIZES_6B} == SIZES_6B
    assert settings.context.device_target == "Ascend"
    if settings.run_mode == "finetune":
        long = "_2k_" in path.name or "multiturn" in path.name
        assert config["seq_length"] == (2048 if long else 192)
    types = {config["compute_dtype"], config["param_init_type"]}
    if not path.name.endswith("64G.yaml"):  # Ascend 910A has no bfloat16
        # Weights that are trained are float32.
        assert types == ({"float16", "float32"} if settings.parallel.parallel_mode == 1 else {"float16"})
        assert settings.context.max_device_memory == "30GB"
    else:
        assert config["compute_dtype"] == "bfloat16"
        assert settings.context.max_device_memory == "58GB"


@pytest.mark.parametrize("path", REAL, ids=_name)
def test_float16_is_trained_with_a_loss_scale_and_nothing_else_is(path: Path) -> None:
    settings = _load(path)
    if settings.run_mode == "finetune":
        scaled = settings.runner_wrapper.scale_sense.type == "DynamicLossScaleUpdateCell"
        assert scaled == (settings.model.model_config.compute_dtype == "float16")
        assert scaled or settings.runner_wrapper.scale_sense.type is None


@pytest.mark.parametrize("glm", ["glm2", "glm3"])
@pytest.mark.parametrize("method", ["lora", "ptuning2"])
@pytest.mark.parametrize("end", ["800_32G", "800T_A2_64G", "2k_800_32G", "2k_800T_A2_64G"])
def test_adapters_fit_a_card_without_sharding(glm: str, method: str, end: str) -> None:
    path = CONFIGS / glm / f"run_{glm}_6b_{method}_{end}.yaml"
    settings = _load(path)
    pet, network = settings.model.pet_config, settings.model.model_config
    assert pet.pet_type == method
    assert settings.parallel.parallel_mode == 0
    assert network.param_init_type == network.compute_dtype  # frozen: no update can be lost in it
    assert settings.do_eval
    assert settings.metric.type == ["PerplexityMetric"]
    assert settings.checkpoint.best_metric == "perplexity"
    groups = network.multi_query_group_num * network.kv_channels
    if method == "lora":
        trained = pet.lora_rank * (2 * network.hidden_size + 2 * groups) * network.num_layers
    else:
        trained = pet.pre_seq_len * 2 * network.num_layers * groups
    assert f"{trained / 1e6:.2f} million" in "\n".join(_header(path))


@pytest.mark.parametrize("glm", ["glm2", "glm3"])
@pytest.mark.parametrize("method", ["finetune", "lora", "ptuning2"])
def test_evaluation_reads_what_the_training_wrote(glm: str, method: str) -> None:
    evaluated = _load(CONFIGS / glm / f"run_{glm}_6b_{method}_eval.yaml")
    for end in ("800_32G", "800T_A2_64G"):
        tuned = _load(CONFIGS / glm / f"run_{glm}_6b_{method}_{end}.yaml")
        if method == "finetune":
            assert evaluated.load_checkpoint == tuned.output_dir
        else:
            assert evaluated.load_checkpoint == tuned.load_checkpoint  # the base
            assert evaluated.load_adapter == tuned.output_dir
        assert evaluated.processor == tuned.processor
        assert evaluated.eval_dataset.max_source_length == tuned.train_dataset.max_source_length
        assert evaluated.eval_dataset.max_target_length == tuned.train_dataset.max_target_length


@pytest.mark.parametrize("path", TINY, ids=_name)
def test_tiny_runs_on_a_cpu_with_the_sample(path: Path, repository: Path) -> None:
    settings = _load(path)
    assert settings.context.device_target == "CPU"
    assert settings.model.model_config.padded_vocab_size == "auto"
    parts = {"finetune": ["train", "eval"], "eval": ["eval"], "predict": []}[settings.run_mode]
    for part in parts:
        assert (repository / getattr(settings, f"{part}_dataset").data_loader.dataset_dir).is_file()
    generation = _generation(path)
    if path.name.startswith("finetune"):
        assert settings.model.init == "random"
    else:  # it begins with what finetune wrote
        assert settings.load_checkpoint == f"./output/tiny/glm{generation}_finetune"


@pytest.mark.parametrize("glm", ["glm2", "glm3"])
def test_tiny_runs_read_what_others_wrote(glm: str) -> None:
    runs = ("finetune", "eval", "predict", "lora", "lora_eval", "ptuning2", "ptuning2_eval")
    found = {run: _load(CONFIGS / "tiny" / f"{run}_{glm}_tiny.yaml") for run in runs}
    tuned = found.pop("finetune")
    for later in found.values():
        assert later.load_checkpoint == tuned.output_dir
        assert later.model.model_config == tuned.model.model_config
        assert later.processor == tuned.processor
    for run in ("eval", "predict", "lora_eval", "ptuning2_eval"):
        assert found[run].generation.max_new_tokens == tuned.generation.max_new_tokens
    for method in ("lora", "ptuning2"):
        trained, evaluated = found[method], found[f"{method}_eval"]
        assert trained.model.pet_config.pet_type == method
        assert evaluated.load_adapter == trained.output_dir
        assert evaluated.eval_dataset.data_loader == trained.eval_dataset.data_loader
    outputs = [run.output_dir for run in (tuned, *found.values())]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_effective_settings_load_again(path: Path, tmp_path: Path) -> None:
    settings = _load(path)
    written = tmp_path / "effective.yaml"
    written.write_text(settings.to_yaml(), encoding="utf-8")
    assert load_settings(written, check_files=False) == settings
    assert yaml.safe_load(settings.to_yaml()) == settings.to_dict()
