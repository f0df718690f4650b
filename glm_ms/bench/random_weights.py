"""Random weights, tokens and batches that are the same in every process: each tensor from its name alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from glm_ms.convert.dtypes import DTYPES, convert_dtype
from glm_ms.convert.names import expected_shapes
from glm_ms.model.config import GLMConfig

_STD = 0.02
_ROWS = 4096
_NO_LABEL = -100
# Lengths of rows differ by so much of their mean in both directions.
_SPREAD = 0.28


def random_weights(config: GLMConfig, dtype: str = "float32") -> Iterator[tuple[str, np.ndarray]]:
    """(name, array of a type of `glm_ms.convert.dtypes`) of every parameter, in the order of the network, one at a
    time.

    Matrices and biases are uniform with a standard deviation of 0.02; norms are 1 plus such numbers.
    """
    for name, shape in expected_shapes(config).items():
        yield name, random_tensor(name, shape, dtype)


def random_tensor(name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """The tensor of this name; one of 16 bits is drawn some rows at a time, so that it is never all in float32."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = np.empty(shape, DTYPES[dtype].storage)
    width, shift = np.float32(_STD * 12**0.5), "layernorm" in name and name.endswith("weight")
    for start in range(0, shape[0], _ROWS):
        part = rng.random(values[start : start + _ROWS].shape, np.float32)
        part -= np.float32(0.5)
        part *= width
        if shift:
            part += 1
        values[start : start + _ROWS] = convert_dtype(part, "float32", dtype, name)
    return values


def random_ids(config: GLMConfig, count: int, seed: int) -> np.ndarray:
    """Token ids int32 [count]; the same for equal seeds."""
    return np.random.default_rng(seed).integers(0, config.padded_vocab_size, count, np.int32)


def training_batch(
    config: GLMConfig, rows: int, length: int, used: float, labelled: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels (-100: none) and mask (0: padding on the right) of random rows, int32 [rows, longest] each.

    `longest` is the longest row: nobody computes places that are padding in all rows.

    Args:
        used: share of the places that are not padding; rows have different lengths if it is below 1.
        labelled: share of the places that carry a label: the last ones of each row.
    """
    ids = random_ids(config, rows * length, 0).reshape(rows, length)
    spread = min(_SPREAD, 1 / used - 1)
    ends = np.rint(np.linspace(1 - spread, 1 + spread, rows) * used * length) if rows > 1 else np.rint([used * length])
    ends = np.maximum(ends, 1)
    starts = np.rint(ends * (1 - labelled / used))
    places = np.arange(length)[None]
    mask = (places < ends[:, None]).astype(np.int32)
    labels = np.where((places >= starts[:, None]) & (mask == 1), ids, _NO_LABEL).astype(np.int32)
    longest = int(ends.max())
    return tuple(array[:, :longest] for array in (ids * mask, labels, mask))  # type: ignore[return-value]
