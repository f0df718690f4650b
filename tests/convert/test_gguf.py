"""GGUF files: every byte against a reader of the test, the package gguf and llama.cpp where they are installed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tolerances import GGUF_LOGITS

from glm_ms.convert.conversion import GGUF, plan_conversion
from glm_ms.convert.gguf_file import ALIGNMENT, TYPES, encode, write_gguf
from glm_ms.convert.gguf_model import gguf_tensors, write_gguf_model
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.writers import write_hf_folder
from glm_ms.model.config import GLMConfig
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from tools.convert_weight import main as convert

SMALL = GLMConfig(
    num_layers=2, padded_vocab_size=352, hidden_size=128, ffn_hidden_size=224, kv_channels=32, num_attention_heads=4,
    multi_query_group_num=2, seq_length=64, rope_ratio=2.0
)  # fmt: skip
SENTENCES = ["类型#裙*材质#针织*风格#复古", "这款上衣简约大方，清新自然。你好", "the quick brown fox, sop and eop"]
# An interpreter with the packages gguf and llama-cpp-python.
PEER = os.environ.get("GLM_MS_PEER_PYTHON", sys.executable)
_SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}


def in_peer(package: str, program: str, *arguments: object) -> Any:
    """The JSON that a program prints in the interpreter of peers; skips without the package."""
    found = subprocess.run([PEER, "-c", f"import {package}"], capture_output=True, timeout=60, check=False)
    if found.returncode:
        pytest.skip(f"{package} is not installed for {PEER} (GLM_MS_PEER_PYTHON chooses another interpreter)")
    done = subprocess.run(
        [PEER, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Reader:
    """The header of a GGUF file, and the bytes of its tensors."""

    def __init__(self, path: Path) -> None:
        self.data, self.place = path.read_bytes(), 0
        assert self.data[:4] == b"GGUF"
        self.place = 4
        version, tensors, keys = self.take("<IQQ")
        assert version == 3
        self.metadata = {self.text(): self.value(self.take("<I")[0]) for _ in range(keys)}
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name, count = self.text(), self.take("<I")[0]
            shape = self.take(f"<{count}Q")[::-1]
            self.tensors[name] = (shape, *self.take("<IQ"))
        self.start = -(-self.place // ALIGNMENT) * ALIGNMENT

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return values

    def text(self) -> str:
        size = self.take("<Q")[0]
        self.place += size
        return self.data[self.place - size : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("<IQ")
            return [self.value(inner) for _ in range(count)]
        return self.take(_SCALARS[kind])[0]

    def raw(self, name: str, size: int) -> bytes:
        offset = self.start + self.tensors[name][2]
        assert offset % ALIGNMENT == 0
        return self.data[offset : offset + size]


def random_weights(config: GLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.1) + ("norm" in name)
        for name, shape in expected_shapes(config).items()
    }


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "text").write_text("\n".join(SENTENCES * 20) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=330,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, num_threads=1
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", SMALL, expected_shapes(SMALL), "float32", random_weights(SMALL).items())
    return tmp_path / "hf"


# Encodings


def decoded(data: np.ndarray, kind: str, width: int) -> np.ndarray:
    """float32 [rows, width] of the bytes of rows, by the definition of each type."""
    if kind in ("F32", "F16"):
        return data.view({"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32).reshape(-1, width)
    if kind == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(-1, width)
    blocks = data.reshape(-1, TYPES[kind].bytes)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(-1, width)
    codes = np.concatenate((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1).astype(np.int8) - 8
    return (scale * codes).reshape(-1, width)


@pytest.mark.parametrize(
    ("kind", "allowed"), [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 0.005), ("Q4_0", 0.126)]
)
def test_values_come_back_within_a_step(kind: str, allowed: float) -> None:
    values = np.random.default_rng(1).standard_normal((7, 96), np.float32)
    values[3] = 0
    back = decoded(encode(values, kind), kind, 96)
    largest = np.abs(values.reshape(7, -1, 32)).max(-1, keepdims=True) + 1e-30
    error = (np.abs(back - values).reshape(7, -1, 32) / largest).max()
    assert error <= allowed
    assert (back[3] == 0).all()


def test_blocks_byte_by_byte() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, 0], values[0, 1], values[0, 16], values[0, 31] = 127, -1.5, 2.5, -126.5
    block = encode(values, "Q8_0")
    assert block[:2].tobytes() == np.float16(1).tobytes()
    assert block[2:].view(np.int8)[[0, 1, 16, 31]].tolist() == [127, -2, 3, -127]  # halves go away from zero
    values[0, 0], values[0, 1], values[0, 16], values[0, 31] = -8, 7, 1, 7.9
    block = encode(values, "Q4_0")
    assert block[:2].tobytes() == np.float16(1).tobytes()
    assert block[2:5].tolist() == [0 | 9 << 4, 15 | 8 << 4, 8 | 8 << 4]
    assert block[-1] >> 4 == 15  # 15.9 is cut to the largest code


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    large = np.full((1, 32), 1e5, np.float32)
    with pytest.raises(CheckpointError, match=r"x: a value overflows float16.*choose another type"):
        write_gguf(tmp_path / "a", {"general.architecture": "x"}, {"x": ((1, 32), "F16")}, [("x", large)])


# Files


def test_header_names_and_bytes(tmp_path: Path, vocabulary: Path) -> None:
    weights, tokenizer = random_weights(SMALL), ChatGLM3Tokenizer(vocabulary)
    path = tmp_path / "a.gguf"
    write_gguf_model(path, SMALL, "Q8_0", expected_shapes(SMALL), weights.items(), tokenizer)
    reader = Reader(path)
    known = reader.metadata
    assert known["general.architecture"] == "chatglm"
    assert known["chatglm.rope.dimension_count"] == 16
    assert known["chatglm.rope.freq_base"] == 20000.0
    assert known["chatglm.attention.head_count_kv"] == 2
    assert known["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert len(known["tokenizer.ggml.tokens"]) == len(known["tokenizer.ggml.scores"]) == SMALL.padded_vocab_size
    assert known["tokenizer.ggml.tokens"][tokenizer.get_command("sop")] == "<sop>"
    assert known["tokenizer.ggml.eot_token_id"] == tokenizer.get_command("<|user|>")
    assert known["tokenizer.ggml.token_type"][tokenizer.vocab_size :] == [5] * (
        SMALL.padded_vocab_size - tokenizer.vocab_size
    )
    assert set(reader.tensors) == set(gguf_tensors(expected_shapes(SMALL), "Q8_0"))
    assert reader.tensors["blk.1.attn_qkv.weight"][:2] == ((SMALL.qkv_size, 128), TYPES["Q8_0"].number)
    assert reader.tensors["blk.1.attn_qkv.bias"][:2] == ((SMALL.qkv_size,), TYPES["F32"].number)
    weight = weights["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    expected = encode(weight, "Q8_0").tobytes()
    assert reader.raw("blk.1.ffn_down.weight", len(expected)) == expected


def test_rows_of_separate_heads_are_sorted(tmp_path: Path) -> None:
    """Without multi-query attention glm_ms has the rows of a head side by side, llama.cpp all queries first."""
    config = GLMConfig(**{**SMALL.to_dict(), "multi_query_attention": False, "num_layers": 1})
    weights = random_weights(config)
    write_gguf_model(tmp_path / "a.gguf", config, "F32", expected_shapes(config), weights.items(), None)
    reader = Reader(tmp_path / "a.gguf")
    rows = weights["transformer.encoder.layers.0.self_attention.query_key_value.weight"].reshape(4, 3, 32, 128)
    expected = np.concatenate([rows[:, part].reshape(128, 128) for part in range(3)])
    assert reader.raw("blk.0.attn_qkv.weight", expected.nbytes) == expected.tobytes()
    assert reader.metadata["chatglm.attention.head_count_kv"] == 4


def test_the_tool(checkpoint: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--input", str(checkpoint), "--output", str(tmp_path / "q.gguf"), "--tokenizer", str(vocabulary)]
    assert convert([*line, "--model_generation", "3", "--gguf_type", "Q4_0"]) == 0
    size = (tmp_path / "q.gguf").stat().st_size
    assert f"17 tensors, {size:,} bytes (Q4_0)" in capsys.readouterr().out
    reader = Reader(tmp_path / "q.gguf")
    assert reader.metadata["general.file_type"] == 2
    last_shape, kind, offset = list(reader.tensors.values())[-1]
    assert size == -(-(reader.start + offset + TYPES["Q4_0"].size(last_shape)) // ALIGNMENT) * ALIGNMENT
    assert kind == TYPES["Q4_0"].number


def test_matrices_without_whole_blocks_are_told(tmp_path: Path, vocabulary: Path, capsys) -> None:
    config = GLMConfig(**{**SMALL.to_dict(), "ffn_hidden_size": 200})
    write_hf_folder(tmp_path / "hf", config, expected_shapes(config), "float32", random_weights(config).items())
    line = ["--input", tmp_path / "hf", "--output", tmp_path / "q.gguf", "--tokenizer", vocabulary]
    assert convert([*map(str, line), "--model_generation", "2", "--gguf_type", "Q8_0"]) == 0
    assert "2 matrices are F16: their rows are not made of whole blocks of Q8_0" in capsys.readouterr().out
    assert Reader(tmp_path / "q.gguf").tensors["blk.0.ffn_down.weight"][1] == TYPES["F16"].number


def test_refusals(golden: Path, checkpoint: Path, vocabulary: Path, tmp_path: Path) -> None:
    tokenizer, output = ChatGLM3Tokenizer(vocabulary), tmp_path / "a.gguf"
    for source, options, words in (
        (golden / "models" / "glm2_bias_layernorm", {}, "rmsnorm: false.*llama.cpp has no such network"),
        (golden / "models" / "glm3_tiny", {}, "num_attention_heads x kv_channels = 128 and hidden_size = 96"),
        (checkpoint, {"gguf_type": "Q4_K"}, "gguf_type 'Q4_K': must be one of F32, F16, BF16, Q8_0, Q4_0"),
        (checkpoint, {"dtype": "float16"}, "the type of a GGUF file is given by gguf_type"),
        (checkpoint, {"max_shard_size": 1}, "a .gguf is one file"),
        (checkpoint, {"target": "hf"}, "a.gguf: is not an output of kind hf; give a folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            plan_conversion(source, output, tokenizer=tokenizer, **options)
    with pytest.raises(CheckpointError, match=r"b: is not an output of kind gguf; give a name that ends in \.gguf"):
        plan_conversion(checkpoint, tmp_path / "b", tokenizer=tokenizer, target=GGUF)
    with pytest.raises(CheckpointError, match="a tokenizer is needed for hf-glm and gguf, and for these only"):
        plan_conversion(checkpoint, output)
    with pytest.raises(CheckpointError, match="gguf_type=F16: is for target=gguf only"):
        plan_conversion(checkpoint, tmp_path / "b", gguf_type="F16")
    assert not output.exists()


# Peers

_READ = """
import json, sys
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
reader = GGUFReader(sys.argv[1])
sums = {}
for t in reader.tensors:
    total = float(dequantize(t.data, t.tensor_type).astype("f8").sum())
    sums[t.name] = [t.tensor_type.name, list(map(int, t.shape)), total]
