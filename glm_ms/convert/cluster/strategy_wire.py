"""The bytes of one strategy file as plain numbers, without MindSpore: protobuf or JSON.

Layout of the protobuf (mindspore/train/node_strategy.proto), field numbers in braces:
    file {2: operators, 3: parameters}; operator {1: name, 2: {1: stage}}; parameter {1: name, 2: layout};
    layout {1: device matrix, 2: tensor map, 3: uneven parts, 5: fields, 6: optimizer step, 7: optimizer size},
where 1, 2 and 3 are lists of {1: numbers}. JSON files hold the same under names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.readers import parse_json

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIGN, _RANGE = 1 << 63, 1 << 64
Value = Union[int, bytes]


@dataclass
class RawLayout:
    """What a strategy file says of one parameter, unchecked; names as in the file format."""

    dev_matrix: list[int] = field(default_factory=list)
    tensor_map: list[list[int]] = field(default_factory=list)
    param_split_shape: list[int] = field(default_factory=list)
    field: int = 0
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0
    tensor_shape: list[int] | None = None


@dataclass
class RawStrategy:
    """One strategy file: the pipeline stage of its operators (None where it has none), and its parameters."""

    stage: int | None
    layouts: dict[str, RawLayout]


def read_raw_strategy(path: Path) -> RawStrategy:
    """Reads one file; by its ending .json or protobuf.

    Raises:
        CheckpointError: it cannot be read, or is no strategy file, or holds no parameters.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise CheckpointError(f"{path}: empty; save the strategy again")
    try:
        raw = _from_json(data) if path.suffix == ".json" else _from_protobuf(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a strategy file, or damaged ({error}); "
            "MindSpore writes it where strategy_ckpt_config.save_file says"
        ) from None
    if not raw.layouts:
        raise CheckpointError(f"{path}: lists no parameters; it is no strategy file, or of an empty graph")
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
    stage: int | None = None
    layouts: dict[str, RawLayout] = {}
    for number, value in _fields(data):
        if number == 2 and stage is None:
            stage = _stage(_bytes(value))
        elif number == 3:
            name, layout = _parameter(_bytes(value))
            if name in layouts:
                raise ValueError(f"{name} is listed twice")
            layouts[name] = layout
    return RawStrategy(stage, layouts)


def _stage(operator: bytes) -> int | None:
    for number, value in _fields(operator):
        if number == 2:
            return next(
                (entry for key, entry in _fields(_bytes(value)) if key == 1 and isinstance(entry, int)), None
            )
    return None


def _parameter(item: bytes) -> tuple[str, RawLayout]:
    name, layout = "", None
    for number, value in _fields(item):
        if number == 1:
            name = _bytes(value).decode("utf-8")
        elif number == 2:
            layout = _layout(_bytes(value))
    if not name or layout is None:
        raise ValueError(f"parameter {name!r} has no layout")
    return name, layout


def _layout(item: bytes) -> RawLayout:
    layout = RawLayout()
    for number, value in _fields(item):
        if number == 1:
            layout.dev_matrix += _dims(_bytes(value))
        elif number == 2:
            layout.tensor_map.append(_dims(_bytes(value)))
        elif number == 3:
            layout.param_split_shape += _dims(_bytes(value))
        elif number == 5:
            layout.field = _integer(value)
        elif number == 6:
            layout.opt_weight_shard_step = _integer(value)
        elif number == 7:
            layout.opt_weight_shard_size = _integer(value)
    return layout


def _dims(item: bytes) -> list[int]:
    found: list[int] = []
    for number, value in _fields(item):
        if number != 1:
            raise ValueError(f"field {number} in a list of numbers")
        if isinstance(value, int):
            found.append(_integer(value))
            continue
        position = 0
        while position < len(value):  # packed
            entry, position = _varint(value, position)
            found.append(_integer(entry))
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire not in (_BYTES, _FIXED32, _FIXED64):
            raise ValueError(f"wire type {wire}")
        length = {_FIXED32: 4, _FIXED64: 8}.get(wire, 0)
        if wire == _BYTES:
            length, position = _varint(data, position)
        if position + length > len(data):
            raise ValueError("ends too early")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("ends too early")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise ValueError("a number has no end")


def _bytes(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _integer(value: Value) -> int:
    """A signed number; protobuf writes negative ones as 64-bit two's complement."""
    if not isinstance(value, int):
        raise ValueError("a message where a number belongs")
    return value - _RANGE if value >= _SIGN else value
