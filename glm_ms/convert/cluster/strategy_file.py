"""Parallel strategies: checked layouts from one strategy file, or from a folder with those of all ranks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from glm_ms.convert.cluster.layout import Layout, LayoutError
from glm_ms.convert.cluster.strategy_wire import RawLayout, RawStrategy, read_raw_strategy
from glm_ms.convert.names import is_training_state
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.run_folder import STRATEGIES

_ENDINGS = (".ckpt", ".json")
_RANK = re.compile(r"rank_?(\d+)", re.IGNORECASE)
_STAGED = re.compile(r"(\d+)-(.+)")  # names in files that MindSpore merged over the pipeline stages


@dataclass(frozen=True)
class Strategy:
    """Layouts of all parameters on a cluster.

    Attributes:
        path: file or folder, as the user gave it.
        stages: per pipeline stage: parameter name -> `Layout`. Ranks of a stage are consecutive.
        devices: ranks of one stage.
    """

    path: Path
    stages: tuple[dict[str, Layout], ...]
    devices: int

    @property
    def ranks(self) -> int:
        """Ranks of all stages."""
        return self.devices * len(self.stages)

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of a rank."""
        return rank // self.devices

    def layout(self, name: str, stage: int) -> Layout | None:
        """Layout of a parameter on a stage; None if the stage does not have it.

        Files saved with `only_trainable_params` have no optimizer state: it is split like its parameter.
        """
        layouts = self.stages[stage]
        if name in layouts:
            return layouts[name]
        return layouts.get(name.partition(".")[2]) if is_training_state(name) else None

    def stages_with(self, name: str) -> list[int]:
        """The stages that have a parameter; stages can share one."""
        return [stage for stage in range(len(self.stages)) if self.layout(name, stage) is not None]

    def names(self) -> list[str]:
        """Every parameter in the file."""
        return list(dict.fromkeys(name for layouts in self.stages for name in layouts))


