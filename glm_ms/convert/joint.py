"""Joint weights (query-key-value, gate and up) and their parts, which sharded networks keep apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from glm_ms.model.config import JOINT_PARTS, GLMConfig


def split_joint(name: str, value: np.ndarray, config: GLMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter -> its parts by name; itself if it is no joint one.

    Args:
        name: of glm_ms.
        value: [rows, ...].
        config: architecture, with `multi_query_attention`.
    """
    module, _, kind = name.rpartition(".")
    parts = next((parts for joint, parts in config.joint_parts.items() if module.endswith(joint)), None)
    if parts is None:
        yield name, value
        return
    begin = 0
    for part, rows in parts.items():
        yield f"{module}.{part}.{kind}", value[begin : begin + rows]
        begin += rows


def joint_of(name: str) -> tuple[str, int, int]:
    """The joint parameter that a part belongs to, its place in it and the number of parts; (name, 0, 1) for a
    parameter that is no part."""
    module, _, kind = name.rpartition(".")
    joint, _, part = module.rpartition(".")
    parts = next((parts for ending, parts in JOINT_PARTS.items() if joint.endswith(ending)), ())
    return (f"{joint}.{kind}", parts.index(part), len(parts)) if part in parts else (name, 0, 1)


def part_names(name: str) -> list[str]:
    """The parts of a joint parameter in the order of its rows; empty if it is none."""
    module, _, kind = name.rpartition(".")
    parts = next((parts for ending, parts in JOINT_PARTS.items() if module.endswith(ending)), ())
    return [f"{module}.{part}.{kind}" for part in parts]
