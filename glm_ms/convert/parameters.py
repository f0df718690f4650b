"""Holds a checkpoint to a config, and hands its parameters over one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from glm_ms.convert.dtypes import is_floating
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.reader import CheckpointReader
from glm_ms.model.config import FLOAT_TYPES, GLMConfig
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.suggest import misspelled

_NEW_LINE = "\n    "


def check_names_and_shapes(config: GLMConfig, reader: CheckpointReader) -> None:
    """Raises one error that lists everything in which a checkpoint does not fit a config.

    Raises:
        CheckpointError: parameters are missing, unexpected, wrongly shaped or not floating point; each list
            gives its total and at most ten entries, with the file and the expected and found shapes.
    """
    expected = expected_shapes(config)
    found = reader.names()
    known = set(found)
    absent = [name for name in expected if name not in known]
    missing = [f"{name} {list(expected[name])}" for name in absent]
    unexpected = [_unexpected(name, reader, absent) for name in found if name not in expected]
    misshaped, mistyped = [], []
    for name in found:
        if name not in expected:
            continue
        where = f"{name} in {reader.file(name).name}"
        if reader.shape(name) != expected[name]:
            misshaped.append(f"{where}: expected {list(expected[name])}, found {list(reader.shape(name))}")
        if not is_floating(reader.dtype(name)):
            mistyped.append(f"{where}: {reader.dtype(name)}")
    problems = [
        f"\n  {len(items)} {what}:\n    {capped(items, _NEW_LINE)}"
        for what, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshaped),
            ("not floating point", mistyped),
        )
        if items
    ]
    if problems and reader.slice is not None:
        problems.append(
            f"\n  It is the slice of {reader.slice}: merge all of them with tools/transform_ckpt.py"
        )
    if problems:
        raise CheckpointError(
            f"{reader.path}: {len(found)} parameters do not fit the config, which asks for {len(expected)}"
            + "".join(problems)
        )


def load_parameters(
    reader: CheckpointReader, config: GLMConfig, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Checks a checkpoint against a config, then yields its parameters, holding one at a time.

    Args:
        reader: an open checkpoint.
        config: what the network expects.
        dtype: "float32", "float16" or "bfloat16"; the last as uint16 bit patterns.

    Returns:
        An iterator of (glm_ms name, array) over every parameter of the config, in the order of the files.

    Raises:
        CheckpointError: at once when names or shapes do not fit or `dtype` is unknown; while iterating when
            a tensor cannot be read or overflows `dtype`.
    """
    if dtype not in FLOAT_TYPES:
        raise CheckpointError(f"dtype {dtype!r}: must be one of {', '.join(FLOAT_TYPES)}")
    check_names_and_shapes(config, reader)
    return ((name, reader.read(name, dtype)) for name in reader.names())


def _unexpected(name: str, reader: CheckpointReader, absent: list[str]) -> str:
    near = misspelled(name, absent)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name} {list(reader.shape(name))} in {reader.file(name).name}{hint}"
