"""Merges, splits and re-splits the checkpoints of a cluster by MindSpore's strategy files, one tensor at a time.

`mindspore.transform_checkpoints` does this with all tensors in memory. Here every slice is checked as well: copies must
be equal bit for bit, and the ranks must be of one step. Needs memory for the largest tensor and one of its slices.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from glm_ms.convert.adapter_files import adapter_files_of, common_companions
from glm_ms.convert.cluster.layout import Layout
from glm_ms.convert.cluster.placement import FORMATS, Placement
from glm_ms.convert.cluster.rank_folders import (
    KnownFiles,
    RankCheckpoint,
    Say,
    Step,
    open_ranks,
    open_whole,
    rank_folders,
    read_rank_manifests,
)
from glm_ms.convert.cluster.strategy_file import Strategy, read_strategy
from glm_ms.convert.cluster.tensor_plan import TensorPlan, plan_tensors
from glm_ms.convert.dtypes import DTYPES
from glm_ms.convert.names import is_training_state
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.convert.writers import check_space
from glm_ms.storage.atomic import atomic_output, check_target
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import check_listed
from glm_ms.storage.run_folder import SLICES, resolve_checkpoint

# Scalars that count steps, for the error message if ranks differ.
_PROGRESS = frozenset({"global_step", "epoch_num", "step_num", "current_iterator_step"})


@dataclass(frozen=True)
class Resharding:
    """A transformation that passed all checks of names, shapes and types; `run` executes it.

    Attributes:
        companions: file name -> content of files that describe the tensors, for the output.
        known: size and SHA-256 of the files of the source, from manifests.
        verify: compare all copies of a slice, and every file with its manifest.
    """

    source: list[RankCheckpoint]
    output: Path
    placement: Placement
    tensors: list[TensorPlan]
    companions: dict[str, bytes]
    known: KnownFiles
    verify: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each counted whole and once."""
        return sum(plan.whole.nbytes for plan in self.tensors)

    @property
    def files(self) -> list[Path]:
        """The files to read."""
        return sorted({rank.file(plan.name) for plan in self.tensors for rank in plan.holders})

    @property
    def checked_bytes(self) -> int:
        """Bytes of the files to compare with a manifest."""
        return sum(self.known[file]["bytes"] for file in self.files if self.verify and file in self.known)

    def run(self, on_bytes: Callable[[int], None] = lambda size: None) -> None:
        """Checks the files, then reads, checks and writes the tensors one by one.

        Calls `on_bytes` with the bytes of each file (`checked_bytes` in all) and of each whole tensor (`total_bytes` in
        all) that is done.

        Raises:
            CheckpointError: copies of a slice differ, a file is damaged or cannot be read, or the output cannot be
                written; `output` does not exist then.
        """
        for file in self.files if self.verify else ():
            check_listed(file)
            on_bytes(self.known[file]["bytes"] if file in self.known else 0)
        announced: list[dict[str, TensorInfo]] = [{} for _ in range(self.placement.ranks)]
        for plan in self.tensors:
            for target in plan.targets:
                announced[target.rank][plan.name] = target.info
        needed = sum(info.nbytes for tensors in announced for info in tensors.values())
        joiner = _Joiner(self.verify)
        with atomic_output(self.output, folder=True, overwrite=_is_empty(self.output), parents=True) as work:
            check_space(work, self.output, needed)
            for rank, tensors in enumerate(announced):
                self.placement.create(work, rank, tensors)
            for plan in self.tensors:
                self._write(work, plan, joiner.join(plan))
                on_bytes(plan.whole.nbytes)
            joiner.finish()
            for name, content in self.companions.items():
                for file in self.placement.companion_files(name):
                    (work / file).write_bytes(content)

    def _write(self, work: Path, plan: TensorPlan, whole: np.ndarray) -> None:
        for target in plan.targets:
            part = whole if target.info == plan.whole else np.ascontiguousarray(whole[target.region])
            self.placement.append(work, target.rank, plan.name, target.info, part)


