"""What the machine has against what the settings ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import Settings, SettingsError, ascend_cards, load_settings, machine, machine_problems

REPOSITORY = Path(__file__).resolve().parents[2]
MSRUN = {"MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "8118", "MS_WORKER_NUM": "8"}
TABLE = {"RANK_TABLE_FILE": "hccl.json", "RANK_SIZE": "4", "RANK_ID": "0", "DEVICE_ID": "0"}
ASCEND = "context.device_target=Ascend"


def check_machine(settings: Settings, dev: Path, environment: dict[str, str]) -> None:
    problems = machine_problems(settings, dev, environment)
    if problems:
        raise SettingsError(problems)


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """A /dev of a machine with two cards, 0 and 1."""
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in ("davinci1", "davinci0", "davinci_manager", "null"):
        (folder / name).touch()
    return folder


@pytest.fixture
def no_cards(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_cards_are_found_by_their_device_files(cards: Path, no_cards: Path) -> None:
    assert ascend_cards(cards) == ["davinci0", "davinci1"]
    assert ascend_cards(no_cards) == []
    assert ascend_cards(no_cards / "absent") == []


def test_ascend_without_a_card_names_the_way_to_a_cpu(config: Path, no_cards: Path) -> None:
    settings = load_settings(config, flags={"device_target": "Ascend"})
    with pytest.raises(SettingsError) as caught:
        check_machine(settings, no_cards, {})
    for part in ("command line (--device_target Ascend)", "context.device_target", "--device_target CPU"):
        assert part in str(caught.value)
    with pytest.raises(SettingsError, match="software is installed"):
        check_machine(settings, no_cards, {"ASCEND_HOME_PATH": "/usr/local/Ascend"})
    check_machine(settings, no_cards, {"MS_SIMULATION_LEVEL": "0"})


def test_ascend_with_cards_keeps_types(config: Path, cards: Path) -> None:
    settings = load_settings(config, [ASCEND, "model.model_config.compute_dtype=bfloat16", "context.device_id=1"])
    notes = list(settings.notes)
    check_machine(settings, cards, {})
    assert settings.model.model_config.compute_dtype == "bfloat16"
    assert settings.notes == notes


def test_card_that_is_not_there(config: Path, cards: Path) -> None:
    settings = load_settings(config, [ASCEND, "context.device_id=5"])
    with pytest.raises(SettingsError, match=r"device_id: 5, but the cards here are davinci0, davinci1"):
        check_machine(settings, cards, {})


@pytest.mark.parametrize(("dtype", "kernels"), [("float16", True), ("bfloat16", False)])
def test_half_types_become_float32_on_a_cpu(
    dtype: str, kernels: bool, config: Path, no_cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_blas", lambda: kernels)
    overrides = [f"model.model_config.{name}={dtype}" for name in ("param_init_type", "compute_dtype")]
    settings = load_settings(config, overrides)
    before = len(settings.notes)
    check_machine(settings, no_cards, {})
    assert settings.model.model_config.param_init_type == "float32"
    assert settings.model.model_config.compute_dtype == "float32"
    assert len(settings.notes) == before + 2
    assert dtype in settings.notes[before]


@pytest.mark.parametrize(
    ("mode", "kernels", "stored"),
    [
        (["run_mode=predict", "predict_data=x"], True, "float16"),
        (["run_mode=predict", "predict_data=x"], False, "float32"),
        (["run_mode=export", "load_checkpoint=data"], True, "float32"),
    ],
)
def test_half_weights_keep_their_type_where_the_kernels_read_them(
    mode: list[str], kernels: bool, stored: str, config: Path, no_cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.library, "load", lambda: object() if kernels else None)
    overrides = [f"model.model_config.{name}=float16" for name in ("param_init_type", "compute_dtype")]
    settings = load_settings(config, [*overrides, *mode])
    check_machine(settings, no_cards, {})
    assert settings.model.model_config.param_init_type == stored
    assert settings.model.model_config.compute_dtype == "float32"


@pytest.mark.parametrize("native", [True, False])
def test_training_on_a_cpu_keeps_bfloat16_for_products(
    native: bool, config: Path, no_cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_blas", lambda: True)
    monkeypatch.setattr(machine, "has_native_bfloat16", lambda: native)
    bfloat16 = "model.model_config.compute_dtype=bfloat16"
    settings = load_settings(config, [bfloat16, "model.model_config.padded_vocab_size=100"])
    before = len(settings.notes)
    check_machine(settings, no_cards, {})
    assert settings.model.model_config.compute_dtype == "bfloat16"
    assert settings.glm_config().compute_dtype == "float32"  # of everything but the products
    assert ["no instructions for bfloat16" in note for note in settings.notes[before:]] == [True] * (not native)
    predicting = load_settings(config, [bfloat16, "run_mode=predict", "predict_data=x"])
    check_machine(predicting, no_cards, {})
    assert predicting.model.model_config.compute_dtype == "float32"


SHARDED = ["use_parallel=True", "parallel.parallel_mode=1", "parallel.full_batch=True"]


def test_sharding_needs_cards(config: Path, no_cards: Path) -> None:
    settings = load_settings(config, [*SHARDED, "parallel_config.data_parallel=8"])
    with pytest.raises(SettingsError, match=r"parallel_mode: 1: .*a CPU has no sharding strategies"):
        check_machine(settings, no_cards, MSRUN)


def test_sharding_needs_as_many_processes(config: Path, cards: Path) -> None:
    ways = ["parallel_config.data_parallel=2", "parallel_config.model_parallel=2"]
    settings = load_settings(config, [*SHARDED, *ways, ASCEND])
    with pytest.raises(SettingsError, match=r"2 x 2 x 1 = 4, but 8 processes were started"):
        check_machine(settings, cards, MSRUN)
    check_machine(settings, cards, {**MSRUN, "MS_WORKER_NUM": "4"})
    check_machine(settings, cards, TABLE)
    check_machine(settings, cards, {"MS_SIMULATION_LEVEL": "1", "RANK_SIZE": "4", "RANK_ID": "2"})


def test_parallel_needs_processes(config: Path, no_cards: Path) -> None:
    settings = load_settings(config, ["use_parallel=True"])
    with pytest.raises(SettingsError, match=r"use_parallel: True.*msrun --worker_num"):
        check_machine(settings, no_cards, {})
    check_machine(settings, no_cards, MSRUN)
    for environment in ({"MS_WORKER_NUM": "2"}, {"RANK_SIZE": "2", "RANK_ID": "0"}, TABLE, {**MSRUN, "MS_ROLE": ""}):
        with pytest.raises(SettingsError, match=r"use_parallel: True.*not a rank of msrun.* unset ") as caught:
            check_machine(settings, no_cards, environment)
        assert all(f"{name}={value}" in str(caught.value) for name, value in environment.items())
        assert ("a CPU uses no rank table" in str(caught.value)) == (environment is TABLE)


def test_processes_need_parallel(config: Path, no_cards: Path) -> None:
    settings = load_settings(config)
    with pytest.raises(SettingsError, match=r"8 processes were started.*--use_parallel True"):
        check_machine(settings, no_cards, MSRUN)
    with pytest.raises(SettingsError, match=r"RANK_ID=1, RANK_SIZE=8 in the environment.*unset RANK_ID RANK_SIZE"):
        check_machine(settings, no_cards, {"RANK_SIZE": "8", "RANK_ID": "1"})
    check_machine(settings, no_cards, {"MS_WORKER_NUM": "1"})


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"DEVICE_ID": ""}, "DEVICE_ID=: empty; remove it: unset DEVICE_ID"),
        ({"DEVICE_ID": "abc"}, "DEVICE_ID=abc: not a whole number"),
        ({"RANK_SIZE": "eight"}, "RANK_SIZE=eight: not a whole number"),
        ({"RANK_ID": "x"}, "RANK_ID=x: not a whole number"),
        ({"LOCAL_RANK_SIZE": "x"}, "LOCAL_RANK_SIZE=x: not a whole number"),
        ({"MS_WORKER_NUM": "-1"}, "MS_WORKER_NUM=-1: not a whole number"),
        ({"RANK_ID": "8", "RANK_SIZE": "8"}, "RANK_ID=8, but RANK_SIZE=8"),
        ({**MSRUN, "RANK_SIZE": "4"}, "the numbers of processes differ: "),
    ],
)
@pytest.mark.parametrize("parallel", ["True", "False"])
def test_variables_that_nobody_could_use(environment: dict, part: str, parallel: str, config: Path, no_cards) -> None:
    (problem,) = machine_problems(load_settings(config, [f"use_parallel={parallel}"]), no_cards, environment)
    assert part in str(problem)
    assert "unset" in str(problem)


PREDICT = ["run_mode=predict", "predict_data=x"]
SCALED = "runner_wrapper.scale_sense.type=DynamicLossScaleUpdateCell"
LORA = ["model.pet_config.pet_type=lora", "load_checkpoint=data"]


@pytest.mark.parametrize(
    ("key", "message", "remedy"),
    [
        ("param_init_type", "float16: not supported.*=float32", LORA),  # trained are the adapters then
        (
            "compute_dtype",
            "float16: small gradients become zero.*scale_sense.type=DynamicLossScale",
            [SCALED],
        ),
    ],
)
def test_float16_training_on_ascend_has_its_conditions(
    key: str, message: str, remedy: list[str], config: Path, cards: Path
) -> None:
    float16 = f"model.model_config.{key}=float16"
    with pytest.raises(SettingsError, match=rf"model_config.{key}: {message}"):
        check_machine(load_settings(config, [ASCEND, float16]), cards, {})
    for more in (PREDICT, remedy):
        settings = load_settings(config, [ASCEND, float16, *more])
        check_machine(settings, cards, {})
        assert getattr(settings.model.model_config, key) == "float16"


@pytest.mark.parametrize(("environment", "alone"), [({}, True), ({"MS_WORKER_NUM": "2"}, False)])
def test_way_to_the_cpu_fits_the_start(environment: dict[str, str], alone: bool, tmp_path: Path) -> None:
    settings = load_settings(REPOSITORY / "configs" / "glm3" / "run_glm3_6b_lora_800_32G.yaml", check_files=False)
    (problem,) = machine_problems(settings, tmp_path, environment)
    assert str(problem).endswith("--device_target CPU" + (" --use_parallel False" if alone else ""))
