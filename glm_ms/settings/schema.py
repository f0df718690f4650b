"""`Settings`: every key of a configuration, made of the dataclasses in `sections`."""

# ruff: noqa: RUF009 - `key` is `dataclasses.field` with documentation
# No `from __future__ import annotations`: the annotations are read at run time, also by Python 3.9.
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Optional, Union, get_type_hints

import yaml

from glm_ms.data.formats import FORMATS
from glm_ms.families import family_of
from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig
from glm_ms.settings.errors import Problem, SettingsError
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
    default_of,
    key,
    used_with,
)

AUTO = "auto"
TRAINING_MODES = ("train", "finetune")
# Value of `parallel.parallel_mode` for sharding strategies.
SEMI_AUTO = 1
# The vocabulary is padded to a multiple of this, which splits evenly over cards and suits matrix units.
VOCAB_MULTIPLE = 64


@dataclass
class Settings:
    """A whole, checked configuration. `glm_ms.settings.load_settings` builds it.

    Attributes that are not keys: `notes` are sentences for the user about what was adjusted; `source` is the path of
    the YAML; `origins` is the place of each value by dotted key.
    """

    seed: int = key(0, "start of every random sequence", at_least=0, at_most=2**32 - 1)
    run_mode: Literal["train", "finetune", "eval", "predict"] = key("finetune", "what to do")
    output_dir: str = key("./output", "folder for checkpoints, logs and predictions")
    load_checkpoint: str = key("", "initial weights: folder, .safetensors, .ckpt, or output folder of a run")
    load_adapter: str = key("", "adapter for load_checkpoint: folder, file, or output folder of its run")
    resume_training: Union[bool, str] = key(
        False, "True: continue from the newest checkpoint in output_dir; or the path of a checkpoint"
    )
    use_parallel: bool = key(False, "several cards or processes, started by msrun")
    context: ContextSettings = key(ContextSettings, "device and execution mode")
    parallel: ParallelSettings = key(ParallelSettings, "mode of a distributed run")
    parallel_config: ParallelConfigSettings = key(ParallelConfigSettings, "split of the work")
    recompute_config: RecomputeSettings = key(RecomputeSettings, "memory against time")
    model: ModelSettings = key(ModelSettings, "the network")
    processor: ProcessorSettings = key(ProcessorSettings, "text to ids")
    runner_config: RunnerSettings = key(RunnerSettings, "length of training")
    runner_wrapper: WrapperSettings = key(WrapperSettings, "training step")
    optimizer: OptimizerSettings = key(OptimizerSettings, "optimizer")
    lr_schedule: LRScheduleSettings = key(LRScheduleSettings, "learning rate")
    train_dataset: TrainDatasetSettings = key(TrainDatasetSettings, "training records")
    eval_dataset: EvalDatasetSettings = key(EvalDatasetSettings, "evaluation records")
    metric: MetricSettings = key(MetricSettings, "metrics")
    do_eval: bool = key(False, "evaluate on eval_dataset during training and at its end")
    eval_step_interval: int = key(-1, "updates between evaluations (do_eval); -1: none", at_least=-1)
    eval_epoch_interval: int = key(1, "epochs between evaluations (do_eval); -1: none", at_least=-1)
    generation: GenerationSettings = key(GenerationSettings, "text generation")
    predict_data: str = key("", "a prompt, a .txt / .jsonl file of prompts, or - for standard input")
    predict_batch_size: int = key(1, "prompts generated at a time", at_least=1)
    checkpoint: CheckpointSettings = key(CheckpointSettings, "checkpoints of training")
    logging: LoggingSettings = key(LoggingSettings, "reports of training")

    notes: list[str] = field(default_factory=list, compare=False)
    source: str = field(default="", compare=False)
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def where(self, dotted: str) -> str:
        """Place of the value of a key (`"runner_config.epochs"`), for errors."""
        return self.origins.get(dotted, self.source or "settings")

    def is_training(self) -> bool:
        """Whether `run_mode` updates weights."""
        return self.run_mode in TRAINING_MODES

    def batch_size(self) -> int:
        """Rows or prompts at a time in the present `run_mode`."""
        return self.get(BATCH_SIZE_KEYS[self.run_mode])

    def get(self, dotted: str) -> Any:
        """The value of a key (`"runner_config.epochs"`)."""
        return functools.reduce(getattr, dotted.split("."), self)

    def glm_config(self) -> GLMConfig:
        """The network's configuration.

        Raises:
            SettingsError: `padded_vocab_size` is `auto`; call `resolve_vocab_size` first.
        """
        values = dataclasses.asdict(self.model.model_config)
        if values["padded_vocab_size"] == AUTO:
            raise SettingsError(
                f"{self.where(_VOCAB_KEY)}: {_VOCAB_KEY}: auto has not been resolved; "
                "call resolve_vocab_size(settings, vocab_size) with the size of the tokenizer first"
            )
        del values["type"]  # the family decides about the class
        config = family_of(self.processor.tokenizer.type).config
        return config.from_dict(values, source=self.source or "settings")

    def to_dict(self) -> dict[str, Any]:
        """Every key as nested plain values."""
        return {item.name: _plain(getattr(self, item.name)) for item in keys_of(Settings)}

    def to_yaml(self) -> str:
        """The effective settings as YAML text; loading it gives equal settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


_VOCAB_KEY = "model.model_config.padded_vocab_size"
# Run mode -> the key that --batch_size sets.
BATCH_SIZE_KEYS = {
    "train": "runner_config.batch_size",
    "finetune": "runner_config.batch_size",
    "eval": "eval_dataset.batch_size",
    "predict": "predict_batch_size",
}


def keys_of(section: type) -> list[dataclasses.Field]:
    """The fields of a settings dataclass that are keys of the YAML."""
    return [item for item in dataclasses.fields(section) if "doc" in item.metadata]


@functools.cache
def leaf_keys(section: type = Settings, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Dotted name -> field of every key that has a value, sections flattened, in order. Not to be changed."""
    leaves: dict[str, dataclasses.Field] = {}
    hints = get_type_hints(section)
    for item in keys_of(section):
        if dataclasses.is_dataclass(hints[item.name]):
            leaves.update(leaf_keys(hints[item.name], f"{prefix}{item.name}."))
        else:
            leaves[prefix + item.name] = item
    return leaves