def read_strategy(path: str | Path) -> Strategy:
    """Reads a strategy.

    Args:
        path: a strategy file (.ckpt protobuf or .json) of any rank of a cluster without pipeline, or one merged
            over the stages (`mindspore.merge_pipeline_strategys`); or a folder with those of the ranks
            (`*rank_N.ckpt`, also in subfolders rank_N), of which one a stage is enough; or the output folder of a
            run, which has such a folder.

    Raises:
        CheckpointError: a file is missing, damaged or inconsistent, files of one stage differ, a stage is missing, or
            a layout is of a kind that cannot be transformed.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path / STRATEGIES if (path / STRATEGIES).is_dir() else path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such strategy file or folder")
    raw = read_raw_strategy(path)
    if _is_merged(raw):
        return _checked(path, _split_merged(path, raw))
    if raw.stage:
        raise CheckpointError(
            f"{path}: has pipeline stage {raw.stage} alone; give the folder with the files of all ranks, or the "
            "file of mindspore.merge_pipeline_strategys"
        )
    return _checked(path, [_layouts(path, raw.layouts)])


def _read_folder(folder: Path) -> Strategy:
    files = _strategy_files(folder)
    if len(files) == 1:
        strategy = read_strategy(files[0])
        return Strategy(folder, strategy.stages, strategy.devices)
    contents: dict[bytes, Path] = {}  # the ranks of a stage save the same bytes
    members: list[tuple[Path, Path]] = []
    parsed: dict[Path, tuple[RawStrategy, dict[str, Layout]]] = {}
    for file in files:
        first = contents.setdefault(file.read_bytes(), file)
        members.append((file, first))
        if first not in parsed:
            raw = read_raw_strategy(first)
            if _is_merged(raw):
                raise CheckpointError(f"{file}: is merged over the stages; give this file, not its folder")
            parsed[first] = (raw, _layouts(first, raw.layouts))
    devices = max(layout.devices for _, layouts in parsed.values() for layout in layouts.values())
    stages: dict[int, tuple[Path, dict[str, Layout]]] = {}
    for file, first in members:
        raw, layouts = parsed[first]
        stage = _stage_in_folder(file, raw.stage, devices)
        other, known = stages.setdefault(stage, (file, layouts))
        if known != layouts:
            raise CheckpointError(
                f"{file}: differs from {other.name}, which is of the same pipeline stage {stage}: "
                f"{_difference(known, layouts)}; they are of different runs, keep the files of one"
            )
    missing = [str(stage) for stage in range(max(stages)) if stage not in stages]
    if missing:
        raise CheckpointError(f"{folder}: no strategy file of pipeline stage {capped(missing)}")
    return _checked(folder, [stages[stage][1] for stage in range(len(stages))])


def _strategy_files(folder: Path) -> list[Path]:
    found = [file for ending in _ENDINGS for file in [*folder.glob(f"*{ending}"), *folder.glob(f"rank_*/*{ending}")]]
    found = sorted(file for file in found if file.is_file())
    if not found:
        raise CheckpointError(f"{folder}: has no strategy file (*.ckpt or *.json)")
    # A merged file may be beside the files it was made from.
    return [file for file in found if _RANK.search(file.name)] or found


def _stage_in_folder(file: Path, stated: int | None, devices: int) -> int:
    """The stage stated in a file, compared with the rank in its name."""
    match = _RANK.search(file.name)
    by_name = int(match.group(1)) // devices if match else None
    if stated is None and by_name is None:
        raise CheckpointError(
            f"{file}: neither its content nor its name has the pipeline stage; add rank_N to its name"
        )
    if stated is not None and by_name is not None and stated != by_name:
        raise CheckpointError(
            f"{file}: of pipeline stage {stated}, but with {devices} ranks per stage its name means stage {by_name}; "
            "it was renamed or is of another run"
        )
    return stated if stated is not None else int(by_name or 0)


def _difference(left: dict[str, Layout], right: dict[str, Layout]) -> str:
    names = sorted(name for name in {*left, *right} if left.get(name) != right.get(name))
    return capped(names)


def _is_merged(raw: RawStrategy) -> bool:
    return all(_STAGED.fullmatch(name) for name in raw.layouts)


def _split_merged(path: Path, raw: RawStrategy) -> list[dict[str, Layout]]:
    stages: dict[int, dict[str, RawLayout]] = {}
    for staged, layout in raw.layouts.items():
        number, name = staged.split("-", 1)
        stages.setdefault(int(number), {})[name] = layout
    missing = [str(stage) for stage in range(max(stages)) if stage not in stages]
    if missing:
        raise CheckpointError(f"{path}: lacks pipeline stage {capped(missing)}; merge the files of all stages")
    return [_layouts(path, stages[stage]) for stage in range(len(stages))]


def _layouts(path: Path, raw: dict[str, RawLayout]) -> dict[str, Layout]:
    layouts = {}
    for name, item in raw.items():
        try:
            layouts[name] = _layout(item)
        except LayoutError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
    return layouts


def _layout(raw: RawLayout) -> Layout:
    """Checks a layout."""
    if raw.field > 0:
        raise LayoutError("an embedding split by fields, which cannot be transformed")
    if raw.param_split_shape:
        raise LayoutError("split into uneven parts, which cannot be transformed")
    axes = len(raw.dev_matrix)
    if len(raw.tensor_map) > 1:  # one list per dimension: several axes split a dimension
        per_dimension = [numbers for numbers in raw.tensor_map if numbers]
    else:
        per_dimension = [[number] for numbers in raw.tensor_map for number in numbers]
    # JSON writes such a dimension as several dimensions; `Layout` refuses it because the shape does not fit.
    shape = tuple(raw.tensor_shape) if raw.tensor_shape is not None else None
    tensor_map = tuple(tuple(axes - 1 - number for number in numbers if number != -1) for numbers in per_dimension)
    plain = Layout(tuple(raw.dev_matrix), tensor_map, 1, shape)
    step, size = raw.opt_weight_shard_step, raw.opt_weight_shard_size
    if not step or not size:
        return plain
    repeated = plain.repeated_axes
    if len(repeated) == 1 and step != math.prod(raw.dev_matrix[repeated[0] + 1 :]):
        raise LayoutError(f"optimizer step {step} does not fit device matrix {raw.dev_matrix}")
    copies = math.prod(raw.dev_matrix[axis] for axis in repeated)
    return Layout(tuple(raw.dev_matrix), tensor_map, copies if size == -1 else size, shape)


def _checked(path: Path, stages: list[dict[str, Layout]]) -> Strategy:
    """Checks that all layouts have the same number of ranks per stage."""
    devices = max(layout.devices for layouts in stages for layout in layouts.values())
    for stage, layouts in enumerate(stages):
        for name, layout in layouts.items():
            if devices % layout.devices:
                raise CheckpointError(
                    f"{path}: {name} (stage {stage}) is on {layout.devices} ranks, others on {devices}; "
                    "the file is damaged or has layouts of different clusters"
                )
    return Strategy(path, tuple(stages), devices)
