"""Plans a transformation of sharded checkpoints: the sources and the destinations of every tensor.

Only names, shapes and types are read, so that most errors are found before anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from glm_ms.convert.adapter_files import adapter_files_of
from glm_ms.convert.cluster.layout import Layout, LayoutError, Region
from glm_ms.convert.cluster.rank_folders import RankCheckpoint, Say
from glm_ms.convert.cluster.strategy_file import Strategy
from glm_ms.convert.names import is_training_state
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.storage.errors import CheckpointError, capped


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
        layout: how it is split over `holders`; None if each of them has the whole.
        holders: with a layout all ranks of one stage in order, else every rank that has it.
        targets: parts of the output.
    """

    name: str
    whole: TensorInfo
    layout: Layout | None
    holders: list[RankCheckpoint]
    targets: list[Target]


def plan_tensors(
    source: list[RankCheckpoint],
    src: Strategy | None,
    dst: Strategy | None,
    say: Say,
    partial: bool = False,
    weights_only: bool = False,
) -> list[TensorPlan]:
    """Plans every tensor, in the order in which the ranks store them; for the options see `plan_resharding`.

    `source` has all ranks of `src`, or a single whole checkpoint if `src` is None.

    Raises:
        CheckpointError: slices are missing, differ in shape or type, or do not fit a strategy.
    """
    names = list(dict.fromkeys(name for rank in source for name in rank.tensors))
    if weights_only:
        weights = [name for name in names if not is_training_state(name)]
        if len(weights) < len(names):
            say(f"leaving out {len(names) - len(weights)} tensors of optimizer and training state")
        names = weights
    if not names:
        raise CheckpointError(f"{source[0].folder}: no tensors to transform")
    if src is not None:
        _check_source(names, source, src, say, partial)
    if dst is not None:
        dropped = _left_out(names, source, src, dst, say, partial)
        _check_output(names, source, dst, say, partial)
        names = [name for name in names if name not in dropped]
    return [_plan(name, source, src, dst) for name in names]


def _plan(name: str, source: list[RankCheckpoint], src: Strategy | None, dst: Strategy | None) -> TensorPlan:
    layout, holders = _holders(name, source, src)
    part = _common_info(name, holders)
    try:
        whole = TensorInfo(layout.whole_shape(part.shape), part.dtype) if layout else part
    except LayoutError as error:
        raise CheckpointError(
            f"{holders[0].file(name)}: {name}: {error}; {src.path if src else ''} is not of this checkpoint"
        ) from None
    return TensorPlan(name, whole, layout, holders, _targets(name, whole, dst))


def _holders(
    name: str, source: list[RankCheckpoint], src: Strategy | None
) -> tuple[Layout | None, list[RankCheckpoint]]:
    """Ranks that have a tensor: those of the first stage with it in the strategy, else all that store it."""
    having = [rank for rank in source if name in rank.tensors]
    if src is None:
        return None, having
    layouts = src.layouts(name)
    for stage in list(layouts)[:1] or {src.stage_of(rank.rank) for rank in having}:
        ranks = source[stage * src.devices : (stage + 1) * src.devices]
        missing = [rank for rank in ranks if name not in rank.tensors]
        if missing:
            raise CheckpointError(
                f"{missing[0].folder}: {name}: missing on rank {capped([str(rank.rank) for rank in missing])}, but "
                "other ranks of the cluster have it; the file is of another stage or run, or incomplete"
            )
    return (next(iter(layouts.values())), ranks) if layouts else (None, having)


def _common_info(name: str, holders: list[RankCheckpoint]) -> TensorInfo:
    """Shape and type of a tensor, which must be equal on all ranks."""
    counts = Counter(rank.tensors[name] for rank in holders)
    usual, _ = counts.most_common(1)[0]
    for rank in holders:
        info = rank.tensors[name]
        if info != usual:
            other = next(one for one in holders if one.tensors[name] == usual)
            raise CheckpointError(
                f"{rank.file(name)}: {name}: {info} on rank {rank.rank}, but {usual} on rank {other.rank}; "
                "the slices of a tensor are equal in shape and type, so one is of another run"
            )
    return usual


