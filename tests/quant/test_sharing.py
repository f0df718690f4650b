"""Two processes that generate with the same file of packed weights have it in memory once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm_ms import GLMConfig, load_pretrained
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.safetensors_file import write_header, write_tensor
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.ops.cpu import library
from glm_ms.quant import quantization
from glm_ms.quant.checkpoint import description
from glm_ms.quant.network import is_quantized, replaced_shapes

CONFIG = GLMConfig(
    num_layers=3, padded_vocab_size=8192, hidden_size=1024, ffn_hidden_size=4096, kv_channels=64,
    num_attention_heads=16, multi_query_group_num=2, seq_length=64, param_init_type="float32", compute_dtype="float32",
)  # fmt: skip
# Generates, and prints what the file of the weights and the memory of its own take, in bytes.
PROGRAM = """
import json, re, sys
from glm_ms import load_pretrained

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10

before = anonymous()
model = load_pretrained(sys.argv[1])
found = {"of its own": anonymous() - before}
model.generate([5, 6, 7], max_new_tokens=2)
for part in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    if sys.argv[1] in part.splitlines()[0]:
        for kind, size in re.findall(r"^(Shared|Private)_(?:Clean|Dirty):\\s*(\\d+)", part, re.M):
            found[kind] = found.get(kind, 0) + (int(size) << 10)
print(json.dumps(found))
"""


def packed_folder(folder: Path) -> int:
    """Writes a checkpoint of random packed weights; returns the bytes of these weights."""
    chosen, shapes, rng = quantization(4), expected_shapes(CONFIG), np.random.default_rng(0)
    packed = replaced_shapes(shapes, chosen)
    tensors = {name: TensorInfo(shape, kind) for name, (shape, kind) in packed.items()}
    whole = {name: shape for name, shape in shapes.items() if not is_quantized(name, chosen, shapes)}
    tensors.update((name, TensorInfo(shape, "float32")) for name, shape in whole.items())
    folder.mkdir()
    with (folder / "model.safetensors").open("xb") as file:
        write_header(file, tensors, {"format": "ms"}, 64)
        for info in tensors.values():
            if info.dtype == "uint8":
                write_tensor(file, rng.integers(0, 256, info.shape, np.uint8))
            else:
                write_tensor(file, rng.uniform(0.001, 0.01, info.shape).astype(info.dtype))
    document = {**CONFIG.to_hf_dict(), "quantization": description(chosen)}
    (folder / "config.json").write_text(json.dumps(document))
    return sum(tensors[name].nbytes for name in packed)


def test_packed_weights_are_in_memory_once(tmp_path: Path) -> None:
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    if not Path("/proc/self/smaps").exists():
        pytest.skip("/proc/self/smaps says which memory is shared")
    folder = tmp_path.resolve() / "int4"
    size = packed_folder(folder)
    model = load_pretrained(folder)
    model.generate([5, 6, 7], max_new_tokens=2)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{size:,} bytes of packed weights: {found}")
    assert found["Shared"] >= size  # every weight has been used
    assert found["Private"] < size / 100
    assert found["of its own"] < size / 4  # loading copies none of them
