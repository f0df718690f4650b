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

from glm_ms.convert.errors import CheckpointError, capped
from glm_ms.convert.mindspore_file import MindSporeFile
from glm_ms.convert.run_folder import list_checkpoints
from glm_ms.convert.safetensors_file import SafetensorsFile
from glm_ms.convert.tensor_file import TensorFile, TensorInfo

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
        self._home: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self._home:
                    raise CheckpointError(
                        f"{file.path}: {name} is also in {self._home[name].path.name}; "
                        "leave one checkpoint in the folder"
                    )
                self._home[name] = file

    def names(self) -> list[str]:
        """Stored names, in the order of the files."""
        return list(self._home)

    def holds(self, name: str) -> bool:
        """Whether the rank has a tensor of that name."""
        return name in self._home

    def info(self, name: str) -> TensorInfo:
        """Shape and element type of a tensor."""
        return self._home[name].entries[name]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._home[name].path

    def read(self, name: str) -> np.ndarray:
        """A fresh array in the storage type of its dtype; no file stays open."""
        file = self._home[name]
        try:
            return file.read(name)
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
    return [RankCheckpoint(rank, folders[rank], list(_open(files[rank])), chosen) for rank in range(count)]


def open_whole(path: Path, step: Step, say: Callable[[str], None]) -> RankCheckpoint:
    """Opens a checkpoint that is not cut: a file, a folder with its files, or a folder with rank_0 alone.

    Raises:
        CheckpointError: there is none, or there are several ranks.
    """
    if path.is_file():
        if path.suffix not in _READERS:
            raise CheckpointError(f"{path}: must end in {' or '.join(_READERS)}")
        return RankCheckpoint(0, path, list(_open([path])), None)
    folders = rank_folders(path) if path.is_dir() else {}
    if len(folders) > 1:
        raise CheckpointError(
            f"{path}: holds {len(folders)} ranks; give their --src_ckpt_strategy, or one folder such as "
            f"{path / 'rank_0'} where every rank holds the whole checkpoint"
        )
    folder = next(iter(folders.values()), path)
    by_step = _files_by_step(folder)
    chosen = _choose_step(folder, [by_step], step, say)
    return RankCheckpoint(0, folder, list(_open(by_step[chosen])), chosen)


def rank_folders(folder: Path) -> dict[int, Path]:
    """Rank -> its folder.

    Raises:
        CheckpointError: no such folder, or two folders of one rank (rank_1 and rank_01).
    """
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
    return "(none named)" if step is None else f"{step[0]}_{step[1]}"


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
