"""Kernels of a training step: against NumPy and the portable cells, with any number of threads."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from cpu_kernels import kernels, threads
from cpu_operators import call
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.ops import registry, training
from glm_ms.ops.cpu import training as cpu_training

SIZES = [1, 15, 16, 17, 1003, 16384, 70001]
STEP = {"rate": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decay": 0.01, "scale": 0.37}
# Of weights of order 1, which each of three updates rounds.
ADAMW = {"rtol": 4e-7, "atol": 4e-7}


def square_sum(*gradients: np.ndarray) -> np.float32:
    total = np.full(1, 7, np.float32)
    assert call("square_sum", *gradients, total) == 0
    return total[0]


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_square_sum(size: int):
    x = gaussian(size)
    np.testing.assert_allclose(square_sum(x), (x.astype(np.float64) ** 2).sum(), rtol=3e-7)


def test_square_sum_of_all_gradients_does_not_depend_on_threads():
    gradients = [gaussian(3, 40007), gaussian(5), np.zeros((0, 3), np.float32), gaussian(1, seed=1), gaussian(7, 9, 11)]
    expected = sum((g.astype(np.float64) ** 2).sum() for g in gradients)
    found = set()
    for count in (1, 2, 3, 4):
        with threads(count):
            found |= {square_sum(*gradients) for _ in range(3)}
    assert len(found) == 1
    np.testing.assert_allclose(found.pop(), expected, rtol=3e-7)
    assert square_sum() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("place", [0, 16, 16385, 20002])
def test_square_sum_shows_what_is_not_finite(bad: float, place: int):
    x = np.ones(20003, np.float32)
    x[place] = bad
    assert not np.isfinite(square_sum(gaussian(4), x))


def adamw(weight: np.ndarray, m: np.ndarray, v: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, ...]:
    arrays = [array.copy() for array in (weight, m, v)]
    scalars = [np.array(value, np.float32) for value in STEP.values()]
    assert call("adamw", *arrays, gradient, *scalars, np.zeros(1, np.float32)) == 0
    return tuple(arrays)


def state(size: int) -> list[np.ndarray]:
    """Weight, m, v, gradient."""
    weight, m, v, gradient = gaussian(4, size)
    return [weight, m, v**2 + np.float32(0.1), gradient]


@pytest.mark.parametrize("size", SIZES)
def test_adamw_is_the_formula(size: int):
    weight, m, v, gradient = (array.astype(np.float64) for array in state(size))
    g = gradient * STEP["scale"]
    m += float(1 - np.float32(STEP["beta1"])) * (g - m)
    v += float(1 - np.float32(STEP["beta2"])) * (g**2 - v)
    weight -= STEP["rate"] * (m / (np.sqrt(v) + STEP["eps"]) + STEP["decay"] * weight)
    for found, expected in zip(adamw(*state(size)), (weight, m, v)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_adamw_does_not_depend_on_threads():
    arrays = state(70001)
    with threads(1):
        expected = adamw(*arrays)
    for count in (2, 3, 4):
        with threads(count):
            for found, wanted in zip(adamw(*arrays), expected):
                np.testing.assert_array_equal(found, wanted)


def test_adamw_of_nothing_and_of_nan():
    empty = np.zeros((0, 4), np.float32)
    assert [array.shape for array in adamw(empty, empty, empty, empty)] == [(0, 4)] * 3
    arrays = state(40)
    arrays[3][17] = np.nan
    for found in adamw(*arrays):
        assert np.isnan(found).nonzero()[0].tolist() == [17]


class Step(nn.Cell):
    """Norm and update of one parameter, with the operators of a module."""

    def __init__(self, arrays: list[np.ndarray], module: object) -> None:
        super().__init__()
        weight, m, v, _ = arrays
        self.weight, self.m, self.v = (
            Parameter(Tensor(a.copy()), name=n) for a, n in ((weight, "w"), (m, "m"), (v, "v"))
        )
        self.squares, self.update = module.SquareSum(), module.AdamWUpdate()

    def construct(self, gradient: Tensor, scalars: tuple[Tensor, ...]) -> Tensor:
        before = ops.ReduceSum()(self.weight)
        total = self.squares((gradient, self.weight)) + 0.0 * before
        scale = ops.depend(scalars[5], total)
        done = self.update(
            self.weight, self.m, self.v, gradient, scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scale
        )
        return ops.depend(total, done)


@pytest.mark.parametrize("shape", [(1,), (3, 11), (257, 33)])
def test_in_a_graph_as_the_portable_cells(shape: tuple[int, ...]):
    """Moments have the same bits; the division of MindSpore's operator is not exactly rounded."""
    kernels()
    ms.set_context(mode=ms.GRAPH_MODE)
    arrays = [array.reshape(shape) for array in state(int(np.prod(shape)))]
    scalars = tuple(Tensor(np.array(value, np.float32)) for value in STEP.values())
    steps = [Step(arrays, module) for module in (training, cpu_training)]
    for _ in range(3):
        totals = [step(Tensor(arrays[3]), scalars).asnumpy() for step in steps]
        np.testing.assert_allclose(*totals, rtol=1e-6)
    for name in ("m", "v"):
        np.testing.assert_array_equal(*(getattr(step, name).asnumpy() for step in steps))
    np.testing.assert_allclose(*(step.weight.asnumpy() for step in steps), **ADAMW)
    assert not np.array_equal(steps[1].weight.asnumpy(), arrays[0])


def test_the_registry_takes_the_kernels_where_the_library_is(monkeypatch: pytest.MonkeyPatch):
    kernels()
    for operator, cells in (("square sum", "SquareSum"), ("AdamW", "AdamWUpdate")):
        assert type(registry.step_operator(operator)) is getattr(cpu_training, cells)
    with monkeypatch.context() as patch:
        patch.setattr(registry.library, "load", lambda: None)
        for operator, cells in (("square sum", "SquareSum"), ("AdamW", "AdamWUpdate")):
            assert type(registry.step_operator(operator)) is getattr(training, cells)
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    assert type(registry.step_operator("AdamW")) is training.AdamWUpdate
