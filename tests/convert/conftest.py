"""What the tests of conversion share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from glm_ms.convert.conversion import plan_conversion


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the safetensors files in a folder, read by the format's own library."""
    return {name: array for file in folder.glob("model*.safetensors") for name, array in load_file(file).items()}


@pytest.fixture
def convert():
    """Runs one conversion and returns its output path."""

    def run(source: Path, output: Path, **options: object) -> Path:
        plan_conversion(source, output, **options).run()
        return output

    return run


@pytest.fixture
def assert_bitwise_equal():
    """Holds two Hugging Face folders to one another: names, types and every bit."""

    def compare(left: Path, right: Path) -> None:
        ours, theirs = tensors_of(left), tensors_of(right)
        assert sorted(ours) == sorted(theirs)
        for name, array in theirs.items():
            assert ours[name].dtype == array.dtype, name
            assert ours[name].shape == array.shape, name
            assert ours[name].tobytes() == array.tobytes(), name

    return compare
