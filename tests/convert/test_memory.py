"""Peak memory of conversions stays near one shard, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glm_ms import GLMConfig
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.writers import write_hf_folder

SHARD = 100_000_000
# VmHWM belongs to this process alone; ru_maxrss would start at what the parent once used.
MEASURE = """
import sys
from pathlib import Path
from glm_ms.convert.conversion import plan_conversion
if sys.argv[3]:
    import torch
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
before = peak()
plan_conversion(sys.argv[1], sys.argv[2], config=sys.argv[4], dtype=sys.argv[5]).run()
print(peak() - before)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random model of 600 MB as safetensors shards and as PyTorch shards of 100 MB."""
    folder = tmp_path_factory.mktemp("models")
    config = GLMConfig(
        num_layers=12, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, kv_channels=64,
        padded_vocab_size=8192
    )  # fmt: skip
    shapes = expected_shapes(config)
    rng = np.random.default_rng(0)

    def parameters() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            yield name, rng.standard_normal(shape, dtype=np.float32)

    write_hf_folder(folder / "safetensors", config, shapes, "float32", parameters(), SHARD)
    (folder / "bin").mkdir()
    for file in (folder / "safetensors").iterdir():
        if file.suffix == ".safetensors":
            name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(file), folder / "bin" / name)
        elif file.name.endswith(".index.json"):
            text = file.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
            (folder / "bin" / "pytorch_model.bin.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("source", "output", "dtype"),
    [
        ("safetensors", "model.ckpt", "float32"),
        ("safetensors", "model.safetensors", "bfloat16"),
        ("bin", "model.safetensors", "float32"),
        ("bin", "model.ckpt", "float16"),
    ],
)
def test_peak_memory_is_about_one_shard(
    repository: Path, models: Path, tmp_path: Path, source: str, output: str, dtype: str
) -> None:
    def growth(*arguments: object) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, arguments)],
            cwd=repository, capture_output=True, text=True, check=True, timeout=300
        )  # fmt: skip
        return int(done.stdout)

    config = models / "safetensors"
    with_torch = "torch" if source == "bin" else ""
    there = growth(models / source, tmp_path / output, with_torch, config, dtype)
    back = growth(tmp_path / output, tmp_path / "back", "", config, dtype)
    print(f"{source} -> {output} {dtype}: +{there / 1e6:.0f} MB; back: +{back / 1e6:.0f} MB")
    # The largest tensor (33 MB) comes on top of the mapped pages of a PyTorch shard.
    assert there < 1.5 * SHARD
    assert back < 1.0 * SHARD
