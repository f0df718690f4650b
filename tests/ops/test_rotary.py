"""Rotary tables at real size against the reference's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tolerances import ROPE, ROPE_FAR

from glm_ms.ops.rotary import pair_rotation, rotary_tables


@pytest.mark.parametrize(("name", "ratio"), [("glm2_fp32", 1), ("glm3_fp32", 1), ("glm3_32k_ratio50_fp32", 50)])
def test_tables_match_reference(golden: Path, name: str, ratio: float) -> None:
    reference = np.load(golden / "rope.npz")
    rows = reference["rows"]
    cos, sin = rotary_tables(int(rows.max()) + 1, 128, ratio)
    found = np.stack([cos[rows, :64:2], sin[rows, :64:2]], axis=-1)
    near = rows <= 100
    np.testing.assert_allclose(found[near], reference[name][near], **ROPE)
    np.testing.assert_allclose(found, reference[name], **ROPE_FAR)


def test_second_half_is_not_turned() -> None:
    cos, sin = rotary_tables(10, 16)
    assert (cos[:, 8:] == 1).all()
    assert (sin[:, 8:] == 0).all()


def test_pair_rotation_is_a_quarter_turn() -> None:
    x = np.arange(1, 9, dtype=np.float32)
    np.testing.assert_array_equal(x @ pair_rotation(8), [-2, 1, -4, 3, -6, 5, -8, 7])
