"""Parallel strategies: checked layouts from one strategy file, or from a folder with those of all ranks.

Layout of the protobuf files (mindspore/train/node_strategy.proto), field numbers in braces:
    file {2: operators, 3: parameters}; operator {1: name, 2: {1: stage}}; parameter {1: name, 2: layout};
    layout {1: device matrix, 2: tensor map, 3: uneven parts, 5: fields, 6: optimizer step, 7: optimizer size},
where 1, 2 and 3 are lists of {1: numbers}. JSON files have the same under names.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from glm_ms.convert.cluster.layout import Layout, LayoutError
from glm_ms.convert.names import is_training_state
from glm_ms.convert.protobuf import encode, fields, varint
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.integrity import differing_keys
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import parse_json
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

    def layouts(self, name: str) -> dict[int, Layout]:
        """Stage -> layout of a parameter on all stages that have it; stages can share one."""
        found = ((stage, self.layout(name, stage)) for stage in range(len(self.stages)))
        return {stage: layout for stage, layout in found if layout is not None}

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
    if problem := path_problem(str(path)):
        raise CheckpointError(problem)
    path = Path(path)
    if path.is_dir():
        return _read_folder(path / STRATEGIES if (path / STRATEGIES).is_dir() else path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such strategy file or folder")
    stage, layouts = _parsed(path, _content(path))
    if _is_merged(layouts):
        stages: dict[int, dict[str, Layout]] = {}
        for staged, layout in layouts.items():
            number, name = staged.split("-", 1)
            stages.setdefault(int(number), {})[name] = layout
        return _checked(path, stages)
    if stage:
        raise CheckpointError(
            f"{path}: has pipeline stage {stage} alone; give the folder with the files of all ranks, or the "
            "file of mindspore.merge_pipeline_strategys"
        )
    return _checked(path, {0: layouts})


def _read_folder(folder: Path) -> Strategy:
    found = [file for ending in _ENDINGS for file in [*folder.glob(f"*{ending}"), *folder.glob(f"rank_*/*{ending}")]]
    found = sorted(file for file in found if file.is_file())
    if not found:
        raise CheckpointError(f"{folder}: has no strategy file (*.ckpt or *.json)")
    # A merged file may be beside the files it was made from.
    files = [file for file in found if _RANK.search(file.name)] or found
    if len(files) == 1:
        return replace(read_strategy(files[0]), path=folder)
    parsed: dict[bytes, tuple[int | None, dict[str, Layout]]] = {}  # the ranks of a stage save the same bytes
    members: list[tuple[Path, int | None, dict[str, Layout]]] = []
    for file in files:
        content = _content(file)
        if content not in parsed:
            parsed[content] = _parsed(file, content)
            if _is_merged(parsed[content][1]):
                raise CheckpointError(f"{file}: is merged over the stages; give this file, not its folder")
        members.append((file, *parsed[content]))
    devices = max(layout.devices for _, layouts in parsed.values() for layout in layouts.values())
    stages: dict[int, tuple[Path, dict[str, Layout]]] = {}
    for file, stated, layouts in members:
        stage = _stage_in_folder(file, stated, devices)
        other, known = stages.setdefault(stage, (file, layouts))
        if known != layouts:
            raise CheckpointError(
                f"{file}: differs from {other.name}, which is of the same pipeline stage {stage}: "
                f"{capped(differing_keys(known, layouts))}; they are of different runs, keep the files of one"
            )
    return _checked(folder, {stage: layouts for stage, (_, layouts) in stages.items()})


def _stage_in_folder(file: Path, stated: int | None, devices: int) -> int:
    """The stage stated in a file, compared with the rank in its name."""
    match = _RANK.search(file.name)
    by_name = int(match.group(1)) // devices if match else stated
    if by_name is None:
        raise CheckpointError(
            f"{file}: neither its content nor its name has the pipeline stage; add rank_N to its name"
        )
    if stated is not None and stated != by_name:
        raise CheckpointError(
            f"{file}: of pipeline stage {stated}, but with {devices} ranks per stage its name means stage {by_name}; "
            "it was renamed or is of another run"
        )
    return by_name


def _is_merged(layouts: dict[str, Layout]) -> bool:
    return all(_STAGED.fullmatch(name) for name in layouts)


def _checked(path: Path, stages: dict[int, dict[str, Layout]]) -> Strategy:
    """Checks that no stage is missing and that all layouts have the same number of ranks per stage."""
    missing = [str(stage) for stage in range(max(stages)) if stage not in stages]
    if missing and path.is_dir():
        raise CheckpointError(
            f"{path}: no strategy file of pipeline stage {capped(missing)}; add the file of one of its ranks"
        )
    if missing:
        raise CheckpointError(f"{path}: lacks pipeline stage {capped(missing)}; merge the files of all stages")
    devices = max(layout.devices for layouts in stages.values() for layout in layouts.values())
    for stage, layouts in stages.items():
        for name, layout in layouts.items():
            if devices % layout.devices:
                raise CheckpointError(
                    f"{path}: {name} (stage {stage}) is on {layout.devices} ranks, others on {devices}; "
                    "the file is damaged or has layouts of different clusters"
                )
    return Strategy(path, tuple(stages[stage] for stage in range(len(stages))), devices)


class _RawLayout(NamedTuple):
    """Layout of one parameter, unchecked; names as in the file format."""

    dev_matrix: list[int]
    tensor_map: list[list[int]]
    param_split_shape: list[int]
    field: int
    opt_weight_shard_step: int
    opt_weight_shard_size: int
    tensor_shape: list[int] | None


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise CheckpointError(f"{path}: empty; save the strategy again")
    return content


def _parsed(path: Path, content: bytes) -> tuple[int | None, dict[str, Layout]]:
    """The pipeline stage of the operators in one file (None without operators), and its layouts by parameter."""
    try:
        stage, raw_layouts = _from_json(content) if path.suffix == ".json" else _from_protobuf(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a strategy file, or damaged ({error}); "
            "MindSpore writes it where strategy_ckpt_config.save_file says"
        ) from None
    if not raw_layouts:
        raise CheckpointError(f"{path}: lists no parameters; it is not a strategy file, or of an empty graph")
    layouts = {}
    for name, raw in raw_layouts.items():
        try:
            layouts[name] = _layout(raw)
        except LayoutError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
    return stage, layouts


def _layout(raw: _RawLayout) -> Layout:
    if raw.field > 0:
        raise LayoutError("an embedding split by fields, which cannot be transformed")
    if raw.param_split_shape:
        raise LayoutError("split into uneven parts, which cannot be transformed")
    matrix = tuple(raw.dev_matrix)
    if len(raw.tensor_map) > 1:  # one list per dimension: several axes split a dimension
        per_dimension = [numbers for numbers in raw.tensor_map if numbers]
    else:
        per_dimension = [[number] for numbers in raw.tensor_map for number in numbers]
    # JSON writes such a dimension as several dimensions; `Layout` refuses it because the shape does not fit.
    shape = None if raw.tensor_shape is None else tuple(raw.tensor_shape)
    tensor_map = tuple(
        tuple(len(matrix) - 1 - number for number in numbers if number != -1) for numbers in per_dimension
    )
    plain = Layout(matrix, tensor_map, 1, shape)
    step, size = raw.opt_weight_shard_step, raw.opt_weight_shard_size
    if not step or not size:
        return plain
    repeated = plain.repeated_axes
    if len(repeated) == 1 and step != math.prod(matrix[repeated[0] + 1 :]):
        raise LayoutError(f"optimizer step {step} does not fit device matrix {raw.dev_matrix}")
    copies = math.prod(matrix[axis] for axis in repeated)
    return replace(plain, optimizer_pieces=copies if size == -1 else size)


def _from_json(content: bytes) -> tuple[int | None, dict[str, _RawLayout]]:
    document = parse_json(content.decode("utf-8-sig"), "JSON")
    operators = document.get("parallel_strategy_item") or {}
    layouts = {
        name: _RawLayout(
            _numbers(item["dev_matrix"]),
            [_numbers(item["tensor_map"])],
            _numbers(item.get("param_split_shape", [])),
            int(item["field"]),
            int(item["opt_weight_shard_step"]),
            int(item["opt_weight_shard_size"]),
            _numbers(item["tensor_shape"]) if "tensor_shape" in item else None,
        )
        for name, item in document["parallel_layout_item"].items()
    }
    return next((int(item["stage"]) for item in operators.values()), None), layouts


def _numbers(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"{value!r} is not a list of whole numbers")
    return value


def _from_protobuf(content: bytes) -> tuple[int | None, dict[str, _RawLayout]]:
    message = _message(content)
    stages = [_message(stage).get(1) for item in message.get(2, ()) for stage in _message(item).get(2, ())]
    layouts: dict[str, _RawLayout] = {}
    for item in message.get(3, ()):
        parameter = _message(item)
        name = b"".join(parameter.get(1, ())).decode("utf-8")
        if not name or 2 not in parameter:
            raise ValueError(f"parameter {name!r} has no layout")
        if name in layouts:
            raise ValueError(f"{name} is listed twice")
        layout = _message(parameter[2][-1])
        layouts[name] = _RawLayout(
            [number for dims in layout.get(1, ()) for number in _dims(dims)],
            [_dims(dims) for dims in layout.get(2, ())],
            [number for dims in layout.get(3, ()) for number in _dims(dims)],
            _signed(layout.get(5, [0])[-1]),
            _signed(layout.get(6, [0])[-1]),
            _signed(layout.get(7, [0])[-1]),
            None,
        )
    return next((stage[0] for stage in stages if stage), None), layouts


def _message(content: bytes) -> dict[int, list[Any]]:
    """Field number -> its values, integers or bytes."""
    found: dict[int, list[Any]] = {}
    for number, value in fields(io.BytesIO(content), 0, len(content)):
        found.setdefault(number, []).append(value if isinstance(value, int) else content[value[0] : sum(value)])
    return found


def _dims(content: bytes) -> list[int]:
    """A list of numbers, packed into bytes or not."""
    message = _message(content)
    if message.keys() - {1}:
        raise ValueError(f"fields {sorted(message)} in a list of numbers")
    found = []
    for value in message.get(1, ()):
        packed = io.BytesIO(value if isinstance(value, bytes) else encode(value))
        while packed.tell() < len(packed.getbuffer()):
            found.append(_signed(varint(packed)))
    return found


def _signed(value: int) -> int:
    """A signed number; protobuf writes negative ones as 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
