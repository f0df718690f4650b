"""Files and folders that a run reads and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from glm_ms.settings.errors import Problem
from glm_ms.settings.schema import Settings, parts_in_use

_RECORD_ENDINGS = (".json", ".jsonl")
# Usual names of the files of each part, for a folder with several record files.
_PART_NAMES = {"train": ("train",), "eval": ("dev", "eval", "valid", "validation", "test")}


def file_problems(settings: Settings) -> Iterator[Problem]:
    """The problems of files and folders of the run mode; folders of records are replaced by the file in them."""
    yield from folder_problems("output_dir", settings.output_dir)
    yield from vocab_file_problems(settings)
    yield from _weights(settings)
    for part in parts_in_use(settings):
        yield from record_problems(settings, part)
    prompts = settings.predict_data
    is_file = "\n" not in prompts and Path(prompts).suffix.lower() in (".txt", ".jsonl")
    if settings.run_mode == "predict" and is_file:
        yield from _missing("predict_data", prompts)


def folder_problems(key: str, folder: str) -> Iterator[Problem]:
    """Why a folder cannot be made."""
    path = Path(folder)
    blocked = next((item for item in (path, *path.parents) if item.exists() and not item.is_dir()), None)
    if blocked is not None:
        yield Problem(key, f"{blocked} is a file; give a folder, which is made if it does not exist")


def vocab_file_problems(settings: Settings) -> Iterator[Problem]:
    """The problems of the file of the tokenizer."""
    key, path = "processor.tokenizer.vocab_file", settings.processor.tokenizer.vocab_file
    advice = "give the tokenizer.model of the weights, or train one with tools/train_vocab.py"
    if not path:
        yield Problem(key, f"missing; {advice}")
    elif Path(path).is_dir():
        inside = Path(path, "tokenizer.model")
        yield Problem(key, f"{path} is a folder; give the file{f' {inside}' if inside.is_file() else ''}")
    elif not Path(path).is_file():
        yield Problem(key, f"{path}: no such file; {advice}")


def record_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of the records of a part, "train" or "eval"; a folder is replaced by the file in it."""
    key, loader = f"{part}_dataset.data_loader.dataset_dir", settings.get(f"{part}_dataset.data_loader")
    path = Path(loader.dataset_dir)
    if not loader.dataset_dir:
        yield Problem(key, f"missing; give the file of records (--{part}_dataset PATH)")
    elif _exists(path) and not path.is_dir() and not path.is_file():
        yield Problem(key, f"{path}: not a regular file; give a file or folder of records")
    elif not _exists(path) or path.is_file():
        yield from _missing(key, loader.dataset_dir)
    else:
        found = sorted(item for item in path.iterdir() if item.suffix in _RECORD_ENDINGS and item.is_file())
        named = [item for name in _PART_NAMES[part] for item in found if item.stem == name]
        if len(found) == 1 or named:
            loader.dataset_dir = str((named or found)[0])
            settings.notes.append(f"{key}: {path} is a folder, {loader.dataset_dir} is read")
        else:
            listing = ", ".join(item.name for item in found) or "none"
            message = f"{path}: which file is meant? .json and .jsonl files there: {listing}; name one"
            yield Problem(key, message)


def _weights(settings: Settings) -> Iterator[Problem]:
    resume = settings.resume_training if settings.is_training() else False
    named = {"load_checkpoint": settings.load_checkpoint, "load_adapter": settings.load_adapter}
    for key, path in {**named, "resume_training": resume if isinstance(resume, str) else ""}.items():
        if path:
            yield from _missing(key, path)
    if settings.load_checkpoint:
        return
    if not (settings.run_mode == "train" or settings.model.init == "random" or resume):
        message = (
            f"missing; run_mode {settings.run_mode} needs initial weights. Name them (--load_checkpoint PATH), or set "
            "model.init=random"
        )
        yield Problem("load_checkpoint", message, ("model.init",))
    elif not resume:
        settings.notes.append("load_checkpoint: empty, so the weights are random")


def _missing(key: str, path: str) -> Iterator[Problem]:
    # OUTPUT_DIR/checkpoint/best means the checkpoint that best.json beside it names.
    best = Path(path).name == "best" and Path(path).with_name("best.json").is_file()
    if not best and not _exists(Path(path)):
        yield Problem(key, f"{path}: no such file or folder (from {os.getcwd()})")


def _exists(path: Path) -> bool:
    """Whether a path exists; one that the system cannot look up, for example a name that is too long, does not."""
    try:
        return path.exists()
    except OSError:
        return False