class _Joiner:
    """Joins tensors from their slices, and detects splits of the strategy that the checkpoint does not have."""

    def __init__(self, verify: bool) -> None:
        self._verify = verify
        # Descriptions of splits: equal parts seen so far, with a tensor and two ranks; and those with different parts.
        self._alike: dict[str, tuple[str, RankCheckpoint, RankCheckpoint]] = {}
        self._distinct: set[str] = set()

    def join(self, plan: TensorPlan) -> np.ndarray:
        """The whole tensor, in the storage type of its dtype."""
        if plan.layout is None or set(plan.layout.pieces) <= {1}:
            return self._join_copies(plan)
        whole = np.empty(plan.whole.shape, DTYPES[plan.whole.dtype].storage)
        first: dict[tuple[int, ...], RankCheckpoint] = {}
        for number, rank in enumerate(plan.holders):
            position = plan.layout.position(number)
            region = plan.layout.region(plan.whole.shape, number)
            if position not in first:
                first[position] = rank
                whole[region] = rank.read(plan.name)
            elif self._verify and not _same_bits(whole[region], rank.read(plan.name)):
                pair = first[position], rank
                raise _differ(plan, *pair, _copied(plan, plan.layout, position, *pair))
        if self._verify:
            self._compare_parts(plan, plan.layout, whole)
        return whole

    def finish(self) -> None:
        """Raises `CheckpointError` if the parts of some split are equal in every tensor that is split this way."""
        for cut, (name, left, right) in self._alike.items():
            if cut not in self._distinct:
                raise CheckpointError(
                    f"{right.file(name)}: {name}: the strategy splits it {cut}, but ranks {left.rank} and {right.rank} "
                    "have the same numbers, also in every other tensor split this way: the strategy is not of this "
                    "checkpoint (or allow it: --no_verify). If each rank has all weights (integrated_save), give "
                    "one rank's folder as --src_ckpt_dir, without --src_ckpt_strategy"
                )

    def _join_copies(self, plan: TensorPlan) -> np.ndarray:
        whole = plan.holders[0].read(plan.name)
        # Tensors that no strategy lists may differ between ranks, so they are always compared.
        if self._verify or plan.layout is None:
            for rank in plan.holders[1:]:
                if not _same_bits(whole, rank.read(plan.name)):
                    raise _differ(plan, plan.holders[0], rank)
        return whole

    def _compare_parts(self, plan: TensorPlan, layout: Layout, whole: np.ndarray) -> None:
        cuts = {cut: ranks for cut, ranks in layout.neighbours().items() if cut not in self._distinct}
        head = whole[layout.region(whole.shape, 0)]
        if not cuts or head.size == 0 or (head == head.flat[0]).all():
            return  # constant tensors, such as zeros, prove nothing
        for cut, ranks in cuts.items():
            if all(_same_bits(head, whole[layout.region(whole.shape, rank)]) for rank in ranks):
                self._alike.setdefault(cut, (plan.name, plan.holders[0], plan.holders[ranks[0]]))
            else:
                self._distinct.add(cut)


def plan_resharding(
    src_ckpt_dir: str | Path,
    dst_ckpt_dir: str | Path,
    *,
    prefix: str,
    src_strategy: str | Path | None = None,
    dst_strategy: str | Path | None = None,
    kind: str | None = None,
    step: Step = None,
    partial: bool = False,
    weights_only: bool = False,
    verify: bool = True,
    say: Say,
) -> Resharding:
    """Opens the source and checks names, shapes, types and the output.

    Args:
        src_ckpt_dir: folder with rank_0, rank_1, ...; without `src_strategy` a whole checkpoint: a file, a folder
            with it, or with rank_0 alone.
        dst_ckpt_dir: folder to create; must be missing or empty.
        prefix: file names are `<prefix><rank>.<kind>` in folders rank_<rank>. A merged adapter has the files of a
            run that trains one instead, in `dst_ckpt_dir` itself.
        src_strategy, dst_strategy: strategy file or folder (`read_strategy`); None for a whole checkpoint.
        kind: one of `FORMATS`; None for that of the source.
        step: (epoch, step) in the file names; None for the newest that all ranks have.
        partial: allow checkpoints and strategies to have different weights.
        weights_only: leave out optimizer state and training counters.
        verify: compare all copies of every slice, and every file with its manifest.
        say: receives lines about choices and omissions.

    Raises:
        CheckpointError: ranks, slices or strategies are missing, damaged or do not fit each other, or the output
            cannot be created.
    """
    if src_strategy is None and dst_strategy is None:
        raise CheckpointError(
            f"{src_ckpt_dir}: nothing to do without a strategy; give --src_ckpt_strategy to merge, "
            "--dst_ckpt_strategy to split, or both"
        )
    output = Path(dst_ckpt_dir)
    _check_output(output, prefix, kind)
    src = read_strategy(src_strategy) if src_strategy is not None else None
    dst = read_strategy(dst_strategy) if dst_strategy is not None else None
    source = _open_source(Path(src_ckpt_dir), src, step, say)
    folders = [rank.place for rank in source]
    known, companions = read_rank_manifests(folders), common_companions(folders)
    if dst is None:
        placement = _placement_of_merged(source, companions, prefix, kind, say)
    else:
        placement = Placement(prefix, kind or _kind_of(source), dst.ranks)
    tensors = plan_tensors(source, src, dst, say, partial, weights_only)
    for plan in tensors:
        if plan.whole.dtype not in DTYPES:
            file = plan.holders[0].file(plan.name)
            raise CheckpointError(f"{file}: {plan.name}: type {plan.whole.dtype} cannot be read")
    return Resharding(source, output, placement, tensors, companions, known, verify)