class Flag(NamedTuple):
    """A command line flag.

    Attributes:
        key: that it sets; None for --batch_size, whose key depends on the run mode.
        value: placeholder of the value in the help text.
        bare: whether the flag alone means True.
        former: its name in run_mindformer.py, which is accepted too.
        about: help text before the documentation of the key.
    """

    key: Optional[str]
    value: str
    bare: bool = False
    former: str = ""
    about: str = ""


FLAGS = {
    "run_mode": Flag("run_mode", "{train,finetune,eval,predict}"),
    "load_checkpoint": Flag("load_checkpoint", "PATH"),
    "load_adapter": Flag("load_adapter", "PATH"),
    "train_dataset": Flag(
        "train_dataset.data_loader.dataset_dir",
        "PATH",
        former="train_dataset_dir",
        about="training records: ",
    ),
    "eval_dataset": Flag(
        "eval_dataset.data_loader.dataset_dir",
        "PATH",
        former="eval_dataset_dir",
        about="evaluation records: ",
    ),
    "predict_data": Flag("predict_data", "TEXT"),
    "device_target": Flag("context.device_target", "{CPU,Ascend}"),
    "device_id": Flag("context.device_id", "N"),
    "use_parallel": Flag("use_parallel", "BOOL", bare=True),
    "output_dir": Flag("output_dir", "PATH"),
    "resume_training": Flag("resume_training", "BOOL|PATH", bare=True),
    "do_eval": Flag("do_eval", "BOOL", bare=True),
    "epochs": Flag("runner_config.epochs", "N"),
    "batch_size": Flag(None, "N", about="batch size of the run mode: training rows, eval rows or prompts"),
    "seed": Flag("seed", "N"),
}


def parts_in_use(settings: Settings) -> tuple[str, ...]:
    """The data sets that the run reads, of "train" and "eval"."""
    train, evaluate = settings.is_training(), settings.run_mode == "eval"
    return ("train",) * train + ("eval",) * (evaluate or (train and settings.do_eval))


def unused_keys(settings: Settings, section: str) -> Iterator[Problem]:
    """Keys of a section that are set, but have no effect with the value of another key."""
    for dotted, item in leaf_keys().items():
        path = dotted.rpartition(".")[0]
        if path != section or "used_with" not in item.metadata:
            continue
        other, values = used_with(item)
        chosen = settings.get(f"{path}.{other}")
        if chosen not in values and settings.get(dotted) != default_of(item):
            state = f"with {chosen}" if chosen else f"without {other}"
            message = f"has no effect {state}; remove it, or use {other}: {' or '.join(values)}"
            yield Problem(dotted, message, (f"{path}.{other}",))


def is_sharded(settings: Settings) -> bool:
    """Whether sharding strategies split the weights, and not only the batch."""
    return settings.use_parallel and settings.parallel.parallel_mode == SEMI_AUTO


def parallel_of(settings: Settings, num_cards: Optional[int] = None) -> ParallelConfig:
    """The split of a run over cards.

    Args:
        settings: of the run.
        num_cards: with `parallel_mode: 0`, where every card has the whole network; None: `data_parallel`.
    """
    split = settings.parallel_config
    if not is_sharded(settings):
        cards = (num_cards or split.data_parallel) if settings.use_parallel else 1
        return ParallelConfig(data_parallel=cards)
    return ParallelConfig(
        data_parallel=split.data_parallel,
        model_parallel=split.model_parallel,
        pipeline_stages=split.pipeline_stage,
        micro_batch_num=split.micro_batch_num,
        vocab_emb_dp=split.vocab_emb_dp,
        use_seq_parallel=split.use_seq_parallel,
        optimizer_shard=settings.parallel.enable_parallel_optimizer,
    )


def training_length(settings: Settings) -> int:
    """Positions of a training row."""
    data = settings.train_dataset
    if FORMATS[data.data_loader.type].uses_max_seq_length:
        return data.max_seq_length or settings.model.model_config.seq_length
    return data.max_source_length + data.max_target_length + 1


def resolve_vocab_size(settings: Settings, vocab_size: int) -> int:
    """Replaces `padded_vocab_size: auto` by the size of the tokenizer, rounded up to a multiple of 64.

    Args:
        settings: changed in place.
        vocab_size: the highest id of the tokenizer, special tokens included, plus 1.

    Returns:
        The padded size.

    Raises:
        SettingsError: a fixed size is smaller than the vocabulary.
    """
    size = settings.model.model_config.padded_vocab_size
    if isinstance(size, str):
        size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        settings.model.model_config.padded_vocab_size = size
    elif size < vocab_size:
        raise SettingsError(
            f"{settings.where(_VOCAB_KEY)}: {_VOCAB_KEY}: {size} is too small for the tokenizer "
            f"{settings.processor.tokenizer.vocab_file}, which has {vocab_size} ids; use {_VOCAB_KEY}=auto, "
            "or the tokenizer of the model"
        )
    return size


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in keys_of(type(value))}
    return list(value) if isinstance(value, list) else value
