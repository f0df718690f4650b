"""Evaluation while training, the best checkpoint, loss scaling, the output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.metrics import METRICS, SCORE_NAMES, score_names
from glm_ms.settings import SettingsError, load_settings

NEVER = ["do_eval=True", "eval_step_interval=-1", "eval_epoch_interval=-1"]
SCALE = "runner_wrapper.scale_sense"
FIXED = f"{SCALE}.type=FixedLossScaleUpdateCell"


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (NEVER, "do_eval", "eval_step_interval and eval_epoch_interval are both -1"),
        (["eval_step_interval=0"], "eval_step_interval", "found 0, must be -1 (never) or at least 1"),
        (["eval_epoch_interval=0"], "eval_epoch_interval", "found 0"),
        (["checkpoint.best_metric=rouge-l"], "checkpoint.best_metric", "set do_eval: True"),
        (["do_eval=True", "checkpoint.best_metric=loss"], "checkpoint.best_metric", "measured by PerplexityMetric"),
        (["do_eval=True", "metric.type=PerplexityMetric", "checkpoint.best_metric=bleu-4"],
         "checkpoint.best_metric", "measured by ADGENMetric, but metric.type is PerplexityMetric"),
        ([f"{SCALE}.loss_scale_value=2"], f"{SCALE}.loss_scale_value", "has no effect without type"),
        ([FIXED, f"{SCALE}.scale_window=5"], f"{SCALE}.scale_window", "use type: DynamicLossScaleUpdateCell"),
        (["do_eval=True", "generation.max_new_tokens=500"], "model.model_config.seq_length", "which ADGENMetric needs"),
        (["do_eval=True", "eval_dataset.data_loader.dataset_dir=none.json"], "eval_dataset", "no such file"),
        (["do_eval=True", "eval_dataset.data_loader.dataset_dir="], "eval_dataset", "--eval_dataset PATH"),
        (["output_dir=tokenizer.model"], "output_dir", "tokenizer.model is a file; give a folder"),
        (["output_dir=tokenizer.model/run"], "output_dir", "tokenizer.model is a file"),
    ]
)  # fmt: skip
def test_what_does_not_fit_is_named(config: Path, overrides: list[str], key: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides)
    (problem,) = caught.value.problems
    assert problem.key.startswith(key)
    assert message in str(problem)


@pytest.mark.parametrize(
    "overrides",
    [
        ["do_eval=True", "eval_epoch_interval=-1", "eval_step_interval=5"],
        # As in the field's files, where evaluation is off.
        ["do_eval=False", "eval_step_interval=-1", "eval_epoch_interval=-1", "generation.max_new_tokens=500"],
        ["do_eval=True", "metric.type=[ADGENMetric, PerplexityMetric]", "checkpoint.best_metric=perplexity"],
        [FIXED, f"{SCALE}.loss_scale_value=2"],
        [f"{SCALE}.type=DynamicLossScaleUpdateCell", f"{SCALE}.scale_window=5", f"{SCALE}.scale_factor=4"],
        # These keys are those of training.
        ["run_mode=eval", "checkpoint.best_metric=loss", "eval_step_interval=0"],
        ["output_dir=out/of/nothing"],
    ],
)
def test_what_fits_is_taken(config: Path, overrides: list[str]) -> None:
    assert load_settings(config, overrides).notes is not None


def test_best_stands_for_a_checkpoint(config: Path) -> None:
    best = "run/checkpoint/best"
    with pytest.raises(SettingsError, match=f"{best}: no such file or folder"):
        load_settings(config, [f"load_checkpoint={best}"])
    Path("run/checkpoint").mkdir(parents=True)
    Path(f"{best}.json").write_text("{}")
    assert load_settings(config, [f"load_checkpoint={best}"]).load_checkpoint == best


def test_scores_are_those_of_the_metrics() -> None:
    assert set(METRICS["ADGENMetric"].better) == set(SCORE_NAMES)
    assert set(score_names()) >= {*SCORE_NAMES, "perplexity"}
