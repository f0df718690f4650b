"""Kernels of a training step: against NumPy and the portable cells, with any number of threads."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from cpu_kernels import bfloat16, from_bfloat16, kernels, threads
from cpu_operators import call
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.ops import registry, training
from glm_ms.ops.cpu import training as cpu_training
from glm_ms.ops.portable import HIDDEN_SCORE, ApplyRotary, GroupedAttention, RMSNormalize, SwiGLU, rotary_tables

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


def test_square_sum_of_other_types():
    """In a compiled graph, as in a training step: gradients of float16 are not read as float32."""
    parts = gaussian(100).astype(np.float16), gaussian(33)
    kernels()
    found = cpu_training.SquareSum().compile_and_run(tuple(map(Tensor, parts))).asnumpy()
    np.testing.assert_allclose(found, sum((part.astype(np.float64) ** 2).sum() for part in parts), rtol=1e-6)


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
        patch.setattr(cpu_training.library, "load", lambda: None)
        for operator, cells in (("square sum", "SquareSum"), ("AdamW", "AdamWUpdate")):
            assert type(registry.step_operator(operator)) is getattr(training, cells)
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    assert type(registry.step_operator("AdamW")) is training.AdamWUpdate


def output_loss(
    hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, trained: bool = True, name: str = "output_loss"
) -> list[np.ndarray]:
    """Loss, gradient of hidden, gradient of the weight."""
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    outputs = [np.full(shape, 7, np.float32) for shape in ((1,), hidden.shape, weight.shape)[: 3 if trained else 2]]
    assert call(name if trained else f"{name}_frozen", hidden, weight, targets, *outputs) == 0
    return outputs


def output_layer(rows: int, width: int, vocabulary: int) -> list[np.ndarray]:
    """Hidden states, weight and targets, of which some are ignored."""
    generator = np.random.default_rng(rows)
    targets = generator.integers(0, vocabulary, rows).astype(np.int32)
    targets[generator.random(rows) < 0.4] = -100
    return [gaussian(rows, width), gaussian(vocabulary, width, seed=1) * np.float32(0.3), targets]


# One chunk of rows and three; one part of the vocabulary and several, the last of one entry.
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 8, 20), (9, 33, 8193), (1900, 5, 37)])
def test_output_loss_is_that_of_torch(sizes: tuple[int, int, int]):
    import torch

    hidden, weight, targets = output_layer(*sizes)
    targets[-1] = sizes[2] - 1
    given = [torch.tensor(array.astype(np.float64), requires_grad=True) for array in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(
        given[0] @ given[1].T, torch.tensor(targets.astype(np.int64)), ignore_index=-100, reduction="sum"
    )
    expected.backward()
    found = output_loss(hidden, weight, targets)
    np.testing.assert_allclose(found[0], expected.item(), rtol=1e-6)
    for array, tensor in zip(found[1:], given):
        np.testing.assert_allclose(array, tensor.grad.numpy(), rtol=1e-4, atol=1e-5)
    for array, other in zip(output_loss(hidden, weight, targets, trained=False), found):
        np.testing.assert_array_equal(array, other)
    assert not found[1][targets == -100].any()


def test_output_loss_does_not_depend_on_threads():
    arrays = output_layer(700, 24, 9001)
    with threads(1):
        expected = output_loss(*arrays)
    for count in (2, 3, 4):
        with threads(count):
            for found, wanted in zip(output_loss(*arrays), expected):
                np.testing.assert_array_equal(found, wanted)


def test_output_loss_of_nan_infinity_and_nothing():
    hidden, weight, targets = output_layer(6, 8, 50)
    targets[:] = [3, -100, 4, 49, 0, 7]
    bad = hidden.copy()
    bad[2, 1] = np.nan
    loss, of_hidden, of_weight = output_loss(bad, weight, targets)
    assert np.isnan(loss).all()
    assert np.isnan(of_weight).all()
    assert np.isnan(of_hidden).any(axis=1).tolist() == [False, False, True, False, False, False]
    assert all(np.isfinite(array).all() for array in output_loss(hidden * np.float32(1e3), weight, targets))
    for array in output_loss(hidden, weight, np.full(6, -100, np.int32)):
        assert not array.any()
    assert not output_loss(hidden[:0], weight, targets[:0])[0].any()


@pytest.mark.parametrize("target", [-1, 50, 2**31 - 1])
def test_output_loss_refuses_targets_outside_the_vocabulary(target: int):
    hidden, weight, targets = output_layer(6, 8, 50)
    targets[4] = target
    assert call("output_loss", hidden, weight, targets, np.zeros(1, np.float32), hidden.copy()) == 1


def rounded(x: np.ndarray) -> np.ndarray:
    """float64 of the nearest bfloat16."""
    return from_bfloat16(bfloat16(x)).astype(np.float64)


# One tile and several; sizes that no block divides.
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (3, 7, 5), (513, 40, 33), (70, 130, 1030)])
def test_products_of_bfloat16(n: int, k: int, m: int):
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    x, weight, gradient = gaussian(n, k), gaussian(m, k, seed=1), gaussian(n, m, seed=2)
    for name, inputs, expected in (
        ("product", (x, weight), rounded(x) @ rounded(weight).T),
        ("input_gradient", (gradient, weight), rounded(gradient) @ rounded(weight)),
        ("weight_gradient", (gradient, x), rounded(gradient).T @ rounded(x)),
    ):
        results = []
        for count in (1, 2, 3, 4):
            results.append(np.full(expected.shape, np.nan, np.float32))
            with threads(count):
                assert call(f"bf16_{name}", *inputs, results[-1]) == 0
        assert all(np.array_equal(results[0], other) for other in results)
        np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=2e-5)


def test_products_of_bfloat16_of_nothing_and_of_nan():
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    x, weight = gaussian(4, 6), gaussian(3, 6)
    x[2, 5] = np.nan
    y = np.zeros((4, 3), np.float32)
    assert call("bf16_product", x, weight, y) == 0
    assert np.isnan(y).all(axis=1).tolist() == [False, False, True, False]
    of_weight = np.ones((3, 6), np.float32)
    assert call("bf16_weight_gradient", y[:0], x[:0], of_weight) == 0
    assert not of_weight.any()
    assert call("bf16_product", x[:0], weight, y[:0]) == 0


class Product(nn.Cell):
    """x weight^T by the kernel of bfloat16."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight, self.product = Parameter(Tensor(weight), name="w"), cpu_training.BFloat16Product()

    def construct(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight) ** 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_bfloat16_in_a_graph(dynamic: bool):
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    ms.set_context(mode=ms.GRAPH_MODE)
    x, weight = gaussian(9, 6), gaussian(5, 6)
    net = Product(weight)
    if dynamic:
        net.set_inputs(Tensor(shape=[None, 6], dtype=ms.float32))
    y = rounded(x) @ rounded(weight).T
    np.testing.assert_allclose(net(Tensor(x)).asnumpy(), y**2, rtol=1e-5)
    of_x, (of_weight,) = ms.grad(net, 0, net.trainable_params())(Tensor(x))
    gradient = rounded((2 * y).astype(np.float32))
    np.testing.assert_allclose(of_x.asnumpy(), gradient @ rounded(weight), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(of_weight.asnumpy(), gradient.T @ rounded(x), rtol=1e-2, atol=1e-2)


def test_output_loss_of_bfloat16():
    arrays = output_layer(700, 24, 9001)
    operands = [from_bfloat16(bfloat16(array)) for array in arrays[:2]]
    exact, found = output_loss(*operands, arrays[2]), output_loss(*arrays, name="output_loss_bf16")
    np.testing.assert_array_equal(found[0], exact[0])  # only the gradient of the scores is rounded further
    for array, other in zip(found[1:], exact[1:]):
        np.testing.assert_allclose(array, other, rtol=1e-2, atol=1e-2)
    assert not np.array_equal(found[1], exact[1])


def test_scale_in_place():
    kernels()
    x = gaussian(40007)
    for factor in (1.0, 0.3):
        found = x.copy()
        assert call("scale", found, np.array(factor, np.float32), np.zeros(1, np.float32)) == 0
        np.testing.assert_array_equal(found, x * np.float32(factor))


class Cells(nn.Cell):
    """Norm and activation of a row, with a gradient that is not constant."""

    def __init__(self, norm: nn.Cell, activation: nn.Cell, weight: np.ndarray) -> None:
        super().__init__()
        self.norm, self.activation, self.weight = norm, activation, Parameter(Tensor(weight), name="w")

    def construct(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(x, self.weight) * 3.0) ** 2


@pytest.mark.parametrize("shape", [(1, 2), (5, 1, 34), (2, 67, 130)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_norm_and_activation_are_the_portable_cells(shape: tuple[int, ...], dynamic: bool):
    kernels()
    ms.set_context(mode=ms.GRAPH_MODE)
    x, weight = gaussian(*shape), gaussian(shape[-1], seed=1)
    portable_cells = RMSNormalize(1e-5), SwiGLU()
    results = []
    for cells in (
        portable_cells,
        (cpu_training.RMSNormalize(portable_cells[0]), cpu_training.SwiGLU(portable_cells[1])),
    ):
        net = Cells(*cells, weight)
        if dynamic:
            net.set_inputs(Tensor(shape=[None] * (len(shape) - 1) + [shape[-1]], dtype=ms.float32))
        y, (of_x, (of_weight,)) = ms.value_and_grad(net, 0, net.trainable_params())(Tensor(x))
        results.append([y.asnumpy(), of_x.asnumpy(), of_weight.asnumpy()])
    for found, expected in zip(results[1], results[0]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_norm_and_activation_do_not_depend_on_threads():
    x, weight, gradient = gaussian(77, 50), gaussian(50, seed=1), gaussian(77, 50, seed=2)
    eps = np.array(1e-5, np.float32)
    found = []
    for count in (1, 2, 3, 4):
        of_x, of_weight, activated = np.empty_like(x), np.empty_like(weight), np.empty((77, 25), np.float32)
        with threads(count):
            assert call("rms_norm_gradient", x, weight, eps, gradient, of_x) == 0
            assert call("rms_norm_weight_gradient", x, weight, eps, gradient, of_weight) == 0
            assert call("swiglu", x, activated) == 0
        found.append([of_x, of_weight, activated])
    for other in found[1:]:
        for one, two in zip(found[0], other):
            np.testing.assert_array_equal(one, two)


def test_norm_and_activation_of_nothing_and_of_extremes():
    kernels()
    empty, weight, eps = np.zeros((0, 6), np.float32), np.ones(6, np.float32), np.array(1e-5, np.float32)
    of_weight = np.full(6, 7, np.float32)
    assert call("rms_norm", empty, weight, eps, empty) == 0
    assert call("rms_norm_weight_gradient", empty, weight, eps, empty, of_weight) == 0
    assert not of_weight.any()
    x = np.array([[-1e4, -200, 0, 200, 1e4, np.nan] + [1.0] * 6], np.float32)
    y, of_x = np.empty((1, 6), np.float32), np.empty((1, 12), np.float32)
    assert call("swiglu", x, y) == 0
    np.testing.assert_array_equal(y, [[0, 0, 0, 200, 1e4, np.nan]])
    assert call("swiglu_gradient", x, np.ones((1, 6), np.float32), of_x) == 0
    np.testing.assert_array_equal(of_x[0, :6], [0, 0, 0.5, 1, 1, np.nan])
    zeros = np.zeros((1, 6), np.float32)
    assert call("rms_norm", zeros, weight, eps, zeros) == 0
    assert not zeros.any()


class Turned(nn.Cell):
    """Rows with a bias, rotated, with a gradient that is not constant."""

    def __init__(self, add: nn.Cell, rotary: nn.Cell, bias: np.ndarray) -> None:
        super().__init__()
        self.add, self.rotary, self.bias = add, rotary, Parameter(Tensor(bias), name="b")

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, heads, dim = ops.shape(x)
        y = self.add(ops.reshape(x, (-1, heads * dim)), self.bias)
        return self.rotary(ops.reshape(y, (batch, length, heads, dim)), cos, sin) ** 2


def test_packed_attention_has_the_bits_of_its_rows():
    """Rows of 1, 130 and 2 tokens; the last token of the third is padding, which sees its row and is hidden."""
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    lengths, padding = (1, 130, 2), {132}
    query, key, value, _ = attention_inputs(1, sum(lengths), 0, 4, 2, 8)
    numbers = np.repeat(np.arange(3, dtype=np.int32), lengths)
    numbers[list(padding)] = -1 - numbers[list(padding)]
    packed = [array.reshape(-1, 1, *array.shape[2:]) for array in (query, key, value)]
    for count in (1, 3):
        result = np.empty((sum(lengths), 1, 32), np.float32)
        gradients = [np.empty_like(array) for array in packed]
        with threads(count):
            assert call("packed_attention", *packed, numbers, result) == 0
            assert call("packed_attention_gradient", *packed, numbers, result, packed[0], *gradients) == 0
        for begin, length in zip((0, 1, 131), lengths):
            place = slice(begin, begin + length)
            row = [np.ascontiguousarray(array[:, place]) for array in (query, key, value)]
            later = np.triu(np.ones((length, length), bool), 1)
            for token in padding & set(range(begin, begin + length)):
                later[:, token - begin] = True
                later[token - begin] = False
            bias = np.where(later, np.finfo(np.float32).min, 0).astype(np.float32)[None, None]
            expected = np.empty((1, length, 32), np.float32)
            expected_gradients = [np.empty_like(array) for array in row]
            assert call("attention", *row, bias, expected) == 0
            assert call("attention_gradient", *row, bias, expected, row[0], *expected_gradients) == 0
            np.testing.assert_array_equal(result[place, 0], expected[0])
            for mine, other in zip(gradients, expected_gradients):
                np.testing.assert_array_equal(mine[place, 0], other[0])


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 5, 3, 12), (3, 67, 4, 32)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_bias_and_rotation_have_the_bits_of_the_portable_operators(shape: tuple[int, ...], dynamic: bool):
    kernels()
    ms.set_context(mode=ms.GRAPH_MODE)
    batch, length, heads, dim = shape
    x, bias = gaussian(*shape), gaussian(heads * dim, seed=1)
    places = np.random.default_rng(2).integers(0, 90, (batch, length))
    angles = [table[places][:, :, None] for table in rotary_tables(90, dim)]
    portable_rotary, results = ApplyRotary(dim, ms.float32), []
    for cells in (
        (ops.Add(), portable_rotary),
        (cpu_training.AddBias(), cpu_training.ApplyRotary(portable_rotary)),
    ):
        net = Turned(*cells, bias)
        if dynamic:
            net.set_inputs(
                Tensor(shape=[batch, None, heads, dim], dtype=ms.float32),
                *[Tensor(shape=[batch, None, 1, dim], dtype=ms.float32)] * 2,
            )
        inputs = [Tensor(array) for array in (x, *angles)]
        y, (of_x, (of_bias,)) = ms.value_and_grad(net, 0, net.trainable_params())(*inputs)
        results.append([y.asnumpy(), of_x.asnumpy(), of_bias.asnumpy()])
    for found, expected in zip(results[1], results[0]):
        np.testing.assert_array_equal(found, expected)


def test_bias_and_rotation_of_nothing():
    kernels()
    empty = np.zeros((0, 6), np.float32)
    assert call("add_bias", empty, np.ones(6, np.float32), empty) == 0
    empty, angles = np.zeros((2, 0, 3, 4), np.float32), np.zeros((2, 0, 1, 4), np.float32)
    assert call("rotary", empty, angles, angles, empty) == 0


def attention_inputs(batch: int, length: int, past: int, heads: int, groups: int, dim: int) -> list[np.ndarray]:
    """Query, key, value, and a bias with keys in the future, padding, queries that see all and one that sees none."""
    total = past + length
    query, key = gaussian(batch, length, heads, dim), gaussian(batch, total, groups, dim, seed=1)
    value = gaussian(batch, total, groups, dim, seed=2)
    hidden = np.broadcast_to(np.arange(total) > past + np.arange(length)[:, None], (batch, 1, length, total)).copy()
    hidden[0, :, :, : min(3, past)] = True
    hidden[-1, :, 0] = False
    hidden[0, :, length // 2] = True
    return [query, key, value, np.where(hidden, np.float32(HIDDEN_SCORE), np.float32(0))]


@pytest.mark.parametrize("sizes", [(1, 1, 0, 1, 1, 3), (2, 7, 4, 4, 2, 16), (3, 150, 5, 2, 1, 8)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_is_the_portable_cell(sizes: tuple[int, ...], dynamic: bool):
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    ms.set_context(mode=ms.GRAPH_MODE)
    inputs = [Tensor(array) for array in attention_inputs(*sizes)]
    weights = Tensor(gaussian(sizes[0], sizes[1], sizes[3] * sizes[5], seed=3))
    portable_cell = GroupedAttention(*sizes[3:])
    results = []
    for cell in (portable_cell, cpu_training.GroupedAttention(portable_cell)):
        net = Weighted(cell)
        if dynamic:
            net.set_inputs(
                *(Tensor(shape=[None] * 3 + [x.shape[3]], dtype=ms.float32) for x in inputs[:3]),
                *[Tensor(shape=[None] * x.ndim, dtype=ms.float32) for x in (inputs[3], weights)],
            )
        results.append([array.asnumpy() for array in ms.grad(net, (0, 1, 2))(*inputs, weights)])
        results[-1].append(cell(*inputs).asnumpy())
    for found, expected in zip(results[1], results[0]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * max(1, np.abs(expected).max()))


class Weighted(nn.Cell):
    """Sum of the results of an attention with weights."""

    def __init__(self, attention: nn.Cell) -> None:
        super().__init__()
        self.attention = attention

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        return ops.ReduceSum()(self.attention(query, key, value, bias) * weights)


def test_attention_does_not_depend_on_threads_and_shows_nan():
    if not cpu_training.has_blas():
        pytest.skip("no oneDNN")
    query, key, value, bias = attention_inputs(2, 140, 3, 4, 2, 8)
    value[1, 5, 0, 2] = np.nan
    found = []
    for count in (1, 2, 3, 4):
        result = np.empty((2, 140, 32), np.float32)
        gradients = [np.empty_like(array) for array in (query, key, value)]
        with threads(count):
            assert call("attention", query, key, value, bias, result) == 0
            assert call("attention_gradient", query, key, value, bias, result, query, *gradients) == 0
        found.append([result, *gradients])
    for other in found[1:]:
        for one, two in zip(found[0], other):
            np.testing.assert_array_equal(one, two)
    # Heads 0 and 1 of the second row of the batch use that value, hidden ones with the weight 0.
    wrong = np.isnan(found[0][0]).reshape(2, 140, 4, 8)
    assert wrong[1, :, :2, 2].all()
    assert wrong.sum() == 2 * 140
