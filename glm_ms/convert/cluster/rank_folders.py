"""Opens and checks the checkpoints of all ranks: `<folder>/rank_N/*.ckpt` or `*.safetensors`, or the folders
`rank_N/checkpoint/step_N/` of a sharded run with their manifests.

Every file is open only while a tensor is read, so that hundreds of ranks do not exhaust the file handles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from glm_ms.convert.adapter_files import of_all_ranks, plain_name
from glm_ms.convert.reader import open_file
from glm_ms.convert.tensor_file import RANK, RANKS, TensorFile, TensorInfo, described_slice
from glm_ms.convert.writers import FILE_ENDINGS
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.integrity import MANIFEST, differing_keys, manifest_beside, read_manifest_values
from glm_ms.storage.run_folder import list_checkpoints

_FOLDER = re.compile(r"rank_(\d+)")
_RANK_IN_NAME = re.compile(r"rank_?(\d+)", re.IGNORECASE)
_STEP_IN_NAME = re.compile(r".+-(\d+)_(\d+)")  # MindSpore's ModelCheckpoint: prefix-EPOCH_STEP
_LAST_NUMBER = re.compile(r".*?(\d+)")
Say = Callable[[str], None]
Step = Optional[tuple[int, int]]  # (epoch, step) in the names of files; None if there is none
KnownFiles = Mapping[Path, Mapping[str, Any]]  # file -> its size and SHA-256 in a manifest


@dataclass
class RankCheckpoint:
    """The checkpoint of one rank: its folder, or the file that the user gave, and its files.

    `tensors` has shape and type by name, without the prefix of adapter files, in the order of the files.
    """

    rank: int
    folder: Path
    files: list[TensorFile]

    def __post_init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._home: dict[str, tuple[TensorFile, str]] = {}
        for file in self.files:
            for stored, info in file.entries.items():
                name = plain_name(file.path, stored)
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file.path}: {name} is also in {self.file(name).name}; leave one checkpoint in the folder"
                    )
                self.tensors[name] = info
                self._home[name] = (file, stored)

    @property
    def place(self) -> Path:
        """The folder of its files."""
        return self.files[0].path.parent

    def file(self, name: str) -> Path:
        """The file of a tensor."""
        return self._home[name][0].path

    def read(self, name: str) -> np.ndarray:
        """A new array in the storage type of its dtype; no file stays open."""
        file, stored = self._home[name]
        try:
            return file.read(stored)
        finally:
            file.release()


def open_ranks(folder: Path, count: int, step: Step, say: Say) -> list[RankCheckpoint]:
    """Opens the checkpoints of ranks 0 to `count` - 1 of a strategy, of `step` or of the newest that all ranks have.

    Raises:
        CheckpointError: a rank is missing or too many, its folder has no checkpoint of that step, a file is damaged,
            or its name or header has another rank than its folder.
    """
    folders = rank_folders(folder)
    if not folders:
        near = [str(item) for item in sorted(folder.iterdir()) if item.is_dir() and rank_folders(item)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(f"{folder}: has no folders rank_0, rank_1, ... of the {count} ranks{hint}")
    missing = [str(rank) for rank in range(count) if rank not in folders]
    extra = [str(rank) for rank in sorted(folders) if rank >= count]
    problems = [f"rank {capped(ranks)} {what}" for ranks, what in ((missing, "missing"), (extra, "too many")) if ranks]
    if problems:
        raise CheckpointError(
            f"{folder}: the strategy describes {count} ranks, the folder has {len(folders)} (rank_N): "
            f"{'; '.join(problems)}. Bring the folders of all ranks together, and give the strategy of all pipeline "
            "stages of the same run"
        )
    by_step = [_files_by_step(folders[rank]) for rank in range(count)]
    chosen = _choose_step(folder, by_step, step, say)
    _check_numbers_in_names([steps[chosen] for steps in by_step])
    ranks = [
        RankCheckpoint(rank, folders[rank], [open_file(file) for file in steps[chosen]])
        for rank, steps in enumerate(by_step)
    ]
    for checkpoint in ranks:
        expected = str(checkpoint.rank), str(count)
        for file in checkpoint.files:
            stated, total = file.metadata.get(RANK, expected[0]), file.metadata.get(RANKS, expected[1])
            if (stated, total) != expected:
                raise CheckpointError(
                    f"{file.path}: the slice of rank {stated} of {total}, but it is in {checkpoint.folder.name} of "
                    f"{count} ranks; files were swapped, or are of another run"
                )
    return ranks


def open_whole(path: Path, step: Step, say: Say) -> RankCheckpoint:
    """Opens a whole checkpoint: a file, or a folder with its files or with rank_0 alone; else CheckpointError."""
    if path.is_file():
        if path.suffix not in FILE_ENDINGS:
            raise CheckpointError(f"{path}: must end in {' or '.join(FILE_ENDINGS)}")
        folder, files = path, [path]
    else:
        folders = rank_folders(path) if path.is_dir() else {}
        if len(folders) > 1:
            raise CheckpointError(
                f"{path}: has {len(folders)} ranks; give their --src_ckpt_strategy, or one folder such as "
                f"{path / 'rank_0'} if every rank has the whole checkpoint"
            )
        folder = next(iter(folders.values()), path)
        by_step = _files_by_step(folder)
        files = by_step[_choose_step(folder, [by_step], step, say)]
    checkpoint = RankCheckpoint(0, folder, [open_file(file) for file in files])
    for file in checkpoint.files:
        if described_slice(file):
            raise CheckpointError(
                f"{file.path}: the slice of {described_slice(file)}, not a whole checkpoint; "
                "give the folder of all ranks and --src_ckpt_strategy"
            )
    return checkpoint


def rank_folders(folder: Path) -> dict[int, Path]:
    """Rank -> its folder; CheckpointError if there is no `folder`, or two of one rank (rank_1 and rank_01)."""
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give the folder with rank_0, rank_1, ...")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found: dict[int, Path] = {}
    for item in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(item.name)
        if match and item.is_dir():
            rank = int(match.group(1))
            if rank in found:
                raise CheckpointError(f"{folder}: both {found[rank].name} and {item.name} are of rank {rank}")
            found[rank] = item
    return found


def _files_by_step(folder: Path) -> dict[Step, list[Path]]:
    steps: dict[Step, list[Path]] = {}
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such file or folder")
    for step, inside in list_checkpoints(folder):  # of a sharded run
        steps[(0, step)] = sorted(file for file in inside.iterdir() if file.suffix in FILE_ENDINGS)
        if not steps[(0, step)]:
            raise CheckpointError(f"{inside}: has no tensors ({' or '.join(FILE_ENDINGS)}); remove it")
    if steps:
        return steps
    for file in sorted(folder.iterdir()):
        if file.suffix in FILE_ENDINGS and file.is_file() and not file.name.startswith("."):
            match = _STEP_IN_NAME.fullmatch(file.stem)
            steps.setdefault((int(match.group(1)), int(match.group(2))) if match else None, []).append(file)
    if not steps:
        raise CheckpointError(f"{folder}: has no checkpoint ({' or '.join(FILE_ENDINGS)})")
    if None in steps and len(steps) > 1:
        raise CheckpointError(
            f"{folder}: {steps[None][0].name} names no step, others do; leave the files of one checkpoint there"
        )
    return steps


def _choose_step(folder: Path, by_step: list[dict[Step, list[Path]]], wanted: Step, say: Say) -> Step:
    """The wanted step, or the newest that every rank has."""
    common = sorted(set(by_step[0]).intersection(*by_step[1:]), key=_order)
    if wanted is not None:
        absent = [str(rank) for rank, steps in enumerate(by_step) if wanted not in steps]
        if absent:
            raise CheckpointError(
                f"{folder}: rank {capped(absent)} has no checkpoint of step {_text(wanted)}; "
                f"all ranks have {capped([_text(step) for step in common]) or 'none in common'}"
            )
        return wanted
    if not common:
        newest = [f"rank {rank}: {_text(max(steps, key=_order))}" for rank, steps in enumerate(by_step)]
        raise CheckpointError(f"{folder}: the ranks have no step in common; newest are {capped(newest)}")
    everything = {step for steps in by_step for step in steps}
    if len(everything) > 1:
        say(f"using step {_text(common[-1])}, the newest that all ranks have, of {len(everything)} steps found")
    return common[-1]


def _order(step: Step) -> tuple[int, int]:
    return step or (-1, -1)


def _text(step: Step) -> str:
    if step is None:
        return "(not in the name)"
    return f"{step[0]}_{step[1]}" if step[0] else str(step[1])


def _check_numbers_in_names(files: list[list[Path]]) -> None:
    """Compares the ranks in file names with the folders, which may have been swapped."""
    matches = [(rank, path, _RANK_IN_NAME.search(path.stem)) for rank, paths in enumerate(files) for path in paths]
    named = [(rank, path, int(match.group(1))) for rank, path, match in matches if match]
    if len({number for _, _, number in named}) > 1:  # the same number everywhere has another meaning: lora_rank_8
        for rank, path, number in named:
            if number != rank:
                raise CheckpointError(
                    f"{path}: its name has rank {number}, its folder rank {rank}; the files were swapped"
                )
    # mindspore.transform_checkpoints and this package append the rank to the name: checkpoint_0, checkpoint_1, ...
    ends = [_LAST_NUMBER.fullmatch(paths[0].stem) if len(paths) == 1 else None for paths in files]
    numbers = [int(match.group(1)) if match else -1 for match in ends]
    if sorted(numbers) == list(range(len(files))) and len(files) > 1:
        for rank, number in enumerate(numbers):
            path = files[rank][0]
            if number != rank:
                raise CheckpointError(
                    f"{path}: its name ends in {number}, but it is in {path.parent.name}; the files were swapped"
                )


def read_rank_manifests(folders: Sequence[Path]) -> KnownFiles:
    """Reads the manifests of all ranks. Checkpoints of other programs have none, or others of this name.

    Raises:
        CheckpointError: a manifest is damaged, is missing for some ranks only, or has another run or step than the
            first one.
    """
    known: dict[Path, Mapping[str, Any]] = {}
    first: tuple[Path, dict[str, Any]] | None = None
    paths = of_all_ranks(folders, MANIFEST)
    if all(manifest_beside(path) is None for path in paths):
        return known
    for path in paths:
        values = read_manifest_values(path.parent)
        position = {"step": values.get("step"), **(values.get("position") or {})}
        first = first or (path, position)
        keys = differing_keys(first[1], position)
        if keys:
            raise CheckpointError(
                f"{path}: differs from {first[0]} in {', '.join(keys)}; the slices are of different runs"
            )
        known.update((path.with_name(name), of_file) for name, of_file in values["files"].items())
    return known
