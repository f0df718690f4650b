"""The one table of every key a configuration may hold: `Settings`, made of the dataclasses in `sections`.

Reading, checking, the command line and writing back all work from these declarations.
"""

# ruff: noqa: RUF009 - `key` is `dataclasses.field` with documentation
# No `from __future__ import annotations`: the annotations are read at run time, also by Python 3.9.
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_type_hints

import yaml

from glm_ms.model.config import GLMConfig
from glm_ms.settings.errors import SettingsError
from glm_ms.settings.sections import (
    CheckpointSettings,
    ContextSettings,
    EvalDatasetSettings,
    GenerationSettings,
    LoggingSettings,
    LRScheduleSettings,
    MetricSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelConfigSettings,
    ParallelSettings,
    ProcessorSettings,
    RecomputeSettings,
    RunnerSettings,
    TrainDatasetSettings,
    WrapperSettings,
    key,
)

AUTO = "auto"
TRAINING_MODES = ("train", "finetune")


@dataclass
class Settings:
    """A whole configuration, checked.

    Built by `glm_ms.settings.load_settings`. `notes`, `source` and `origins` are no keys: `notes` are
    sentences for the user about what was adjusted; `source` is the path of the YAML; `origins` tells for
    a dotted key where its value was written.
    """

    seed: int = key(0, "start of every random sequence", at_least=0, at_most=2**32 - 1)
    run_mode: Literal["train", "finetune", "eval", "predict"] = key("finetune", "what to do")
    output_dir: str = key("./output", "folder for checkpoints, logs and predictions")
    load_checkpoint: str = key(
        "", "weights to begin with: Hugging Face folder, .safetensors, .ckpt, or output folder of a run"
    )
    load_adapter: str = key(
        "", "LoRA or P-Tuning adapter on top of load_checkpoint: folder or file, or output folder of its run"
    )
    resume_training: Union[bool, str] = key(
        False, "True: go on from the newest whole checkpoint in output_dir; or the path of one"
    )
    use_parallel: bool = key(False, "several cards or processes, started by msrun")
    context: ContextSettings = key(ContextSettings, "where and how MindSpore runs")
    parallel: ParallelSettings = key(ParallelSettings, "how the cards work together")
    parallel_config: ParallelConfigSettings = key(ParallelConfigSettings, "how the work is split")
    recompute_config: RecomputeSettings = key(RecomputeSettings, "memory against time")
    model: ModelSettings = key(ModelSettings, "the network")
    processor: ProcessorSettings = key(ProcessorSettings, "text to ids")
    runner_config: RunnerSettings = key(RunnerSettings, "length and rhythm of training")
    runner_wrapper: WrapperSettings = key(WrapperSettings, "one training step")
    optimizer: OptimizerSettings = key(OptimizerSettings, "optimizer")
    lr_schedule: LRScheduleSettings = key(LRScheduleSettings, "learning rate")
    train_dataset: TrainDatasetSettings = key(TrainDatasetSettings, "training records")
    eval_dataset: EvalDatasetSettings = key(EvalDatasetSettings, "records of evaluations")
    metric: MetricSettings = key(MetricSettings, "what eval measures")
    do_eval: bool = key(False, "evaluate on eval_dataset while training, and at its end")
    eval_step_interval: int = key(
        -1, "evaluate every so many updates (do_eval); -1: not by steps", at_least=-1
    )
    eval_epoch_interval: int = key(
        1, "evaluate every so many epochs (do_eval); -1: not by epochs", at_least=-1
    )
    generation: GenerationSettings = key(GenerationSettings, "how text is generated")
    predict_data: str = key("", "prompt text, a .txt / .jsonl file of prompts, or - for standard input")
    predict_batch_size: int = key(1, "prompts generated at a time", at_least=1)
    checkpoint: CheckpointSettings = key(CheckpointSettings, "what training leaves behind")
    logging: LoggingSettings = key(LoggingSettings, "what is written while training")

    notes: list[str] = field(default_factory=list, compare=False)
    source: str = field(default="", compare=False)
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def where(self, dotted: str) -> str:
        """Where the value of a key (`"runner_config.epochs"`) comes from, to begin an error with."""
        return self.origins.get(dotted, self.source or "settings")

    def is_training(self) -> bool:
        """Whether `run_mode` updates weights."""
        return self.run_mode in TRAINING_MODES

    def batch_size(self) -> int:
        """Rows or prompts at a time in the present `run_mode`."""
        value: Any = self
        for name in batch_size_key(self.run_mode).split("."):
            value = getattr(value, name)
        return value

    def glm_config(self) -> GLMConfig:
        """The network's configuration.

        Raises:
            SettingsError: `padded_vocab_size` still is `auto`; see `resolve_vocab_size`.
        """
        values = dataclasses.asdict(self.model.model_config)
        if values["padded_vocab_size"] == AUTO:
            where = self.where("model.model_config.padded_vocab_size")
            raise SettingsError(
                f"{where}: model.model_config.padded_vocab_size: auto has not been resolved; "
                "call resolve_vocab_size(settings, vocab_size) with the size of the tokenizer first"
            )
        return GLMConfig.from_dict(values, source=self.source or "settings")

    def to_dict(self) -> dict[str, Any]:
        """Every key as nested plain values."""
        return {item.name: _plain(getattr(self, item.name)) for item in keys_of(Settings)}

    def to_yaml(self) -> str:
        """The effective settings as YAML text; loading it gives equal settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


BATCH_SIZE_KEYS = {
    "train": "runner_config.batch_size",
    "finetune": "runner_config.batch_size",
    "eval": "eval_dataset.batch_size",
    "predict": "predict_batch_size",
}


def batch_size_key(run_mode: str) -> str:
    """The key that holds the batch size of a run mode; `--batch_size` sets it."""
    return BATCH_SIZE_KEYS[run_mode]


def keys_of(section: type) -> list[dataclasses.Field]:
    """The fields of a settings dataclass that are keys of the YAML."""
    return [item for item in dataclasses.fields(section) if "doc" in item.metadata]


def leaf_keys(section: type = Settings, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Dotted name -> field of every key that holds a value, sections flattened, in order."""
    leaves: dict[str, dataclasses.Field] = {}
    hints = get_type_hints(section)
    for item in keys_of(section):
        if dataclasses.is_dataclass(hints[item.name]):
            leaves.update(leaf_keys(hints[item.name], f"{prefix}{item.name}."))
        else:
            leaves[prefix + item.name] = item
    return leaves


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in keys_of(type(value))}
    return list(value) if isinstance(value, list) else value
