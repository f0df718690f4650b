"""The checkpoints of all ranks of a cluster, opened and checked: `<folder>/rank_N/*.ckpt` or `*.safetensors`, or the
`rank_N/checkpoint/step_N/` of a sharded run.

Files are indexed once and then opened for one tensor at a time, so that hundreds of ranks need no file handles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from glm_ms.convert.adapter_files import plain_name
from glm_ms.convert.mindspore_file import MindSporeFile
from glm_ms.convert.safetensors_file import SafetensorsFile
from glm_ms.convert.tensor_file import RANK, RANKS, TensorFile, TensorInfo
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.run_folder import list_checkpoints

_READERS: dict[str, Callable[[Path], TensorFile]] = {".ckpt": MindSporeFile, ".safetensors": SafetensorsFile}
_FOLDER = re.compile(r"rank_(\d+)")
_RANK_IN_NAME = re.compile(r"rank_?(\d+)", re.IGNORECASE)
_STEP_IN_NAME = re.compile(r".+-(\d+)_(\d+)")  # MindSpore's ModelCheckpoint: prefix-EPOCH_STEP
_LAST_NUMBER = re.compile(r".*?(\d+)")
Step = Optional[tuple[int, int]]


@dataclass
class RankCheckpoint:
    """What one rank holds.

    Attributes:
        rank: its number.
        folder: its folder, or the file itself where one was named.
        files: the files of the chosen step.
        step: (epoch, step) of their names; None where they tell none.
    """

    rank: int
    folder: Path
    files: list[TensorFile]
    step: Step

    def __post_init__(self) -> None:
        self._home: dict[str, tuple[TensorFile, str]] = {}
        for file in self.files:
            for stored in file.entries:
                name = plain_name(file.path, stored)
                if name in self._home:
                    raise CheckpointError(
                        f"{file.path}: {name} is also in {self.file(name).name}; leave one checkpoint in the folder"
                    )
                self._home[name] = (file, stored)

    @property
    def place(self) -> Path:
        """The folder in which its files lie."""
        return self.files[0].path.parent if self.files else self.folder

    def names(self) -> list[str]:
        """Names of the tensors in the network, in the order of the files."""
        return list(self._home)

    def holds(self, name: str) -> bool:
        """Whether the rank has a tensor of that name."""
        return name in self._home

    def info(self, name: str) -> TensorInfo:
        """Shape and element type of a tensor."""
        file, stored = self._home[name]
        return file.entries[stored]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._home[name][0].path

    def read(self, name: str) -> np.ndarray:
        """A fresh array in the storage type of its dtype; no file stays open."""
        file, stored = self._home[name]
        try:
            return file.read(stored)
        finally:
            file.release()


def open_ranks(folder: Path, count: int, step: Step, say: Callable[[str], None]) -> list[RankCheckpoint]:
    """Opens the checkpoints of ranks 0 to `count` - 1.

    Args:
        folder: holds rank_0, rank_1, ...
        count: number of ranks that the strategy describes.
        step: (epoch, step) to take; the newest that all ranks have when None.
        say: told which step was taken where there were several.

    Raises:
        CheckpointError: a rank is missing or too many, its folder has no checkpoint of that step, a file is damaged,
            or a file name tells another rank than its folder.
    """
    folders = rank_folders(folder)
    if not folders:
        near = [str(item) for item in sorted(folder.iterdir()) if item.is_dir() and rank_folders(item)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(f"{folder}: holds no folders rank_0, rank_1, ... of the {count} ranks{hint}")
    missing = [str(rank) for rank in range(count) if rank not in folders]
    extra = [str(rank) for rank in sorted(folders) if rank >= count]
    if missing or extra:
        problems = [f"rank {capped(missing)} missing"] if missing else []
        problems += [f"rank {capped(extra)} too many"] if extra else []
        raise CheckpointError(
            f"{folder}: the strategy describes {count} ranks, the folder has {len(folders)} (rank_N): "
            f"{'; '.join(problems)}. Bring the folders of all ranks together, and give the strategy of all pipeline "
            "stages of the same run"
        )
    by_step = [_files_by_step(folders[rank]) for rank in range(count)]
    chosen = _choose_step(folder, by_step, step, say)
    files = [steps[chosen] for steps in by_step]
    _check_numbers_in_names(files)
    ranks = [RankCheckpoint(rank, folders[rank], list(_open(files[rank])), chosen) for rank in range(count)]
    for rank in ranks:
        _check_headers(rank, count)
    return ranks


def open_whole(path: Path, step: Step, say: Callable[[str], None]) -> RankCheckpoint:
    """Opens a checkpoint that is not cut: a file, a folder with its files, or a folder with rank_0 alone.

    Raises:
        CheckpointError: there is none, or there are several ranks.
    """
    if path.is_file():
        if path.suffix not in _READERS:
            raise CheckpointError(f"{path}: must end in {' or '.join(_READERS)}")
        return _whole(path, [path], None)
    folders = rank_folders(path) if path.is_dir() else {}
    if len(folders) > 1:
        raise CheckpointError(
            f"{path}: holds {len(folders)} ranks; give their --src_ckpt_strategy, or one folder such as "
            f"{path / 'rank_0'} where every rank holds the whole checkpoint"
        )
    folder = next(iter(folders.values()), path)
    by_step = _files_by_step(folder)
    chosen = _choose_step(folder, [by_step], step, say)
    return _whole(folder, by_step[chosen], chosen)


def _whole(path: Path, files: list[Path], step: Step) -> RankCheckpoint:
    checkpoint = RankCheckpoint(0, path, list(_open(files)), step)
    for file in checkpoint.files:
        if file.metadata.get(RANKS, "1") != "1":
            raise CheckpointError(
                f"{file.path}: the slice of rank {file.metadata.get(RANK)} of {file.metadata[RANKS]}, not a whole "
                "checkpoint; give the folder of all ranks and --src_ckpt_strategy"
            )
    return checkpoint


def _check_headers(rank: RankCheckpoint, count: int) -> None:
    """Files that tell in their header whose slice they are must lie where they belong."""
    for file in rank.files:
        told = file.metadata.get(RANK, str(rank.rank)), file.metadata.get(RANKS, str(count))
        if told != (str(rank.rank), str(count)):
            raise CheckpointError(
                f"{file.path}: the slice of rank {told[0]} of {told[1]}, but it lies in {rank.folder.name} of "
                f"{count} ranks; files were swapped, or are of another run"
            )


def rank_folders(folder: Path) -> dict[int, Path]:
    """Rank -> its folder.

    Raises:
        CheckpointError: no such folder, or two folders of one rank (rank_1 and rank_01).
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file; give the folder that holds rank_0, rank_1, ...")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found: dict[int, Path] = {}
    for item in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(item.name)
        if match is None or not item.is_dir():
            continue
        rank = int(match.group(1))
        if rank in found:
            raise CheckpointError(f"{folder}: both {found[rank].name} and {item.name} are of rank {rank}")
        found[rank] = item
    return found


