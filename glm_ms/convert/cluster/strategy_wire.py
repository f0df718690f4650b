"""The content of one strategy file, protobuf or JSON, as plain numbers, without MindSpore.

Layout of the protobuf (mindspore/train/node_strategy.proto), field numbers in braces:
    file {2: operators, 3: parameters}; operator {1: name, 2: {1: stage}}; parameter {1: name, 2: layout};
    layout {1: device matrix, 2: tensor map, 3: uneven parts, 5: fields, 6: optimizer step, 7: optimizer size},
where 1, 2 and 3 are lists of {1: numbers}. JSON files have the same under names.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_ms.convert.protobuf import Value, fields, varint
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.readers import parse_json

_INTEGERS = {5: "field", 6: "opt_weight_shard_step", 7: "opt_weight_shard_size"}


@dataclass
class RawLayout:
    """Layout of one parameter, unchecked; names as in the file format."""

    dev_matrix: list[int] = field(default_factory=list)
    tensor_map: list[list[int]] = field(default_factory=list)
    param_split_shape: list[int] = field(default_factory=list)
    field: int = 0
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0
    tensor_shape: list[int] | None = None


@dataclass
class RawStrategy:
    """One strategy file: the pipeline stage of its operators (None without operators), and its parameters."""

    stage: int | None
    layouts: dict[str, RawLayout]


def read_raw_strategy(path: Path) -> RawStrategy:
    """Reads one file, as JSON or protobuf by its ending.

    Raises:
        CheckpointError: it cannot be read, or is not a strategy file, or has no parameters.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise CheckpointError(f"{path}: empty; save the strategy again")
    try:
        raw = _from_json(data) if path.suffix == ".json" else _from_protobuf(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a strategy file, or damaged ({error}); "
            "MindSpore writes it where strategy_ckpt_config.save_file says"
        ) from None
    if not raw.layouts:
        raise CheckpointError(f"{path}: lists no parameters; it is not a strategy file, or of an empty graph")
    return raw


def _from_json(data: bytes) -> RawStrategy:
    document = parse_json(data.decode("utf-8-sig"), "JSON")
    operators = document.get("parallel_strategy_item") or {}
    stage = next((int(item["stage"]) for item in operators.values()), None)
    layouts = {
        name: RawLayout(
            dev_matrix=_numbers(item["dev_matrix"]),
            tensor_map=[_numbers(item["tensor_map"])],
            param_split_shape=_numbers(item.get("param_split_shape", [])),
            field=int(item["field"]),
            opt_weight_shard_step=int(item["opt_weight_shard_step"]),
            opt_weight_shard_size=int(item["opt_weight_shard_size"]),
            tensor_shape=_numbers(item["tensor_shape"]) if "tensor_shape" in item else None,
        )
        for name, item in document["parallel_layout_item"].items()
    }
    return RawStrategy(stage, layouts)


def _numbers(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"{value!r} is not a list of whole numbers")
    return value


def _from_protobuf(data: bytes) -> RawStrategy:
    reader = _Reader(data)
    stage: int | None = None
    layouts: dict[str, RawLayout] = {}
    for number, value in fields(reader.file, 0, len(data)):
        if number == 2 and stage is None:
            stage = reader.stage(value)
        elif number == 3:
            name, layout = reader.parameter(value)
            if name in layouts:
                raise ValueError(f"{name} is listed twice")
            layouts[name] = layout
    return RawStrategy(stage, layouts)


class _Reader:
    """Messages of one strategy file, each given by its span."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        self._data = data

    def fields(self, message: Value) -> Iterator[tuple[int, Value]]:
        if isinstance(message, int):
            raise ValueError("a number in place of a message")
        return fields(self.file, message[0], sum(message))

    def stage(self, operator: Value) -> int | None:
        for number, value in self.fields(operator):
            if number == 2:
                return next(
                    (entry for key, entry in self.fields(value) if key == 1 and isinstance(entry, int)), None
                )
        return None

    def parameter(self, message: Value) -> tuple[str, RawLayout]:
        name, layout = "", None
        for number, value in self.fields(message):
            if number == 1 and not isinstance(value, int):
                name = self._data[value[0] : sum(value)].decode("utf-8")
            elif number == 2:
                layout = self.layout(value)
        if not name or layout is None:
            raise ValueError(f"parameter {name!r} has no layout")
        return name, layout

    def layout(self, message: Value) -> RawLayout:
        layout = RawLayout()
        for number, value in self.fields(message):
            if number == 1:
                layout.dev_matrix += self.dims(value)
            elif number == 2:
                layout.tensor_map.append(self.dims(value))
            elif number == 3:
                layout.param_split_shape += self.dims(value)
            elif number in _INTEGERS:
                setattr(layout, _INTEGERS[number], _signed(value))
        return layout

    def dims(self, message: Value) -> list[int]:
        found: list[int] = []
        for number, value in self.fields(message):
            if number != 1:
                raise ValueError(f"field {number} in a list of numbers")
            if isinstance(value, int):
                found.append(_signed(value))
                continue
            self.file.seek(value[0])
            while self.file.tell() < sum(value):  # packed
                found.append(_signed(varint(self.file)))
        return found


def _signed(value: Value) -> int:
    """A signed number; protobuf writes negative ones as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError("a message in place of a number")
    return value - (1 << 64) if value >= 1 << 63 else value
