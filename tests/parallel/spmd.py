"""Runs what MindSpore's compiler made for every card of a cluster, with NumPy: each as far as it gets before it
needs another.

Reads MindSpore's text of the graph after its last optimization. Every result is held to the shape the compiler says.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
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
_IGNORED = {"UpdateState", "Assign", "Return"}
_COLLECTIVES, _BETWEEN_TWO = {"AllReduce", "AllGather", "ReduceScatter"}, {"Send", "Receive"}
_SUM = "accu_grads"  # prefix of the sums of gradients over micro batches, which begin at zero

# (partners, how often they have met) -> rank -> what it brought.
Mail = dict[Any, dict[int, np.ndarray]]


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


class Card:
    """One card and what it has computed so far.

    Args:
        rank: of the card.
        graph: its instructions.
        parameters: name -> slice; inputs are `inputs0`, `inputs1`, ...
        constants: (name of the result, shape) -> a constant that the text leaves out.
        groups: name -> ranks of groups that the program has made; a pretended cluster takes them for all cards.

    Attributes:
        values: number of an instruction -> its result.
        gradients: parameter -> gradient that its optimizer was given.
    """

    def __init__(
        self,
        rank: int,
        graph: list[Instruction],
        parameters: Mapping[str, np.ndarray],
        constants: Callable[[str, tuple[int, ...]], np.ndarray],
        groups: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.rank, self.graph, self.constants, self.groups = rank, graph, constants, groups
        self.parameters = dict(parameters)
        self.values: dict[str, Any] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.place = 0
        self._met: Counter = Counter()

    def advance(self, mail: Mail) -> bool:
        """Goes on until another card is waited for; returns whether it got anywhere."""
        begin = self.place
        while self.place < len(self.graph):
            line = self.graph[self.place]
            if line.operator in _IGNORED:
                self.place += 1
                continue
            inputs = [self._value(text, line) for text in _parts(line.arguments)]
            if line.operator in _COLLECTIVES or line.operator in _BETWEEN_TWO:
                result = self._exchange(line, inputs, mail)
                if result is None:
                    break
                self._met[self._key(line)] += 1
            else:
                result = self._compute(line, inputs)
            if line.result is not None and result is not None:
                result = np.asarray(result)
                if line.operator == "StridedSlice":  # `x[i]` leaves an axis out
                    result = result.reshape(line.result[1])
                assert result.shape == line.result[1], (line, result.shape)
                result = result.astype(line.result[0])
            self.values[line.number] = result
            self.place += 1
        return self.place > begin

    def _compute(self, line: Instruction, inputs: list[Any]) -> Any:
        if line.operator == "AdamWeightDecay":
            self.gradients[_parameter(line)] = inputs[8]
            return None
        if line.operator == "AssignAdd":
            name = _parameter(line)
            if name.startswith(_SUM):
                self.parameters[name] = self.parameters[name] + inputs[1]
            return self.parameters.get(name)
        if _OPERATORS[line.operator] is _same:  # what else it names is only an order
            return inputs[0]
        return None if None in map(_known, inputs) else _OPERATORS[line.operator](*inputs)

    def _key(self, line: Instruction) -> tuple[Any, ...]:
        """What the partners of an exchange have in common."""
        if line.operator in _BETWEEN_TWO:
            other = int(re.search(r"(?:src|dest)_rank: I64\((\d+)\)", line.attributes).group(1))
            way = (self.rank, other) if line.operator == "Send" else (other, self.rank)
            return ("between", *way, re.search(r"sr_tag: I64\((\d+)\)", line.attributes).group(1))
        name = re.search(r'[ {]group: "([^"]+)"', line.attributes).group(1)
        if name in self.groups:
            return self.groups[name]
        ranks = re.search(r"group_rank_ids: \(([\d, ]+)\)", line.attributes)
        return tuple(int(n) for n in ranks.group(1).split(",") if n.strip())

    def _exchange(self, line: Instruction, inputs: list[Any], mail: Mail) -> Any:
        """The result, None if a partner has not come so far."""
        key = self._key(line)
        box = mail.setdefault((key, self._met[key]), {})
        if line.operator == "Receive":
            return box.get(key[1])
        box[self.rank] = inputs[0]
        if line.operator == "Send":
            return inputs[0]
        if len(box) < len(key):
            return None
        parts = [box[member] for member in key]
        if line.operator == "AllGather":
            return np.concatenate(parts)
        largest = 'op: "max"' in line.attributes
        total = np.max(parts, axis=0) if largest else np.sum(parts, axis=0, dtype=parts[0].dtype)
        return total if line.operator == "AllReduce" else np.split(total, len(key))[key.index(self.rank)]

    def _value(self, text: str, line: Instruction) -> Any:
        if text.startswith("%para"):
            name = re.sub(r"^%para\d+_", "", text)
            return (
                self.parameters.setdefault(name, np.zeros(())) if name.startswith(_SUM) else self.parameters.get(name)
            )
        if text.startswith("%"):
            return self.values.get(text[1:])
        if text.startswith("("):
            return tuple(self._value(part, line) for part in _parts(text[1:-1]))
        scalar = re.fullmatch(r"(?:I64|F32|F64|Bool|I32)\((.*)\)", text)
        if scalar:
            return ast.literal_eval(scalar.group(1))
        tensor = re.match(r"Tensor\(shape=\[([\d, ]*)\], dtype=(\w+), value=\s*(.*)\)$", text, re.DOTALL)
        if tensor is None:
            return text
        shape = tuple(int(n) for n in tensor.group(1).split(",") if n.strip())
        if "..." in tensor.group(3):
            return self.constants(line.name, shape).astype(_DTYPES[tensor.group(2)])
        numbers = [{"True": 1, "False": 0}.get(n, n) for n in re.findall(r"[^\s\[\],]+", tensor.group(3))]
        flat = np.array([float(n) for n in numbers])
        flat = flat.reshape(shape if flat.size == math.prod(shape) else ())
        return np.broadcast_to(flat, shape).astype(_DTYPES[tensor.group(2)])


def run(cards: Sequence[Card]) -> None:
    """Runs the graphs of all cards to their ends.

    Raises:
        AssertionError: they wait for each other.
    """
    mail: Mail = {}
    while any(card.place < len(card.graph) for card in cards):
        moved = [card.advance(mail) for card in cards]
        assert any(moved), [card.graph[card.place] for card in cards if card.place < len(card.graph)][:3]


def _parameter(line: Instruction) -> str:
    return re.match(r"%para\d+_([^\s,]+)", line.arguments).group(1)


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
    "ReLU": lambda x: np.maximum(x, 0),
    "OnesLike": np.ones_like, "ZerosLike": np.zeros_like,
}  # fmt: skip
