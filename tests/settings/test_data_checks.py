"""Keys of the data loaders: what fits together, what has no effect, what `null` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import SettingsError, load_settings
from glm_ms.settings.schema import parts_in_use

TOOLS = "train_dataset.data_loader.type=ToolAlpacaDataLoader"
CHAT = "train_dataset.data_loader.type=ConversationDataLoader"
EVAL_TOOLS = "eval_dataset.data_loader.type=ToolAlpacaDataLoader"
GLM2 = "processor.tokenizer.type=ChatGLM2Tokenizer"


def test_no_max_seq_length_means_that_of_the_network(config: Path) -> None:
    settings = load_settings(config, [TOOLS, EVAL_TOOLS, "model.model_config.seq_length=300"])
    assert settings.train_dataset.max_seq_length == settings.eval_dataset.max_seq_length == 300
    assert load_settings(config).train_dataset.max_seq_length is None
    # The lengths of other loaders do not enter.
    assert not settings.notes or all("no effect" not in note for note in settings.notes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([TOOLS, GLM2], "ToolAlpacaDataLoader needs processor.tokenizer.type: ChatGLM3Tokenizer, found ChatGLM2"),
        ([CHAT, GLM2], "train_dataset.data_loader.type: ConversationDataLoader needs"),
        (["run_mode=eval", EVAL_TOOLS, GLM2], "eval_dataset.data_loader.type: ToolAlpacaDataLoader needs"),
        ([TOOLS, "train_dataset.max_seq_length=100"], "100 must equal model.model_config.seq_length = 192"),
        ([TOOLS, "train_dataset.max_seq_length=200"], "200 must equal model.model_config.seq_length = 192"),
        ([TOOLS, "train_dataset.max_seq_length=2"], "found 2, must be at least 4"),
        ([CHAT, "train_dataset.max_seq_length=192"], "max_seq_length: has no effect with ConversationDataLoader"),
        (["train_dataset.max_seq_length=192"], "max_seq_length: has no effect with ADGenDataLoader"),
        ([CHAT, "train_dataset.max_target_length=100"], "192 must equal train_dataset.max_source_length"),
        (["train_dataset.ignore_pad_token_for_loss=False"], "False is not possible with ADGenDataLoader and ChatGLM3"),
        (["run_mode=eval", EVAL_TOOLS, "eval_dataset.max_seq_length=193"], "193 is more than model.model_config"),
        (
            ["run_mode=eval", EVAL_TOOLS, "eval_dataset.max_seq_length=128"],
            "generation.max_new_tokens: 128 leaves no room for a prompt within eval_dataset.max_seq_length = 128; "
            "lower it to at most 124",
        ),
        (["train_dataset.cache_dir=data/train.json"], "cache_dir: data/train.json is a file; give a folder"),
        (["train_dataset.cache_dir=data/train.json/x"], "cache_dir: data/train.json is a file; give a folder"),
        (["train_dataset.num_parallel_workers=0"], "found 0, must be at least 1"),
        (["train_dataset.data_loader.type=ToolAlpaca"], "did you mean ToolAlpacaDataLoader"),
    ]
)  # fmt: skip
def test_what_does_not_fit(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [TOOLS, "train_dataset.max_seq_length=192"],
        [CHAT],
        ["run_mode=eval", EVAL_TOOLS, "eval_dataset.max_seq_length=150"],
        ["run_mode=eval", EVAL_TOOLS, "eval_dataset.max_seq_length=128", "metric.type=PerplexityMetric"],
        ["run_mode=eval", EVAL_TOOLS, "eval_dataset.max_seq_length=128", "generation.max_length=100"],
        [GLM2, "train_dataset.ignore_pad_token_for_loss=False"],
        ["train_dataset.cache_dir=new/folder"],
        # Not read in this run mode.
        ["run_mode=eval", TOOLS, "train_dataset.max_seq_length=7"],
        [EVAL_TOOLS, "eval_dataset.max_seq_length=1000"],
    ],
)
def test_what_fits(config: Path, overrides: list[str]) -> None:
    load_settings(config, overrides)


def test_keys_of_another_loader_are_named(config: Path) -> None:
    idle = ["train_dataset.max_source_length=32", "train_dataset.data_loader.origin_columns=[a,b]"]
    settings = load_settings(config, [TOOLS, *idle])
    assert "train_dataset.max_source_length: no effect with ToolAlpacaDataLoader" in settings.notes
    assert "train_dataset.data_loader.origin_columns: no effect with ToolAlpacaDataLoader" in settings.notes
    settings = load_settings(config, [CHAT, idle[1]])
    assert [note for note in settings.notes if "no effect" in note] == [
        "train_dataset.data_loader.origin_columns: no effect with ConversationDataLoader"
    ]
    assert not any("no effect" in note for note in load_settings(config, [idle[1]]).notes)


def test_an_empty_cache_dir_is_no_folder(config: Path) -> None:
    text = config.read_text(encoding="utf-8").replace("train_dataset:", "train_dataset:\n  cache_dir: ''")
    config.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match="cache_dir: empty; give a folder, or null"):
        load_settings(config)


def test_parts_in_use(config: Path) -> None:
    assert parts_in_use(load_settings(config)) == ("train",)
    assert parts_in_use(load_settings(config, ["do_eval=True"])) == ("train", "eval")
    assert parts_in_use(load_settings(config, ["run_mode=eval"])) == ("eval",)
    assert parts_in_use(load_settings(config, ["run_mode=predict", "predict_data=x"])) == ()
