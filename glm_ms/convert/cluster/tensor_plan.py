"""Plans a transformation of sharded checkpoints: the sources and the destinations of every tensor.

Only names, shapes and types are read, so that most errors are found before anything is written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Callable

from glm_ms.convert.adapter_files import adapter_files_of
from glm_ms.convert.cluster.layout import Layout, LayoutError, Region
from glm_ms.convert.cluster.rank_folders import RankCheckpoint
from glm_ms.convert.cluster.strategy_file import Strategy
from glm_ms.convert.names import is_training_state
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.storage.errors import CheckpointError, capped

Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """One part of a tensor in the output: the rank, and the region of the whole tensor."""

    rank: int
    info: TensorInfo
    region: Region


@dataclass(frozen=True)
class TensorPlan:
    """One tensor.

    Attributes:
        name: as stored.
        whole: shape and type of the whole tensor.
        layout: how it is split over `holders`; None if each of them has the whole.
        holders: with a layout all ranks of one stage in order, else every rank that has it.
        targets: parts of the output.
    """

    name: str
    whole: TensorInfo
    layout: Layout | None
    holders: tuple[RankCheckpoint, ...]
    targets: tuple[Target, ...]


def plan_tensors(
    source: list[RankCheckpoint],
    src: Strategy | None,
    dst: Strategy | None,
    say: Say,
    partial: bool = False,
    weights_only: bool = False,
) -> list[TensorPlan]:
    """Plans every tensor, in the order in which the ranks store them.

    Args:
        source: all ranks of `src`; a single whole checkpoint if `src` is None.
        src: layouts of the source.
        dst: layouts of the output; None for one whole checkpoint.
        say: receives what is left out, and why.
        partial: allow checkpoints and strategies to have different weights.
        weights_only: leave out optimizer state and training counters.

    Raises:
        CheckpointError: slices are missing, differ in shape or type, or do not fit a strategy.
    """
    names = list(dict.fromkeys(name for rank in source for name in rank.names()))
    if weights_only:
        state = [name for name in names if is_training_state(name)]
        names = [name for name in names if not is_training_state(name)]
        if state:
            say(f"leaving out {len(state)} tensors of optimizer and training state")
    if not names:
        raise CheckpointError(f"{source[0].folder}: no tensors to transform")
    dropped: set[str] = set()
    if src is not None:
        _check_source(names, source, src, say, partial)
    if dst is not None:
        dropped = _left_out(names, source, src, dst, say, partial)
        _check_output(names, source, dst, say, partial)
    return [_plan(name, source, src, dst) for name in names if name not in dropped]


def _plan(name: str, source: list[RankCheckpoint], src: Strategy | None, dst: Strategy | None) -> TensorPlan:
    layout, holders = _holders(name, source, src)
    part = _common_info(name, holders)
    try:
        whole = TensorInfo(layout.whole_shape(part.shape) if layout else part.shape, part.dtype)
    except LayoutError as error:
        raise CheckpointError(
            f"{holders[0].file(name)}: {name}: {error}; {src.path if src else ''} is not of this checkpoint"
        ) from None
    return TensorPlan(name, whole, layout, holders, _targets(name, whole, dst))


def _holders(
    name: str, source: list[RankCheckpoint], src: Strategy | None
) -> tuple[Layout | None, tuple[RankCheckpoint, ...]]:
    """Ranks that have a tensor: those of the first stage with it in the strategy, else all that store it."""
    having = [rank for rank in source if rank.has(name)]
    if src is None:
        return None, tuple(having)
    stages = src.stages_with(name)
    if stages:
        ranks = source[stages[0] * src.devices : (stages[0] + 1) * src.devices]
        _check_complete(name, ranks)
        return src.layout(name, stages[0]), tuple(ranks)
    for stage in {src.stage_of(rank.rank) for rank in having}:
        _check_complete(name, source[stage * src.devices : (stage + 1) * src.devices])
    return None, tuple(having)


def _check_complete(name: str, ranks: list[RankCheckpoint]) -> None:
    missing = [rank for rank in ranks if not rank.has(name)]
    if missing:
        numbers = capped([str(rank.rank) for rank in missing])
        raise CheckpointError(
            f"{missing[0].folder}: {name}: missing on rank {numbers}, but other ranks of the cluster have it; "
            "the file is of another stage or run, or incomplete"
        )


def _common_info(name: str, holders: tuple[RankCheckpoint, ...]) -> TensorInfo:
    """Shape and type of a tensor, which must be equal on all ranks."""
    counts = Counter(rank.info(name) for rank in holders)
    usual, _ = counts.most_common(1)[0]
    for rank in holders:
        if rank.info(name) != usual:
            other = next(one for one in holders if one.info(name) == usual)
            raise CheckpointError(
                f"{rank.file(name)}: {name}: {_text(rank.info(name))} on rank {rank.rank}, but {_text(usual)} on rank "
                f"{other.rank}; the slices of a tensor are equal in shape and type, so one is of another run"
            )
    return usual


def _targets(name: str, whole: TensorInfo, dst: Strategy | None) -> tuple[Target, ...]:
    everything = tuple(slice(0, size) for size in whole.shape)
    if dst is None:
        return (Target(0, whole, everything),)
    stages = dst.stages_with(name)
    if not stages:
        return tuple(Target(rank, whole, everything) for rank in range(dst.ranks))
    targets = []
    for stage in stages:
        layout = dst.layout(name, stage)
        assert layout is not None  # it is in `stages_with`
        try:
            info = TensorInfo(layout.part_shape(whole.shape), whole.dtype)
            targets += [
                Target(stage * dst.devices + rank, info, layout.region(whole.shape, rank))
                for rank in range(dst.devices)
            ]
        except LayoutError as error:
            raise CheckpointError(
                f"{dst.path}: {name}: {error}; the strategy is not of this network, or cuts it too often"
            ) from None
    return tuple(targets)


def _check_source(names: list[str], source: list[RankCheckpoint], src: Strategy, say: Say, partial: bool) -> None:
    """Checks that the checkpoints have every weight of their strategy."""
    absent = _absent(src, names)
    if absent and not partial:
        raise CheckpointError(
            f"{source[0].folder}: {len(absent)} parameters of {src.path} are on no rank: {capped(absent)}; the "
            "strategy is of another network, or the checkpoint has a part of it (then allow it: --partial)"
        )
    shared = sorted(name for name in names if len(src.stages_with(name)) > 1)
    strays = {
        name
        for rank in source
        for name in rank.names()
        if src.layout(name, src.stage_of(rank.rank)) is None and src.stages_with(name)
    }
    for text, found in (
        (f"the checkpoints lack {len(absent)} parameters of {src.path}", absent),
        (f"{len(shared)} tensors shared by several stages are taken from the first", shared),
        (f"ignoring {len(strays)} tensors on ranks of stages that do not use them", sorted(strays)),
    ):
        if found:
            say(f"{text}: {capped(found)}")


def _left_out(
    names: list[str], source: list[RankCheckpoint], src: Strategy | None, dst: Strategy, say: Say, partial: bool
) -> set[str]:
    """Tensors to leave out because the strategy of the output lacks them: state always, weights with `partial`."""
    unknown = [name for name in names if not dst.stages_with(name)]
    state = sorted(name for name in unknown if is_training_state(name) and "." in name)
    weights = [name for name in unknown if name not in state and src is not None and src.stages_with(name)]
    if weights and not partial:
        raise CheckpointError(
            f"{dst.path}: does not know {len(weights)} parameters of {source[0].folder}: {capped(weights)}; it is of "
            "another network (or leave them out: --partial)"
        )
    # Counters, and tensors that neither strategy lists, are equal on all ranks and are copied.
    copied = [name for name in unknown if name not in state and name not in weights]
    for text, found in (
        (f"leaving out {len(state)} optimizer tensors that {dst.path} does not know", state),
        (f"leaving out {len(weights)} parameters that {dst.path} does not know", weights),
        (f"writing {len(copied)} tensors that {dst.path} does not know whole to every rank", copied),
    ):
        if found:
            say(f"{text}: {capped(found)}")
    return {*state, *weights}


def _check_output(names: list[str], source: list[RankCheckpoint], dst: Strategy, say: Say, partial: bool) -> None:
    """Checks that the source has every weight of the strategy of the output."""
    weights = _absent(dst, names)
    if weights and not partial:
        raise CheckpointError(
            f"{source[0].folder}: lacks {len(weights)} parameters of {dst.path}: {capped(weights)}; the strategy is of "
            "another network, or lists buffers such as a cache (then allow it: --partial)"
        )
    if weights:
        say(f"the source lacks {len(weights)} parameters of {dst.path}: {capped(weights)}")
    state = [name for name in dst.names() if name not in names and is_training_state(name)]
    if state:
        say(f"the source lacks {len(state)} optimizer tensors of {dst.path}; they restart from zero")


def _absent(strategy: Strategy, names: list[str]) -> list[str]:
    """Weights of a strategy that are not in `names`; for an adapter, only weights of its kind."""
    adapter = adapter_files_of([name for name in names if not is_training_state(name)])
    known = set(names)
    return [
        name
        for name in strategy.names()
        if name not in known and not is_training_state(name) and (adapter is None or adapter.owns(name))
    ]


def _text(info: TensorInfo) -> str:
    return f"{list(info.shape)} {info.dtype}"
