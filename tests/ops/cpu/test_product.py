"""Products of the C++ kernels: right, and with the same bits for any rows, threads and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cpu_kernels import bfloat16, from_bfloat16, kernels, product, threads

from glm_ms.ops.packing import Packed, dequantise, pack_int4, pack_int8

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4-32", "int4-64", "int4-128")
# (outputs, inputs): multiples of every block, less than one block, one more and one less than a block.
SHAPES = [(96, 1024), (1, 1), (3, 15), (17, 33), (50, 515), (65, 1541)]
ROWS = (*range(1, 21), 64, 100)


def weight(name: str, n: int, k: int, seed: int = 0) -> np.ndarray | Packed:
    """A weight of standard normal values in a format."""
    values = np.random.default_rng(seed).standard_normal((n, k), np.float32)
    if name == "float32":
        return values
    if name == "bfloat16":
        return bfloat16(values)
    if name == "float16":
        return values.astype(np.float16)
    if name == "int8":
        scale = np.abs(values).max(1) / 127
        return pack_int8(np.rint(values / scale[:, None]).astype(np.int8), scale)
    group = int(name.partition("-")[2])
    padded = np.zeros((n, -(-k // group) * group), np.float32)
    padded[:, :k] = values
    scale = np.abs(padded.reshape(n, -1, group)).max(2) / 7
    quantised = np.rint(values / np.repeat(scale, group, axis=1)[:, :k]).clip(-8, 7)
    return pack_int4(quantised.astype(np.int8), scale, group)


def values_of(stored: np.ndarray | Packed) -> np.ndarray:
    """float64 [n, k] of a weight."""
    if isinstance(stored, Packed):
        return dequantise(stored).astype(np.float64)
    return (from_bfloat16(stored) if stored.dtype == np.uint16 else stored).astype(np.float64)


def inputs(rows: int, k: int) -> np.ndarray:
    """float32 [rows, k]; scales of rows differ."""
    rng = np.random.default_rng(7)
    return (
        rng.standard_normal((rows, k), np.float32)
        * np.float32(2.0) ** (np.arange(rows) % 9 - 4).astype(np.float32)[:, None]
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(name: str, shape: tuple[int, int]):
    """Error relative to the size of the terms, |x| |W|: float32 rounding, or for packed weights 16-bit activations.

    A 16-bit activation is wrong by at most max|x| / 65024; over a row of normal values that averages out.
    """
    n, k = shape
    stored = weight(name, n, k)
    for rows in (1, 2, 3, 4, 5, 23):
        x = inputs(rows, k)
        expected = x.astype(np.float64) @ values_of(stored).T
        size = np.sqrt((x.astype(np.float64) ** 2).sum(1))[:, None] * np.sqrt((values_of(stored) ** 2).sum(1))
        limit = 1e-6 if name in FORMATS[:3] else 4e-5
        error = np.abs(product(stored, x) - expected) / np.maximum(size, 1e-30)
        assert error.max() < limit, (rows, error.max())


@pytest.mark.parametrize("name", FORMATS)
def test_bits_do_not_depend_on_company(name: str):
    for n, k in SHAPES:
        stored = weight(name, n, k)
        x = inputs(max(ROWS), k)
        alone = np.concatenate([product(stored, x[row : row + 1]) for row in range(len(x))])
        for rows in ROWS:
            np.testing.assert_array_equal(product(stored, x[-rows:]), alone[-rows:], err_msg=f"{n} {k} {rows}")


@pytest.mark.parametrize("name", FORMATS)
def test_bits_do_not_depend_on_threads(name: str):
    stored = weight(name, 130, 700)
    for rows in (1, 3, 20, 100):
        found = []
        for count in (1, 2, 3, 4):
            with threads(count):
                found.append(product(stored, inputs(rows, 700)))
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("name", FORMATS)
def test_bias_is_added_after_the_sum(name: str):
    stored, x = weight(name, 37, 70), inputs(6, 70)
    bias = np.random.default_rng(3).standard_normal(37).astype(np.float32)
    into = inputs(6, 37)
    plain = product(stored, x)
    np.testing.assert_array_equal(product(stored, x, bias), plain + bias)
    np.testing.assert_array_equal(product(stored, x, bias, into), into + (plain + bias))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_nan_or_infinity_spoils_itself_only(name: str, bad: float):
    stored, x = weight(name, 33, 100), inputs(7, 100)
    expected = product(stored, x)
    x[3, 99] = bad
    found = product(stored, x)
    assert not np.isfinite(found[3]).any()
    assert name in FORMATS[:3] or np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(expected, 3, 0))


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_and_rows_of_zeros(name: str):
    stored = weight(name, 33, 100)
    assert product(stored, np.zeros((0, 100), np.float32)).shape == (0, 33)
    for value in (0.0, 1e-38):
        found = product(stored, np.full((6, 100), value, np.float32))
        assert np.abs(found).max() <= 100 * 5 * value


@pytest.mark.parametrize("name", ["int8", "int4-32", "int4-128"])
def test_largest_sums_do_not_overflow(name: str):
    """Every product has the largest value: 32512 * 127, or 32512 * 8 in each group."""
    k = 14336
    if name == "int8":
        stored = pack_int8(np.full((17, k), 127, np.int8), np.ones(17, np.float32))
    else:
        group = int(name[5:])
        stored = pack_int4(np.full((17, k), -8, np.int8), np.ones((17, k // group), np.float32), group)
    for sign in (1, -1):
        found = product(stored, np.full((3, k), sign * 3.0, np.float32))
        np.testing.assert_allclose(found, sign * 3.0 * k * (127 if name == "int8" else -8), rtol=1e-6)


# A process for another instruction set: reads the case from a file, writes its results into another.
OTHER = """
import sys
import numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from tests.ops.cpu.test_product import several_products
np.savez(sys.argv[2], **several_products())
"""


def several_products() -> dict[str, np.ndarray]:
    """Results of every format, shape and way of the kernels."""
    found = {}
    for name in FORMATS:
        for n, k in SHAPES:
            for rows in (1, 2, 3, 4, 7, 50):
                x = inputs(rows, k)
                if rows == 7:
                    x[2, k // 2] = np.nan
                found[f"{name} {n} {k} {rows}"] = product(weight(name, n, k), x)
    return found


def test_bits_of_the_scalar_kernels(tmp_path: Path):
    """The kernels of this machine and those without any instruction set compute the same."""
    kernels()
    repository = Path(__file__).resolve().parents[3]
    file = tmp_path / "scalar.npz"
    subprocess.run(
        [sys.executable, "-c", OTHER, repository, file], check=True, timeout=120, cwd=repository,
        env={**os.environ, "GLM_MS_ISA": "scalar", "PYTHONPATH": str(repository)},
    )  # fmt: skip
    other = np.load(file)
    for name, values in several_products().items():
        np.testing.assert_array_equal(other[name], values, err_msg=name)
