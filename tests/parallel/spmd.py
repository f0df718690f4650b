"""Runs what MindSpore's compiler made for every card of a cluster, with NumPy: all cards at once, instruction by
instruction, so that collectives have their partners.

Reads MindSpore's text of the graph after its last optimization. Every result is held to the shape the compiler says.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {
    "Float32": np.float32,
    "Float16": np.float16,
    "Int32": np.int32,
    "Int64": np.int64,
    "Bool": np.bool_,
}
_LINE = re.compile(r"\s+%(\d+)\(([^=]*)\) = (?:PrimFunc_)?(\w+)\((.*)", re.DOTALL)
_RESULT = re.compile(r"-> \(<(?:Ref\[)?Tensor\[(\w+)\]\]?, \(([\d, ]*)\)")
_IGNORED = {"UpdateState", "Assign", "AssignAdd", "Return"}


@dataclass(frozen=True)
class Instruction:
    """One line: result number, name and operator; arguments and attributes as text; (dtype, shape) of the result."""

    number: str
    name: str
    operator: str
    arguments: str
    attributes: str
    result: tuple[type, tuple[int, ...]] | None


def read_graph(folder: Path) -> list[Instruction]:
    """The instructions of the first graph of a card, in order."""
    (file,) = (file for file in folder.rglob("*.ir") if re.fullmatch(r"\d+_optimize_\d+\.ir", file.name))
    text = file.read_text(encoding="utf-8")
    lines = text[text.index("\nsubgraph @") :].splitlines()
    found, i = [], 0
    while i < len(lines) and not lines[i].startswith("}"):
        line = lines[i]
        while _LINE.match(line) and line.count("(") != line.count(")"):
            i += 1
            line += "\n" + lines[i]
        match = _LINE.match(line)
        if match:
            number, name, operator, rest = match.groups()
            arguments, attributes = _closed(rest)
            kind = _RESULT.search(lines[i + 1])
            result = None
            if kind:
                shape = tuple(int(n) for n in kind.group(2).split(",") if n.strip())
                result = (_DTYPES[kind.group(1)], shape)
            found.append(Instruction(number, name, operator, arguments, attributes, result))
        i += 1
    return found


def run(
    graphs: Sequence[list[Instruction]],
    parameters: Sequence[Mapping[str, np.ndarray]],
    constants: Callable[[str, tuple[int, ...]], np.ndarray],
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, Any]]]:
    """Runs the graphs of all cards.

    Args:
        graphs: of each card.
        parameters: of each card: name -> its slice; inputs are `inputs0`, `inputs1`, ...
        constants: (name of the result, shape) -> a constant that the text leaves out.

    Returns:
        Of each card: parameter -> gradient that its optimizer was given; number -> every result.
    """
    values: list[dict[str, Any]] = [{} for _ in graphs]
    gradients: list[dict[str, np.ndarray]] = [{} for _ in graphs]
    assert len({len(graph) for graph in graphs}) == 1
    for lines in zip(*graphs):
        operator = lines[0].operator
        assert {line.operator for line in lines} == {operator}
        if operator in _IGNORED:
            continue
        inputs = [
            [_value(text, values[card], parameters[card], line, constants) for text in _parts(line.arguments)]
            for card, line in enumerate(lines)
        ]
        if operator == "AdamWeightDecay":
            for card, line in enumerate(lines):
                name = re.match(r"%para\d+_(\S+?),", line.arguments).group(1)
                gradients[card][name] = inputs[card][8]
            continue
        if operator in ("AllReduce", "AllGather", "ReduceScatter"):
            results = _collective(operator, lines, [arguments[0] for arguments in inputs])
        else:
            results = [None if None in map(_known, a) else _OPERATORS[operator](*a) for a in inputs]
        for card, (line, result) in enumerate(zip(lines, results)):
            if line.result is not None and result is not None:
                result = np.asarray(result)
                if operator == "StridedSlice":  # `x[i]` leaves an axis out
                    result = result.reshape(line.result[1])
                assert result.shape == line.result[1], (line, result.shape)
                result = result.astype(line.result[0])
            values[card][line.number] = result
    return gradients, values


def _known(value: Any) -> Any:
    """None for what follows from the optimizer's own parameters, which are not looked at."""
    return None if value is None or (isinstance(value, tuple) and any(v is None for v in value)) else True


def _closed(text: str) -> tuple[str, str]:
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0:
            return text[:place], text[place + 1 :]
    raise ValueError(text)


