"""What single values cannot tell: keys that must fit each other, and files that must be there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.settings.adapter_checks import adapter_problems
from glm_ms.settings.data_checks import (
    data_notes,
    data_problems,
    fill_max_seq_length,
    loader_problems,
    parts_in_use,
)
from glm_ms.settings.errors import SettingsError
from glm_ms.settings.parallel_checks import idle_keys, sharding_problems
from glm_ms.settings.schema import AUTO, Settings
from glm_ms.settings.sections import LR_SCHEDULE_KEYS
from glm_ms.settings.training_checks import training_problems

_SEQ_LENGTH = "model.model_config.seq_length"
_DATASET_DIR = "{}_dataset.data_loader.dataset_dir"
_RECORD_ENDINGS = (".json", ".jsonl")
# In a folder with several record files: the names the field gives to each part.
_PART_NAMES = {"train": ("train",), "eval": ("dev", "eval", "valid", "validation", "test")}


class Checker:
    """Checks a whole `Settings`, and adjusts what may be adjusted with a note.

    Args:
        settings: converted settings; `notes`, dataset paths and worker numbers are adjusted in place.
        unusable: dotted keys already reported; what depends on them is not judged.

    Attributes:
        problems: a message for each problem found.
    """

    def __init__(self, settings: Settings, unusable: Iterable[str] = ()) -> None:
        self.settings = settings
        self.unusable = frozenset(unusable)
        self.problems: list[str] = []

    def check_values(self) -> None:
        """Keys against each other."""
        self._model_config()
        self._learning_rate()
        self._parallel()
        self._generation()
        self._lower_workers()
        if "run_mode" in self.unusable:
            return
        for key, message, others in adapter_problems(self.settings):
            self._bad(message, key, *others)
        if self.settings.is_training():
            for key, message, others in training_problems(self.settings):
                self._bad(message, key, *others)
        self._data()
        if self.settings.run_mode == "predict" and not self.settings.predict_data:
            self._bad("missing; give a prompt, a .txt or .jsonl file, or - (--predict_data)", "predict_data")

    def check_files(self) -> None:
        """Files and folders that the run mode reads."""
        if "run_mode" in self.unusable:
            return
        self._output_dir()
        self._vocab_file()
        self._weights()
        for part in parts_in_use(self.settings):
            self._records(part)
        prompts = self.settings.predict_data
        is_file = "\n" not in prompts and Path(prompts).suffix.lower() in (".txt", ".jsonl")
        if self.settings.run_mode == "predict" and is_file:
            self._must_exist("predict_data", prompts)

    def check_data_set(self, part: str) -> list[str]:
        """What it takes to read one data set, for tools that neither train nor generate.

        Args:
            part: "train" or "eval".

        Returns:
            Remarks: lengths that do not fit the network or the generation.
        """
        for key, message, others in loader_problems(self.settings, part):
            self._bad(message, key, *others)
        known = list(loader_problems(self.settings, part))
        remarks = [problem for problem in data_problems(self.settings, part) if problem not in known]
        self._vocab_file()
        self._records(part)
        return [f"{key}: {message}" for key, message, _ in remarks]

    def _bad(self, message: str, *keys: str) -> None:
        """Reports a problem of the first key, unless one of `keys`, or its section, is in error already."""
        if not any(key == bad or key.startswith(f"{bad}.") for key in keys for bad in self.unusable):
            self.problems.append(f"{self.settings.where(keys[0])}: {keys[0]}: {message}")

    def _model_config(self) -> None:
        values = vars(self.settings.model.model_config).copy()
        if values["padded_vocab_size"] == AUTO:
            values["padded_vocab_size"] = 1
        try:
            GLMConfig.from_dict(values, source="")
        except ConfigError as error:
            message = str(error).removeprefix(": ")
            name = message.split(" ", 1)[0]
            key = f"model.model_config.{name if name in values else 'type'}"
            message = message.removeprefix(f"{name} ").removeprefix("= ") if name in values else message
            self._bad(message, key)

    def _learning_rate(self) -> None:
        schedule, runner = self.settings.lr_schedule, self.settings.runner_config
        for name, kinds in LR_SCHEDULE_KEYS.items():
            default = type(schedule).__dataclass_fields__[name].default
            if schedule.type not in kinds and getattr(schedule, name) != default:
                message = f"has no effect with {schedule.type}; remove it, or use {' or '.join(kinds)}"
                self._bad(message, f"lr_schedule.{name}", "lr_schedule.type")
        if schedule.total_steps == 0:
            self._bad("found 0, must be -1 (all of the run) or at least 1", "lr_schedule.total_steps")
        if schedule.warmup_ratio is not None and schedule.warmup_steps:
            self._bad("given together with warmup_steps; keep one", "lr_schedule.warmup_ratio")
        if schedule.lr_end > schedule.learning_rate:
            message = f"{schedule.lr_end} is above learning_rate = {schedule.learning_rate}"
            self._bad(message, "lr_schedule.lr_end", "lr_schedule.learning_rate")
        limits = {
            "lr_schedule.total_steps": schedule.total_steps,
            "runner_config.max_steps": runner.max_steps,
        }
        for key, steps in limits.items():
            if steps is not None and 0 < steps < schedule.warmup_steps:
                message = f"{schedule.warmup_steps} is more than all steps, {key} = {steps}"
                self._bad(message, "lr_schedule.warmup_steps", key)

    def _parallel(self) -> None:
        settings, split = self.settings, self.settings.parallel_config
        if not settings.use_parallel:
            settings.notes += idle_keys(settings)
            return
        if settings.parallel.full_batch and settings.parallel.parallel_mode == 0:
            message = (
                "True needs parallel.parallel_mode: 1; in data parallel mode every card reads its own share"
            )
            self._bad(message, "parallel.full_batch", "parallel.parallel_mode")
        if "run_mode" not in self.unusable:
            for key, message, others in sharding_problems(settings):
                self._bad(message, key, *others)
        if settings.parallel.parallel_mode == 0:
            needs = {
                "parallel.enable_parallel_optimizer": (settings.parallel.enable_parallel_optimizer, False),
                "parallel_config.model_parallel": (split.model_parallel, 1),
                "parallel_config.pipeline_stage": (split.pipeline_stage, 1),
                "parallel_config.use_seq_parallel": (split.use_seq_parallel, False),
                "recompute_config.parallel_optimizer_comm_recompute": (
                    settings.recompute_config.parallel_optimizer_comm_recompute,
                    False,
                ),
            }
            for key, (value, plain) in needs.items():
                if value != plain:
                    self._bad(f"{value} needs parallel.parallel_mode: 1", key, "parallel.parallel_mode")

    def _generation(self) -> None:
        generation = self.settings.generation
        if generation.num_return_sequences > generation.num_beams:
            key = "generation.num_return_sequences"
            number = generation.num_return_sequences
            if generation.num_beams > 1:
                self._bad(
                    f"{number} is more than num_beams = {generation.num_beams}", key, "generation.num_beams"
                )
            elif not generation.do_sample:
                message = f"{number} equal answers would come of greedy decoding; set do_sample or num_beams"
                self._bad(message, key, "generation.do_sample", "generation.num_beams")
        seq_length = self.settings.model.model_config.seq_length
        if generation.max_length is not None and generation.max_length > seq_length:
            message = f"{generation.max_length} is more than {_SEQ_LENGTH} = {seq_length}"
            self._bad(message, "generation.max_length", _SEQ_LENGTH)
        if generation.do_sample and generation.num_beams > 1:
            message = (
                f"sampling among num_beams = {generation.num_beams} beams is not supported; keep one of both"
            )
            self._bad(message, "generation.do_sample", "generation.num_beams")

    def _lower_workers(self) -> None:
        cores = _cores()
        dataset = self.settings.train_dataset
        if dataset.num_parallel_workers > cores:
            self.settings.notes.append(
                f"train_dataset.num_parallel_workers: lowered from {dataset.num_parallel_workers} "
                f"to {cores}, the cores of this machine"
            )
            dataset.num_parallel_workers = cores

    def _data(self) -> None:
        fill_max_seq_length(self.settings)
        for part in parts_in_use(self.settings):
            for key, message, others in data_problems(self.settings, part):
                self._bad(message, key, *others)
            self.settings.notes += data_notes(self.settings, part)

    def _output_dir(self) -> None:
        path = Path(self.settings.output_dir)
        blocked = next((item for item in (path, *path.parents) if item.exists() and not item.is_dir()), None)
        if blocked is not None:
            self._bad(f"{blocked} is a file; give a folder, which is made if it is not there", "output_dir")

    def _vocab_file(self) -> None:
        key, path = "processor.tokenizer.vocab_file", self.settings.processor.tokenizer.vocab_file
        advice = (
            "give the tokenizer.model that belongs to the weights, or train one with tools/train_vocab.py"
        )
        if not path:
            self._bad(f"missing; {advice}", key)
        elif Path(path).is_dir():
            inside = Path(path, "tokenizer.model")
            self._bad(f"{path} is a folder; give the file{f' {inside}' if inside.is_file() else ''}", key)
        elif not Path(path).is_file():
            self._bad(f"{path}: no such file; {advice}", key)

    def _weights(self) -> None:
        settings = self.settings
        if settings.load_checkpoint:
            self._must_exist("load_checkpoint", settings.load_checkpoint)
        if settings.load_adapter:
            self._must_exist("load_adapter", settings.load_adapter)
        resumes = settings.is_training() and settings.resume_training
        if resumes and isinstance(settings.resume_training, str):
            self._must_exist("resume_training", settings.resume_training)
        may_be_random = settings.run_mode == "train" or settings.model.init == "random" or resumes
        if not settings.load_checkpoint and not may_be_random:
            message = (
                f"missing; run_mode {settings.run_mode} begins with given weights. Name them "
                "(--load_checkpoint PATH), or ask for random ones with model.init=random"
            )
            self._bad(message, "load_checkpoint", "model.init")
        elif not settings.load_checkpoint and not resumes:
            settings.notes.append("load_checkpoint: empty, so the weights are random")

    def _must_exist(self, key: str, path: str) -> None:
        # OUTPUT_DIR/checkpoint/best stands for the checkpoint that best.json beside it names.
        best = Path(path).name == "best" and Path(path).with_name("best.json").is_file()
        if not best and not Path(path).exists():
            self._bad(f"{path}: no such file or folder (from {os.getcwd()})", key)

    def _records(self, part: str) -> None:
        key = _DATASET_DIR.format(part)
        loader = getattr(self.settings, f"{part}_dataset").data_loader
        if not loader.dataset_dir:
            self._bad(f"missing; give the file of records (--{part}_dataset PATH)", key)
            return
        try:
            path = _record_file(Path(loader.dataset_dir), part)
        except SettingsError as error:
            self._bad(str(error), key)
            return
        if path != Path(loader.dataset_dir):
            self.settings.notes.append(f"{key}: {loader.dataset_dir} is a folder, {path} is read")
            loader.dataset_dir = str(path)


def _record_file(path: Path, part: str) -> Path:
    """The file of records that `path` names, or that the folder `path` holds for `part` (train, eval)."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise SettingsError(f"{path}: no such file or folder (from {os.getcwd()})")
    found = sorted(item for item in path.iterdir() if item.suffix in _RECORD_ENDINGS and item.is_file())
    if len(found) > 1:
        names = _PART_NAMES[part]
        named = sorted(
            (item for item in found if item.stem in names), key=lambda item: names.index(item.stem)
        )
        found = named[:1] or found
    if len(found) == 1:
        return found[0]
    listing = ", ".join(item.name for item in found) or "none"
    raise SettingsError(f"{path}: which file is meant? .json and .jsonl files there: {listing}; name one")


def _cores() -> int:
    """Cores this process may use: a container may be given fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
