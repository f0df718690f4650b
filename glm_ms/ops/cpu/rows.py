"""The tables that the operators of the decoder read: which rows to compute, and where everything is in memory.

A run computes rows, each a token of a sequence. Its table is int64 [rows + 1, FIELDS]: a line for the run, then one for
each row (`Run` and `Row` in src/call.h). Addresses in it let one compiled graph serve decoders of every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from glm_ms.ops.cpu.storage import STORAGE
from glm_ms.ops.packing import float32_to_bfloat16

# Tokens of a page of keys and values.
PAGE = 16
FIELDS = 8
# Columns of the line of a run, and of that of a row.
COUNT, CACHE, LAYER_BYTES, STORED, FINITE = range(5)
TOKEN, POSITION, INDEX, FIRST, PAGES, ADAPTER, LOGITS = range(7)
# A vector of the kernels, in items; the channels of values are padded to it.
LANES = 16
# Bytes that a processor reads from memory at a time; the pages begin at a multiple.
CACHE_LINE = 64


def page_bytes(storage: str, groups: int, dim: int) -> int:
    """Bytes of a page of one layer: keys and values of PAGE tokens, with int8 also a float32 scale for each."""
    scales = 2 * PAGE * 4 if storage == "int8" else 0
    return groups * (PAGE * (dim + padded(dim)) * STORAGE[storage][1] + scales)


def padded(dim: int) -> int:
    """Channels of a value as they are stored."""
    return -(-dim // LANES) * LANES


class PageMemory:
    """Memory of the pages of all layers. It takes none before it is written.

    Args:
        storage: type of keys and values, a key of `STORAGE`.
        layers, pages, groups, dim: layers, pages of each, key/value heads, channels of a head.
    """

    def __init__(self, storage: str, layers: int, pages: int, groups: int, dim: int) -> None:
        self.storage, self.groups, self.dim = storage, groups, dim
        shape = layers, pages, page_bytes(storage, groups, dim)
        size = int(np.prod(shape))
        whole = np.zeros(size + CACHE_LINE, np.uint8)
        begin = -whole.ctypes.data % CACHE_LINE
        self.bytes = whole[begin : begin + size].reshape(shape)

    def copy(self, source: int, target: int) -> None:
        """Page `target` becomes what page `source` is, in all layers."""
        self.bytes[:, target] = self.bytes[:, source]

    def write(self, page: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Overwrites a page by keys and values, float32 [layers, PAGE, G, D] each."""
        layers, width = len(keys), padded(self.dim)
        keys = keys.transpose(0, 2, 3, 1)  # [layers, G, D, PAGE]
        values = values.transpose(0, 2, 1, 3)  # [layers, G, PAGE, D]
        parts = [] if self.storage != "int8" else [_scales(keys, 2), _scales(values, 3)]
        if parts:
            keys = _divided(keys, parts[0])
            values = _divided(values, parts[1])
        values = np.concatenate((values, np.zeros((*values.shape[:3], width - self.dim), values.dtype)), 3)
        stored = [_STORED[self.storage](part) for part in (keys, values)]
        flat = [part.reshape(layers, self.groups, -1).view(np.uint8) for part in (*stored, *parts)]
        self.bytes[:, page] = np.concatenate(flat, 2).reshape(layers, -1)


def _scales(x: np.ndarray, axis: int) -> np.ndarray:
    """float32 scale of each key or value, whose largest magnitude becomes 127; its channels lie along `axis`."""
    return np.ascontiguousarray(np.abs(x).max(axis, keepdims=True) / np.float32(127), np.float32)


def _divided(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.divide(x, scales, out=np.zeros_like(x), where=scales > 0)


_STORED = {
    "float32": lambda x: np.ascontiguousarray(x, np.float32),
    "bfloat16": float32_to_bfloat16,
    "int8": lambda x: np.ascontiguousarray(np.rint(x), np.int8),
}


@dataclass
class Span:
    """Tokens of one sequence that follow one another.

    Attributes:
        ids, positions: int32 [n].
        index: of the key of the first one; `first`: of the first key that all of them see.
        pages: int32, pages of all keys of the sequence.
        adapter: number of its low-rank update; 0: none.
        logits: of how many of the last tokens the logits are wanted.
    """

    ids: np.ndarray
    positions: np.ndarray
    index: int
    first: int
    pages: np.ndarray
    adapter: int = 0
    logits: int = 1


@dataclass
class RunTable:
    """The table of a run, with the arrays that it has the addresses of.

    Attributes:
        table: int64 [rows + 1, FIELDS].
        logits: float32 [n, V], filled by the run: those that the spans want, in order.
        finite: int32 [rows], filled by the run: 1 if a token has neither NaN nor infinity.
    """

    table: np.ndarray
    logits: np.ndarray
    finite: np.ndarray
    kept: list[np.ndarray] = field(default_factory=list)


def run_table(spans: Sequence[Span], memory: PageMemory, rows: int, vocab_size: int) -> RunTable:
    """The table of a run over the tokens of all spans, at most `rows`."""
    count = sum(len(span.ids) for span in spans)
    if count > rows:
        raise ValueError(f"{count} tokens: a run has at most {rows}")
    table = np.zeros((rows + 1, FIELDS), np.int64)
    logits = np.empty((sum(span.logits for span in spans), vocab_size), np.float32)
    run = RunTable(table, logits, np.zeros(rows, np.int32), [memory.bytes])
    stored, _ = STORAGE[memory.storage]
    head = (count, memory.bytes.ctypes.data, memory.bytes.strides[0], stored, run.finite.ctypes.data)
    table[0, : len(head)] = head
    row, wanted = 1, logits.ctypes.data
    for span in spans:
        size = len(span.ids)
        pages = np.ascontiguousarray(span.pages, np.int32)
        run.kept.append(pages)
        lines = table[row : row + size]
        lines[:, TOKEN], lines[:, POSITION] = span.ids, span.positions
        lines[:, INDEX] = span.index + np.arange(size)
        lines[:, FIRST], lines[:, PAGES], lines[:, ADAPTER] = span.first, pages.ctypes.data, span.adapter
        if span.logits:
            lines[size - span.logits :, LOGITS] = wanted + logits.strides[0] * np.arange(span.logits)
        row, wanted = row + size, wanted + logits.strides[0] * span.logits
    return run