def _check_output(output: Path, prefix: str, kind: str | None) -> None:
    """Raises CheckpointError if files of these names cannot be written there."""
    if not prefix or Path(prefix).name != prefix:
        raise CheckpointError(f"--prefix {prefix!r}: must be the start of a file name, such as checkpoint_")
    if kind is not None and kind not in FORMATS:
        raise CheckpointError(f"--format {kind!r}: must be {' or '.join(FORMATS)}")
    if output.is_dir() and not _is_empty(output):
        raise CheckpointError(f"{output}: exists already and is not empty; choose another folder or remove it")
    check_target(output, folder=True, overwrite=_is_empty(output))


def _open_source(path: Path, strategy: Strategy | None, step: Step, say: Say) -> list[RankCheckpoint]:
    """The checkpoint of every rank of a strategy, in the folder of ranks or the output folder of a run; without a
    strategy a whole one."""
    if strategy is None:
        path = resolve_checkpoint(path) if path.is_dir() and not rank_folders(path) else path
        return [open_whole(path, step, say)]
    if path.is_dir() and not rank_folders(path) and (path / SLICES).is_dir():
        path = path / SLICES
    return open_ranks(path, strategy.ranks, step, say)


def _placement_of_merged(
    source: list[RankCheckpoint], companions: Collection[str], prefix: str, kind: str | None, say: Say
) -> Placement:
    """One checkpoint, or the files of an adapter if the source is one."""
    weights = {name for rank in source for name in rank.tensors if not is_training_state(name)}
    adapter = adapter_files_of(weights)
    if adapter is not None and adapter.config not in companions:
        say(
            f"{source[0].place}: an adapter without {adapter.config}: only its tensors are written; to load them, "
            "first copy that file from its training there"
        )
        adapter = None
    if adapter is None:
        return Placement(prefix, kind or _kind_of(source), 1)
    if kind == "ckpt":
        raise CheckpointError(
            f"--format ckpt: {source[0].place} has an adapter, which is merged into {adapter.weights} and "
            f"{adapter.config}; leave --format out"
        )
    return Placement(prefix, "safetensors", 1, adapter)


def _kind_of(source: list[RankCheckpoint]) -> str:
    kinds = sorted({file.path.suffix[1:] for rank in source for file in rank.files})
    if len(kinds) > 1:
        raise CheckpointError(f"{source[0].folder}: has files of both formats; choose that of the output with --format")
    return kinds[0]


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    bits = np.dtype(f"u{left.dtype.itemsize}")
    return bool(np.array_equal(left.view(bits), right.view(bits)))


def _copied(plan: TensorPlan, layout: Layout, position: tuple[int, ...], *suspects: RankCheckpoint) -> str:
    """For the error message: which of two ranks has the part of another rank in place of that at `position`."""
    for rank in suspects:
        held = rank.read(plan.name)
        for number, other in enumerate(plan.holders):
            if layout.position(number) != position and _same_bits(held, other.read(plan.name)):
                return f" (rank {rank.rank} has the same numbers as rank {other.rank})"
    return ""


def _differ(plan: TensorPlan, left: RankCheckpoint, right: RankCheckpoint, more: str = "") -> CheckpointError:
    name = plan.name
    where = f"{left.file(name)} and {right.file(name)}: {name}: ranks {left.rank} and {right.rank}"
    if name in _PROGRESS:
        values = [rank.read(name).reshape(-1)[:1].tolist() for rank in (left, right)]
        return CheckpointError(
            f"{where} are of different steps ({values[0]} and {values[1]}); give checkpoints of one step"
        )
    if plan.layout is None:
        return CheckpointError(
            f"{where} differ, and the strategy does not list it; one is of another step or run, or the strategy was "
            "saved for trainable parameters only (save it with strategy_ckpt_config only_trainable_params: False)"
        )
    return CheckpointError(
        f"{where} should have the same part, but differ; one of these files is of another step or run, or was swapped "
        f"with that of another rank, or the strategy is not of this checkpoint{more}"
    )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