def _parts(text: str) -> list[str]:
    """Arguments between the commas of the outermost level."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()] if text.strip() else []


def _value(
    text: str, values: Mapping[str, Any], parameters: Mapping[str, Any], line: Instruction, constants: Any
) -> Any:
    if text.startswith("%para"):
        name = re.sub(r"^%para\d+_", "", text)
        return parameters.get(name)
    if text.startswith("%"):
        return values.get(text[1:])
    if text.startswith("("):
        return tuple(_value(part, values, parameters, line, constants) for part in _parts(text[1:-1]))
    scalar = re.fullmatch(r"(?:I64|F32|F64|Bool|I32)\((.*)\)", text)
    if scalar:
        return ast.literal_eval(scalar.group(1))
    tensor = re.match(r"Tensor\(shape=\[([\d, ]*)\], dtype=(\w+), value=\s*(.*)\)$", text, re.DOTALL)
    if tensor:
        shape = tuple(int(n) for n in tensor.group(1).split(",") if n.strip())
        if "..." in tensor.group(3):
            return constants(line.name, shape).astype(_DTYPES[tensor.group(2)])
        numbers = [{"True": 1, "False": 0}.get(n, n) for n in re.findall(r"[^\s\[\],]+", tensor.group(3))]
        flat = np.array([float(n) for n in numbers])
        return np.broadcast_to(flat.reshape(shape if flat.size == math.prod(shape) else ()), shape).astype(
            _DTYPES[tensor.group(2)]
        )
    return text


def _collective(
    operator: str, lines: Sequence[Instruction], inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    results = []
    for card, line in enumerate(lines):
        ranks = re.search(r"group_rank_ids: \(([\d, ]+)\)", line.attributes)
        group = [int(n) for n in ranks.group(1).split(",")] if ranks else list(range(len(lines)))
        assert card in group
        parts = [inputs[member] for member in group]
        if operator == "AllGather":
            results.append(np.concatenate(parts))
            continue
        largest = 'op: "max"' in line.attributes
        total = np.max(parts, axis=0) if largest else np.sum(parts, axis=0, dtype=parts[0].dtype)
        results.append(total if operator == "AllReduce" else np.split(total, len(group))[group.index(card)])
    return results


def _axes(axes: Any) -> tuple[int, ...] | None:
    return None if axes in ((), None) else tuple(axes)


def _matmul(x: np.ndarray, y: np.ndarray, transpose_x: int, transpose_y: int) -> np.ndarray:
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    return np.matmul(x, np.swapaxes(y, -1, -2) if transpose_y else y)


def _slice(begin: Sequence[int], end: Sequence[int], strides: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(*place) for place in zip(begin, end, strides))


def _slice_back(dy: np.ndarray, shape: Any, begin: Any, end: Any, strides: Any, *_: Any) -> np.ndarray:
    result = np.zeros(shape, dy.dtype)
    result[_slice(begin, end, strides)] = dy
    return result


def _softmax(x: np.ndarray, axes: Any) -> np.ndarray:
    exp = np.exp(x - x.max(axis=axes, keepdims=True))
    return exp / exp.sum(axis=axes, keepdims=True)


def _one_hot(index: np.ndarray, depth: int, on: np.ndarray, off: np.ndarray, _: int) -> np.ndarray:
    return np.where(index[..., None] == np.arange(depth), on, off)  # nothing for an index outside


def _segments(x: np.ndarray, index: np.ndarray, number: int) -> np.ndarray:
    result = np.zeros((number, *x.shape[index.ndim :]), x.dtype)
    np.add.at(result, index.reshape(-1), x.reshape(-1, *x.shape[index.ndim :]))
    return result


def _same(x: Any, *_: Any) -> Any:
    return x


_OPERATORS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(["Load", "Depend", "_MirrorOperator", "_VirtualDiv", "StopGradient", "Cast", "Partial"], _same),
    **dict.fromkeys(["Add", "Adds"], np.add),
    **dict.fromkeys(["Sub", "Subs"], np.subtract),
    **dict.fromkeys(["Mul", "Muls"], np.multiply),
    **dict.fromkeys(["Div", "Divs", "RealDiv"], np.divide),
    **dict.fromkeys(["MatMul", "BatchMatMul"], _matmul),
    **dict.fromkeys(["Pow", "PowTensorScalar"], np.power),
    "FloorDiv": np.floor_divide, "Square": np.square, "Sqrt": np.sqrt, "Neg": np.negative, "Exp": np.exp,
    "Log": np.log, "Reciprocal": np.reciprocal, "Maximum": np.maximum, "Minimum": np.minimum,
    "Greater": np.greater, "GreaterEqual": np.greater_equal, "Less": np.less, "Equal": np.equal,
    "NotEqual": np.not_equal, "LogicalOr": np.logical_or, "LogicalAnd": np.logical_and,
    "LogicalNot": np.logical_not, "IsFinite": np.isfinite, "Select": np.where,
    "Rsqrt": lambda x: 1 / np.sqrt(x),
    "RsqrtGrad": lambda y, dy: -0.5 * dy * y**3,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SigmoidGrad": lambda y, dy: dy * y * (1 - y),
    "Softmax": _softmax,
    "SoftmaxBackward": lambda dy, y, axis: y * (dy - (dy * y).sum(axis=axis, keepdims=True)),
    "ReduceMean": lambda x, axes, keep: x.mean(axis=_axes(axes), keepdims=bool(keep)),
    "ReduceMax": lambda x, axes, keep: x.max(axis=_axes(axes), keepdims=bool(keep)),
    "ReduceSum": lambda x, axes, keep=0, *_: x.sum(axis=_axes(axes), keepdims=bool(keep), dtype=x.dtype),
    "SumExt": lambda x, axes, keep, _: x.sum(axis=_axes(axes), keepdims=bool(keep), dtype=x.dtype),
    "Reshape": lambda x, shape: x.reshape(shape),
    "Transpose": np.transpose,
    "ExpandDims": np.expand_dims,
    "Tile": np.tile,
    "Concat": lambda parts, axis: np.concatenate(parts, axis=axis),
    "SplitWithSize": lambda x, sizes, axis: tuple(np.split(x, np.cumsum(sizes)[:-1], axis=axis)),
    "MakeTuple": lambda *parts: parts,
    "TupleGetItem": lambda parts, place: parts[place],
    "AddN": lambda parts: sum(parts[1:], start=parts[0]),
    "Gather": lambda x, index, axis, _: np.take(x, index, axis=axis),
    "StridedSlice": lambda x, begin, end, strides, *_: x[_slice(begin, end, strides)],
    "StridedSliceGrad": _slice_back,
    "OneHot": _one_hot,
    "UnsortedSegmentSum": _segments,
    "OnesLike": np.ones_like, "ZerosLike": np.zeros_like,
}  # fmt: skip
