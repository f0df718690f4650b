"""The content of one strategy file, protobuf or JSON, as plain numbers, without MindSpore.

Layout of the protobuf (mindspore/train/node_strategy.proto), field numbers in braces:
    file {2: operators, 3: parameters}; operator {1: name, 2: {1: stage}}; parameter {1: name, 2: layout};
    layout {1: device matrix, 2: tensor map, 3: uneven parts, 5: fields, 6: optimizer step, 7: optimizer size},
where 1, 2 and 3 are lists of {1: numbers}. JSON files have the same under names.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_ms.convert.protobuf import encode, fields, varint
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.readers import parse_json


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
    message = _message(data)
    stages = [_message(stage).get(1) for item in message.get(2, ()) for stage in _message(item).get(2, ())]
    layouts: dict[str, RawLayout] = {}
    for item in message.get(3, ()):
        parameter = _message(item)
        name = b"".join(parameter.get(1, ())).decode("utf-8")
        if not name or 2 not in parameter:
            raise ValueError(f"parameter {name!r} has no layout")
        if name in layouts:
            raise ValueError(f"{name} is listed twice")
        layout = _message(parameter[2][-1])
        layouts[name] = RawLayout(
            dev_matrix=[number for dims in layout.get(1, ()) for number in _dims(dims)],
            tensor_map=[_dims(dims) for dims in layout.get(2, ())],
            param_split_shape=[number for dims in layout.get(3, ()) for number in _dims(dims)],
            field=_signed(layout.get(5, [0])[-1]),
            opt_weight_shard_step=_signed(layout.get(6, [0])[-1]),
            opt_weight_shard_size=_signed(layout.get(7, [0])[-1]),
        )
    return RawStrategy(next((stage[0] for stage in stages if stage), None), layouts)


def _message(data: bytes) -> dict[int, list[Any]]:
    """Field number -> its values, integers or bytes."""
    found: dict[int, list[Any]] = {}
    for number, value in fields(io.BytesIO(data), 0, len(data)):
        found.setdefault(number, []).append(value if isinstance(value, int) else data[value[0] : sum(value)])
    return found


def _dims(data: bytes) -> list[int]:
    """A list of numbers, packed into bytes or not."""
    message = _message(data)
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