def _files_by_step(folder: Path) -> dict[Step, list[Path]]:
    steps: dict[Step, list[Path]] = {}
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such file or folder")
    for step, inside in list_checkpoints(folder):  # of one card of a sharded run
        steps[(0, step)] = sorted(file for file in inside.iterdir() if file.suffix in _READERS)
        if not steps[(0, step)]:
            raise CheckpointError(f"{inside}: holds no tensors ({' or '.join(_READERS)}); remove it")
    if steps:
        return steps
    for file in sorted(folder.iterdir()):
        if file.suffix in _READERS and file.is_file() and not file.name.startswith("."):
            match = _STEP_IN_NAME.fullmatch(file.stem)
            steps.setdefault((int(match.group(1)), int(match.group(2))) if match else None, []).append(file)
    if not steps:
        raise CheckpointError(f"{folder}: holds no checkpoint ({' or '.join(_READERS)})")
    if None in steps and len(steps) > 1:
        raise CheckpointError(
            f"{folder}: {steps[None][0].name} names no step, others do; leave the files of one checkpoint there"
        )
    return steps


def _choose_step(
    folder: Path, by_step: list[dict[Step, list[Path]]], wanted: Step, say: Callable[[str], None]
) -> Step:
    """The step to take: the newest that every rank has."""
    common = set(by_step[0]).intersection(*by_step[1:])
    if wanted is not None:
        absent = [str(rank) for rank, steps in enumerate(by_step) if wanted not in steps]
        if absent:
            raise CheckpointError(
                f"{folder}: rank {capped(absent)} has no checkpoint of step {_text(wanted)}; "
                f"all ranks have {capped(sorted(map(_text, common))) or 'none in common'}"
            )
        return wanted
    if not common:
        newest = [f"rank {rank}: {_text(max(steps, key=_order))}" for rank, steps in enumerate(by_step)]
        raise CheckpointError(f"{folder}: the ranks have no step in common; newest are {capped(newest)}")
    chosen = max(common, key=_order)
    everything = {step for steps in by_step for step in steps}
    if len(everything) > 1:
        say(f"taking step {_text(chosen)}, the newest that all ranks have, of {len(everything)} steps found")
    return chosen


def _order(step: Step) -> tuple[int, int]:
    return step or (-1, -1)


def _text(step: Step) -> str:
    if step is None:
        return "(none named)"
    return f"{step[0]}_{step[1]}" if step[0] else str(step[1])


def _check_numbers_in_names(files: list[list[Path]]) -> None:
    """Folders may have been swapped: file names that tell a rank must tell that of their folder."""
    told = [
        (rank, path, int(match.group(1)))
        for rank, paths in enumerate(files)
        for path in paths
        for match in [_RANK_IN_NAME.search(path.stem)]
        if match
    ]
    if len({number for _, _, number in told}) > 1:  # one number everywhere is another word, as in lora_rank_8
        for rank, path, number in told:
            if number != rank:
                raise CheckpointError(
                    f"{path}: its name tells rank {number}, its folder rank {rank}; the files were swapped"
                )
    # mindspore.transform_checkpoints and this package end the name in the rank: cut0, cut1, ...
    ends = [_LAST_NUMBER.fullmatch(paths[0].stem) if len(paths) == 1 else None for paths in files]
    numbers = [int(match.group(1)) if match else -1 for match in ends]
    if sorted(numbers) == list(range(len(files))) and len(files) > 1:
        for rank, number in enumerate(numbers):
            if number != rank:
                raise CheckpointError(
                    f"{files[rank][0]}: its name ends in {number}, as that of rank {number} should, but it lies in "
                    f"{files[rank][0].parent.name}; the files were swapped"
                )


def _open(paths: list[Path]) -> Iterator[TensorFile]:
    for path in paths:
        try:
            yield _READERS[path.suffix](path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
