"""Reading: precedence, values, notes, datasets, aliases."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glm_ms.launch.processes import usable_cores
from glm_ms.settings import Settings, SettingsError, load_settings


def _write(config: Path, text: str) -> Path:
    config.write_text(config.read_text(encoding="utf-8") + text, encoding="utf-8")
    return config


def test_defaults_where_the_file_is_silent(config: Path) -> None:
    settings = load_settings(config)
    assert settings.runner_config == Settings().runner_config
    assert settings.model.model_config.num_layers == 2
    assert settings.model.model_config.hidden_size == 4096
    assert settings.where("model.model_config.num_layers") == "run.yaml:4"
    assert settings.where("seed") == "run.yaml"


def test_command_line_wins_over_the_file(config: Path) -> None:
    _write(config, "runner_config: {epochs: 3, batch_size: 2}\n")
    assert load_settings(config).runner_config.epochs == 3
    settings = load_settings(config, ["seed=7"], {"epochs": "5", "seed": None})
    assert (settings.runner_config.epochs, settings.runner_config.batch_size, settings.seed) == (5, 2, 7)


def test_of_several_overrides_the_last_counts(config: Path) -> None:
    assert load_settings(config, ["seed=1", "seed=2"]).seed == 2


def test_a_flag_and_a_section_for_one_key(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"runner_config\.epochs is given twice, by --epochs and by"):
        load_settings(config, ["runner_config={epochs: 3}"], {"epochs": "2"})
    assert load_settings(config, ["runner_config={}"], {"epochs": "2"}).runner_config.epochs == 2


def test_evaluation_without_intervals_is_every_100_updates(config: Path) -> None:
    assert load_settings(config, ["do_eval=True"]).eval_step_interval == 100
    for interval in ("eval_step_interval=7", "eval_epoch_interval=2"):
        assert load_settings(config, ["do_eval=True", interval]).eval_step_interval in (7, -1)
    assert load_settings(config).eval_step_interval == -1


def test_flags_may_hold_plain_values(config: Path) -> None:
    settings = load_settings(config, flags={"epochs": 2, "use_parallel": False, "resume_training": True})
    assert settings.runner_config.epochs == 2
    assert settings.resume_training is True


@pytest.mark.parametrize(
    ("run_mode", "key"),
    [("train", "runner_config"), ("finetune", "runner_config"), ("eval", "eval_dataset"), ("predict", None)],
)
def test_batch_size_flag_means_the_run_mode(run_mode: str, key: str | None, config: Path) -> None:
    flags = {"run_mode": run_mode, "batch_size": "5", "predict_data": "hi"}
    settings = load_settings(config, flags=flags)
    assert settings.batch_size() == 5
    section = getattr(settings, key) if key else settings
    assert (section.batch_size if key else section.predict_batch_size) == 5
    untouched = Settings()
    others = {
        "runner_config": (settings.runner_config.batch_size, untouched.runner_config.batch_size),
        "eval_dataset": (settings.eval_dataset.batch_size, untouched.eval_dataset.batch_size),
        None: (settings.predict_batch_size, untouched.predict_batch_size),
    }
    del others[key]
    assert all(now == default for now, default in others.values())


@pytest.mark.parametrize("text", ["5e-5", "5.e-5", "0.00005", "'5e-5'", "+5E-5"])
def test_every_spelling_of_a_small_number(text: str, config: Path) -> None:
    _write(config, f"lr_schedule: {{learning_rate: {text}}}\n")
    assert load_settings(config).lr_schedule.learning_rate == 5e-5
    assert load_settings(config, [f"lr_schedule.learning_rate={text}"]).lr_schedule.learning_rate == 5e-5


def test_one_name_stands_for_a_list_of_one(config: Path) -> None:
    assert load_settings(config, ["metric.type=PerplexityMetric"]).metric.type == ["PerplexityMetric"]
    _write(config, "metric: {type: ADGENMetric}\n")
    assert load_settings(config).metric.type == ["ADGENMetric"]


@pytest.mark.parametrize("text", ["null", "None", "~", ""])
def test_null_for_keys_that_may_be_empty(text: str, config: Path) -> None:
    _write(config, f"checkpoint: {{save_steps: {text}}}\n")
    assert load_settings(config).checkpoint.save_steps is None


@pytest.mark.parametrize("text", ["null", "None", "none", "''", "False", "0"])
def test_every_spelling_of_none(text: str, config: Path) -> None:
    adapter = f"model:\n  pet_config: {{pet_type: {text}, pre_seq_len: {text}}}\n"
    start = config.read_text(encoding="utf-8").replace("model:\n", adapter)
    more = f"context: {{max_device_memory: {text}}}\nresume_training: {text}\nload_adapter: {text}\n"
    config.write_text(start + more, encoding="utf-8")
    settings = load_settings(config)
    assert settings.model.pet_config == Settings().model.pet_config
    assert settings.context.max_device_memory is None
    assert settings.resume_training is False
    assert settings.load_adapter == ""


def test_a_typed_zero_is_a_path(config: Path) -> None:
    Path("0").mkdir()
    assert load_settings(config, flags={"load_checkpoint": "0"}).load_checkpoint == "0"
    for none in ("", "None", "False"):
        assert load_settings(config, flags={"load_checkpoint": none}).load_checkpoint == ""


@pytest.mark.parametrize("text", ["", "None", "null", "''"])
def test_empty_section_and_empty_text(text: str, config: Path) -> None:
    _write(config, f"optimizer: {text}\nload_checkpoint:\n")
    settings = load_settings(config)
    assert settings.optimizer == Settings().optimizer
    assert settings.load_checkpoint == ""


def test_override_of_a_section_changes_only_what_it_names(config: Path) -> None:
    settings = load_settings(config, ["train_dataset={max_source_length: 100, max_target_length: 91}"])
    assert settings.train_dataset.max_source_length == 100
    assert settings.train_dataset.data_loader.dataset_dir == "data/train.json"


def test_override_behind_an_alias_changes_one_section_only(config: Path) -> None:
    text = config.read_text(encoding="utf-8").split("train_dataset:")[0]
    shared = "  data_loader: {dataset_dir: data/train.json, shuffle: False}\n"
    config.write_text(f"{text}train_dataset: &data\n{shared}eval_dataset: *data\n", encoding="utf-8")
    settings = load_settings(config, flags={"eval_dataset": "data/dev.json"})
    assert settings.train_dataset.data_loader.dataset_dir == "data/train.json"
    assert settings.eval_dataset.data_loader.dataset_dir == "data/dev.json"


def test_merge_key(config: Path) -> None:
    text = config.read_text(encoding="utf-8").split("train_dataset:")[0]
    text += "train_dataset: &data\n  data_loader: {dataset_dir: data/train.json, shuffle: False}\n"
    config.write_text(text + "eval_dataset:\n  <<: *data\n  batch_size: 3\n", encoding="utf-8")
    settings = load_settings(config)
    assert settings.eval_dataset.data_loader.dataset_dir == "data/train.json"
    assert settings.eval_dataset.batch_size == 3


def test_byte_order_mark(config: Path) -> None:
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert load_settings(config) == load_settings(config)


def test_too_many_workers_are_lowered_with_a_note(config: Path) -> None:
    settings = load_settings(config, ["train_dataset.num_parallel_workers=4096"])
    assert settings.train_dataset.num_parallel_workers == usable_cores() <= os.cpu_count()
    assert [note for note in settings.notes if "4096" in note and "num_parallel_workers" in note]
    assert not [note for note in load_settings(config).notes if "num_parallel_workers" in note]


def test_a_folder_of_records_offers_the_right_part(config: Path) -> None:
    settings = load_settings(config, flags={"train_dataset": "data"})
    assert settings.train_dataset.data_loader.dataset_dir == "data/train.json"
    assert any("data/train.json" in note for note in settings.notes)
    settings = load_settings(config, flags={"eval_dataset": "data", "run_mode": "eval"})
    assert settings.eval_dataset.data_loader.dataset_dir == "data/dev.json"


def test_a_folder_with_one_file_of_records(config: Path) -> None:
    Path("single").mkdir()
    Path("single/records.jsonl").write_text("{}\n", encoding="utf-8")
    settings = load_settings(config, flags={"train_dataset": "single"})
    assert settings.train_dataset.data_loader.dataset_dir == "single/records.jsonl"


def test_a_folder_with_files_of_other_names_is_ambiguous(config: Path) -> None:
    Path("data/train.json").rename("data/a.json")
    Path("data/dev.json").rename("data/b.json")
    with pytest.raises(SettingsError, match=r"which file is meant.*a\.json, b\.json"):
        load_settings(config, flags={"train_dataset": "data"})


def test_where_random_weights_are_allowed(config: Path) -> None:
    assert any("weights are random" in note for note in load_settings(config).notes)
    load_settings(config, ["model.init=checkpoint"], {"run_mode": "train"})
    load_settings(config, ["model.init=checkpoint"], {"resume_training": "True"})
    load_settings(config, [], {"run_mode": "eval"})
    for run_mode in ("finetune", "eval", "predict"):
        with pytest.raises(SettingsError, match="load_checkpoint: missing"):
            load_settings(config, ["model.init=checkpoint", "predict_data=x"], {"run_mode": run_mode})


def test_files_are_judged_for_the_run_mode_only(config: Path) -> None:
    Path("data/dev.json").unlink()
    load_settings(config)
    load_settings(config, ["predict_data=x"], {"run_mode": "predict"})
    with pytest.raises(SettingsError, match=r"eval_dataset\.data_loader\.dataset_dir"):
        load_settings(config, flags={"run_mode": "eval"})
    load_settings(config, flags={"run_mode": "eval"}, check_files=False)


def test_all_problems_are_reported_together(config: Path) -> None:
    _write(config, "runner_config: {epoch: 3, batch_size: two}\nseed: -1\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(config, ["optimizer.eps=0", "nonsense"], {"train_dataset": "gone.json"})
    assert len(caught.value.problems) == 6
    assert "\n".join(map(str, caught.value.problems)) == str(caught.value)
    for part in ("epoch: unknown", "'two'", "seed", "eps", "'nonsense'", "gone.json"):
        assert sum(part in str(problem) for problem in caught.value.problems) == 1


def test_what_follows_from_a_reported_problem_is_not_reported_again(config: Path) -> None:
    text = config.read_text(encoding="utf-8").replace("vocab_file", "vocab_fil")
    config.write_text(text.replace("seq_length: 192", "seq_length: long"), encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(config)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        (
            200,
            [
                "seq_length: 200 must equal",
                "64 + 127 + 1 = 192",
                "seq_length to 192",
                "max_target_length to 135",
            ],
        ),
        (60, ["64 + 127 + 1 = 192", "seq_length to 192"]),
    ],
)
def test_row_length_and_network(length: int, parts: list[str], config: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, [f"model.model_config.seq_length={length}", "generation.max_new_tokens=8"])
    assert all(part in str(caught.value) for part in parts)
    assert ("max_target_length to" in str(caught.value)) == (length > 65)


def test_shared_aliases_do_not_multiply(config: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
    _write(config, f"l0: &l0 [x]\n{levels}")
    with pytest.raises(SettingsError, match="l11: unknown key"):
        load_settings(config)


def test_sampling_keys_in_greedy_decoding_are_told(config: Path) -> None:
    settings = load_settings(config, ["generation.top_p=3", "generation.top_k=5", "generation.temperature=1"])
    assert settings.generation.top_p == 1.0
    notes = [note for note in settings.notes if "no effect with do_sample: False" in note]
    assert len(notes) == 2
    assert "command line (generation.top_p=3): generation.top_p: 3 (int)" in notes[0] + notes[1]
    with pytest.raises(SettingsError, match=r"top_p: found 3\.0, must be above 0 and at most 1"):
        load_settings(config, ["generation.top_p=3", "generation.do_sample=True"])
    with pytest.raises(SettingsError, match="do_sample"):  # only its own problem
        load_settings(config, ["generation.top_p=3", "generation.do_sample=maybe"])
