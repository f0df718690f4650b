"""Portable operators: rotary tables at real size against the reference's; dropout is a function of seeds."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from tolerances import ROPE, ROPE_FAR

from glm_ms.ops.portable import SeededDropout, pair_rotation, rotary_tables

ROWS, LENGTH, WIDTH = 8, 64, 128


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


def kept(p: float, stream: int, seeds: np.ndarray, shape: tuple[int, ...] = (LENGTH, WIDTH)) -> np.ndarray:
    """Which elements stay, bool [rows, ...]."""
    ms.set_context(mode=ms.GRAPH_MODE)
    x = Tensor(np.ones((len(seeds), *shape), np.float32))
    y = SeededDropout(p, stream)(x, Tensor(seeds.astype(np.int32))).asnumpy()
    values = np.unique(y)
    np.testing.assert_allclose(values, [0, 1 / (1 - p)], rtol=1e-6)
    return y > 0


def deviations(mask: np.ndarray, share: float) -> float:
    """How many standard deviations the share of True is from `share`."""
    return abs(mask.mean() - share) / np.sqrt(share * (1 - share) / mask.size)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_share_of_what_stays(p: float) -> None:
    mask = kept(p, 3, np.arange(ROWS))
    assert deviations(mask, 1 - p) < 4
    for axis in range(3):  # no row, place or channel is favoured
        others = tuple(i for i in range(3) if i != axis)
        count = mask.size // mask.shape[axis]
        spread = np.abs(mask.mean(axis=others) - (1 - p)) / np.sqrt(p * (1 - p) / count)
        assert spread.max() < 5


def test_seeds_streams_and_places_are_independent() -> None:
    p = 0.5
    seeds = np.array([0, 1, 2, 3, 2**31 - 1, -1, -(2**31), 77])
    masks = [kept(p, stream, seeds) for stream in (0, 1, 2)]
    pairs = [(masks[0][i], masks[0][j]) for i in range(ROWS) for j in range(i)]
    pairs += [(masks[a][i], masks[b][i]) for a, b in ((0, 1), (1, 2), (0, 2)) for i in range(ROWS)]
    pairs += [(masks[0][:, 1:], masks[0][:, :-1]), (masks[0][..., 1:], masks[0][..., :-1])]
    pairs += [(masks[0][i, :, 0], masks[0][i, 0, :LENGTH]) for i in range(ROWS)]
    for one, other in pairs:
        assert deviations(one == other, 0.5) < 5


def test_a_row_is_the_same_in_every_batch() -> None:
    seeds = np.array([5, 9, 1, 5])
    whole = kept(0.3, 1, seeds)
    assert np.array_equal(whole[0], whole[3])
    assert np.array_equal(whole[1:3], kept(0.3, 1, seeds[1:3]))


def test_other_numbers_of_axes() -> None:
    assert deviations(kept(0.2, 0, np.arange(64), (256,)), 0.8) < 4
    assert deviations(kept(0.2, 0, np.arange(2), (4, 16, 2, 32)), 0.8) < 4


def test_a_length_known_only_when_the_graph_runs_changes_nothing() -> None:
    drop, seeds = SeededDropout(0.4, 3), Tensor(np.array([1, 2], np.int32))
    drop.set_inputs(Tensor(shape=[2, None, None, 8], dtype=ms.float32), Tensor(shape=[2], dtype=ms.int32))
    whole = SeededDropout(0.4, 3)(Tensor(np.ones((2, 6, 5, 8), np.float32)), seeds).asnumpy()
    for lengths in ((6, 5), (4, 3)):
        found = drop(Tensor(np.ones((2, *lengths, 8), np.float32)), seeds).asnumpy()
        np.testing.assert_array_equal(found, whole[:, : lengths[0], : lengths[1]])


class Total(nn.Cell):
    """Sum of what dropout leaves, to be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = SeededDropout(0.4, 0)

    def construct(self, x: Tensor, seeds: Tensor) -> Tensor:
        return self.drop(x, seeds).sum()


def test_gradient_passes_where_values_pass() -> None:
    x = Tensor(np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32))
    total, seeds = Total(), Tensor(np.array([1, 2], np.int32))
    gradient = ops.grad(total)(x, seeds).asnumpy()
    expected = np.where(total.drop(x, seeds).asnumpy() != 0, np.float32(1 / 0.6), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