def _targets(name: str, whole: TensorInfo, dst: Strategy | None) -> list[Target]:
    layouts = dst.layouts(name) if dst else {}
    if dst is None or not layouts:
        everything = tuple(slice(0, size) for size in whole.shape)
        return [Target(rank, whole, everything) for rank in range(dst.ranks if dst else 1)]
    targets = []
    try:
        for stage, layout in layouts.items():
            info = TensorInfo(layout.part_shape(whole.shape), whole.dtype)
            for rank in range(dst.devices):
                targets.append(Target(stage * dst.devices + rank, info, layout.region(whole.shape, rank)))
    except LayoutError as error:
        raise CheckpointError(
            f"{dst.path}: {name}: {error}; the strategy is not of this network, or cuts it too often"
        ) from None
    return targets


def _check_source(names: list[str], source: list[RankCheckpoint], src: Strategy, say: Say, partial: bool) -> None:
    """Checks that the checkpoints have every weight of their strategy."""
    absent = _absent(src, names)
    if absent and not partial:
        raise CheckpointError(
            f"{source[0].folder}: {len(absent)} parameters of {src.path} are on no rank: {capped(absent)}; the "
            "strategy is of another network, or the checkpoint has a part of it (then allow it: --partial)"
        )
    shared = sorted(name for name in names if len(src.layouts(name)) > 1)
    strays = {
        name
        for rank in source
        for name in rank.tensors
        if src.layout(name, src.stage_of(rank.rank)) is None and src.layouts(name)
    }
    _report(say, f"the checkpoints lack {len(absent)} parameters of {src.path}", absent)
    _report(say, f"{len(shared)} tensors shared by several stages are taken from the first", shared)
    _report(say, f"ignoring {len(strays)} tensors on ranks of stages that do not use them", sorted(strays))


def _left_out(
    names: list[str], source: list[RankCheckpoint], src: Strategy | None, dst: Strategy, say: Say, partial: bool
) -> set[str]:
    """Tensors to leave out because the strategy of the output lacks them: state always, weights with `partial`."""
    unknown = [name for name in names if not dst.layouts(name)]
    state = sorted(name for name in unknown if is_training_state(name) and "." in name)
    weights = [name for name in unknown if name not in state and src is not None and src.layouts(name)]
    if weights and not partial:
        raise CheckpointError(
            f"{dst.path}: does not know {len(weights)} parameters of {source[0].folder}: {capped(weights)}; it is of "
            "another network (or leave them out: --partial)"
        )
    # Counters, and tensors that neither strategy lists, are equal on all ranks and are copied.
    copied = [name for name in unknown if name not in state and name not in weights]
    _report(say, f"leaving out {len(state)} optimizer tensors that {dst.path} does not know", state)
    _report(say, f"leaving out {len(weights)} parameters that {dst.path} does not know", weights)
    _report(say, f"writing {len(copied)} tensors that {dst.path} does not know whole to every rank", copied)
    return {*state, *weights}


def _check_output(names: list[str], source: list[RankCheckpoint], dst: Strategy, say: Say, partial: bool) -> None:
    """Checks that the source has every weight of the strategy of the output."""
    weights = _absent(dst, names)
    if weights and not partial:
        raise CheckpointError(
            f"{source[0].folder}: lacks {len(weights)} parameters of {dst.path}: {capped(weights)}; the strategy is of "
            "another network, or lists buffers such as a cache (then allow it: --partial)"
        )
    _report(say, f"the source lacks {len(weights)} parameters of {dst.path}", weights)
    state = [name for name in dst.names() if name not in names and is_training_state(name)]
    if state:
        say(f"the source lacks {len(state)} optimizer tensors of {dst.path}; they restart from zero")


def _report(say: Say, text: str, names: Sequence[str]) -> None:
    if names:
        say(f"{text}: {capped(names)}")


def _absent(strategy: Strategy, names: list[str]) -> list[str]:
    """Weights of a strategy that are not in `names`; for an adapter, only weights of its kind."""
    known = set(names)
    adapter = adapter_files_of([name for name in names if not is_training_state(name)])
    absent = [name for name in strategy.names() if name not in known and not is_training_state(name)]
    return [name for name in absent if adapter is None or adapter.owns(name)]