print(json.dumps({"keys": sorted(reader.fields), "tensors": sums}))
"""
_QUANTISE = """
import json, sys
import numpy as np
from gguf import GGMLQuantizationType, quants
values = np.load(sys.argv[1])
kinds = ("Q8_0", "Q4_0", "BF16")
print(json.dumps({k: quants.quantize(values, GGMLQuantizationType[k]).tobytes().hex() for k in kinds}))
"""


def test_the_package_gguf_reads_the_file(tmp_path: Path, vocabulary: Path) -> None:
    weights, path = random_weights(SMALL), tmp_path / "a.gguf"
    write_gguf_model(path, SMALL, "Q8_0", expected_shapes(SMALL), weights.items(), ChatGLM2Tokenizer(vocabulary))
    found = in_peer("gguf", _READ, path)
    assert "tokenizer.chat_template" in found["keys"]
    kind, shape, total = found["tensors"]["blk.0.ffn_up.weight"]
    weight = weights["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"]
    assert (kind, shape) == ("Q8_0", [128, 448])
    assert total == pytest.approx(decoded(encode(weight, "Q8_0"), "Q8_0", 128).astype("f8").sum(), abs=1e-6)


def test_blocks_are_those_of_the_package_gguf(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((40, 256), np.float32)
    np.save(tmp_path / "values.npy", values)
    found = in_peer("gguf", _QUANTISE, tmp_path / "values.npy")
    for kind, text in found.items():
        assert encode(values, kind).tobytes().hex() == text, kind


_LLAMA = """
import json, sys
from llama_cpp import Llama
path, ids, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = Llama(path, n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
model.eval(ids)
logits = model.scores[: len(ids)].tolist()
tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
print(json.dumps({"logits": logits, "tokens": tokens}))
"""


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_gives_our_logits(tmp_path: Path, vocabulary: Path, kind: str) -> None:
    """With our ids for text, and the prompt of a conversation that begins with [gMASK] sop."""
    from glm_ms import GLMForCausalLM

    weights, tokenizer = random_weights(SMALL), ChatGLM3Tokenizer(vocabulary)
    path = tmp_path / "a.gguf"
    write_gguf_model(path, SMALL, kind, expected_shapes(SMALL), weights.items(), tokenizer)
    ids = np.random.default_rng(3).integers(3, SMALL.padded_vocab_size, 24).tolist()
    texts = [*SENTENCES, "[gMASK]<sop><|user|>\n 你好 sop", "a  b\n\n c\t😀"]
    found = in_peer("llama_cpp", _LLAMA, path, json.dumps(ids), json.dumps(texts))
    if kind == "Q8_0":  # llama.cpp rounds the activations to 8 bits too
        weights = {n: decoded(encode(w, kind), kind, w.shape[-1]) if w.ndim > 1 else w for n, w in weights.items()}
    model = GLMForCausalLM.from_parameters(SMALL, weights.items())
    logits = model(ids).asnumpy()[0]
    difference = np.abs(np.array(found["logits"]) - logits).max()
    assert difference < GGUF_LOGITS[kind] * np.abs(logits).max()
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in (*texts[:3], texts[4])]
    assert found["tokens"][:3] + found["tokens"][4:] == plain
    said = [
        *tokenizer.prefix_tokens,
        tokenizer.get_command("<|user|>"),
        *tokenizer.encode("\n 你好 sop", add_special_tokens=False),
    ]
    assert found["tokens"][3] == said
