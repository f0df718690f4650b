"""OpenVINO: the network in its own operators, as its exports of language models have it: weights compressed in the
graph, keys and values in states of the model.

Source of the patterns that its CPU plugin fuses: openvino, `src/plugins/intel_cpu` (StatefulSDPAFusion) and
`src/common/transformations` (RMSFusion); NNCF, weight compression.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from glm_ms.bench.random_weights import random_ids, random_weights
from glm_ms.bench.subjects import Setup, timed_load
from glm_ms.convert.hf_glm import check_network, qkv_parts
from glm_ms.model.config import GLMConfig

_ENDING = ".xml"
_GROUP = 32  # input columns of one scale of int4
_CHUNK = 512  # tokens of a call in a long prompt
_HIDDEN = float(np.finfo(np.float32).min)
_BLOCKS = "transformer.encoder.layers."


class OpenVinoPeer:
    """See `glm_ms.bench.subjects`. The cache has OpenVINO's own type, 8 bits unless the processor prefers another."""

    def write(self, setup: Setup) -> None:
        """The file that `build` and `load` read."""
        file = setup.file(_ENDING)
        if not file.exists():
            part = file.with_name(f"part-{file.name}")
            ov.save_model(_network(GLMConfig(**setup.config), setup.weights), part, compress_to_fp16=False)
            part.with_suffix(".bin").rename(file.with_suffix(".bin"))
            part.rename(file)  # last: it says that both are whole

    def build(self, setup: Setup) -> dict[str, Any]:
        self.write(setup)
        self.config = GLMConfig(**setup.config)
        options = {
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": setup.threads,
            "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        self.request = ov.Core().compile_model(setup.file(_ENDING), "CPU", options).create_infer_request()
        return {"version": f"openvino {ov.__version__.partition('-')[0]}"}

    def open(self, rows: int, context: int, steps: int) -> None:
        self.prompt, self.count = max(1, context - steps), steps
        ids = random_ids(self.config, rows * self.prompt, rows).reshape(rows, -1)
        self.first = self._run_prompt(ids)
        self.states = [np.array(state.state.data) for state in self.request.query_state()]
        self.steps()

    def steps(self) -> list[float]:
        for state, values in zip(self.request.query_state(), self.states):
            state.state = ov.Tensor(values)
        logits, times = self.first, []
        for step in range(self.count):
            start = time.perf_counter()
            logits = self._run(logits.argmax(-1)[:, None], self.prompt + step)
            times.append(time.perf_counter() - start)
        return times

    def prefill(self, length: int) -> float:
        ids = random_ids(self.config, length, 1)[None]
        start = time.perf_counter()
        self._run_prompt(ids).argmax(-1)
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._run_prompt(np.array([ids]))[0]

    def load(self, setup: Setup) -> dict[str, float]:
        return timed_load(lambda: self.build(setup), lambda: self.logits([5]))

    def _run_prompt(self, ids: np.ndarray) -> np.ndarray:
        """Logits [rows, V] after prompts [rows, n] in empty states."""
        self.request.reset_state()
        for begin in range(0, ids.shape[1], _CHUNK):
            logits = self._run(ids[:, begin : begin + _CHUNK], begin)
        return logits

    def _run(self, ids: np.ndarray, past: int) -> np.ndarray:
        """Logits float32 [rows, V] after the last of ids [rows, n], which follow `past` tokens."""
        rows, count = ids.shape
        inputs = [  # in the order of `_network`
            np.ascontiguousarray(ids, np.int64), np.tile(np.arange(past, past + count, dtype=np.int64), (rows, 1)),
            np.arange(past + count, dtype=np.int64), np.arange(rows, dtype=np.int32),
        ]  # fmt: skip
        return np.array(self.request.infer(inputs, share_inputs=True)[0])


def _network(config: GLMConfig, kind: str) -> ov.Model:
    """The graph with random weights of a type.

    Inputs: input_ids and position_ids int64 [B, L], key_positions int64 [T], all past and present ones, beam_idx
    int32 [B]. Output: logits float32 [B, V] after the last ids. A layer has two states, keys and values [B, G, T, D].
    """
    check_network(config, "--geometry", "the graph for OpenVINO")
    weights = _Weights(config, kind)
    ids, positions = (op.parameter([-1, -1], np.int64, name) for name in ("input_ids", "position_ids"))
    keys, beams = op.parameter([-1], np.int64, "key_positions"), op.parameter([-1], np.int32, "beam_idx")
    x = op.gather(weights.matrix("transformer.embedding.embedding_table", embedding=True), ids, _int(0))
    rows = op.gather(op.shape_of(ids), _int([0]), _int(0))
    attention = _Attention(config, weights, positions, keys, beams, rows)
    for layer in range(config.num_layers):
        name = f"{_BLOCKS}{layer}."
        x = op.add(x, attention.layer(layer, _norm(x, weights, f"{name}input_layernorm.weight", config)))
        y = _norm(x, weights, f"{name}post_attention_layernorm.weight", config)
        y = op.matmul(y, weights.matrix(f"{name}mlp.dense_h_to_4h.weight"), False, True)
        gate, up = op.split(y, _int(-1), 2).outputs()
        y = op.multiply(op.swish(gate), up)
        x = op.add(x, op.matmul(y, weights.matrix(f"{name}mlp.dense_4h_to_h.weight"), False, True))
    x = op.gather(x, _int(-1), _int(1))
    x = _norm(x, weights, "transformer.encoder.final_layernorm.weight", config)
    logits = op.matmul(x, weights.matrix("transformer.output_layer.weight"), False, True)
    return ov.Model([op.result(logits)], attention.sinks, [ids, positions, keys, beams], "glm")


class _Attention:
    """Attention of all layers; what depends on positions alone is computed once.

    The rows of queries and keys are sorted so that the first elements of all pairs of the rotary embedding come
    before the second ones. Scores do not change by that, and a rotation needs no strided access.
    """

    def __init__(self, config: GLMConfig, weights: _Weights, positions: Any, keys: Any, beams: Any, rows: Any) -> None:
        self.config, self.weights, self.beams, self.sinks = config, weights, beams, list[Any]()
        pairs = config.kv_channels // 4
        exponent = np.arange(pairs, dtype=np.float32) / np.float32(pairs)
        theta = np.float32(1) / np.power(np.float32(10000 * config.rope_ratio), exponent)
        angle = op.multiply(op.unsqueeze(op.convert(positions, np.float32), _int([2, 3])), op.constant(theta))
        self.cos, self.sin = op.cos(angle), op.sin(angle)  # [B, L, 1, pairs]
        seen = op.less_equal(keys, op.unsqueeze(positions, _int([1, 3])))  # [B, 1, L, T]
        self.mask = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(_HIDDEN)))
        shape = op.concat([rows, _int([config.num_kv_heads, 0, config.kv_channels])], 0)
        self.empty = op.broadcast(op.constant(np.float32(0)), shape)

    def layer(self, number: int, x: Any) -> Any:
        """x [B, L, H] -> [B, L, H]."""
        config, name = self.config, f"{_BLOCKS}{number}.self_attention."
        heads, groups, size = config.num_attention_heads, config.num_kv_heads, config.kv_channels
        y = op.matmul(x, self.weights.matrix(f"{name}query_key_value.weight"), False, True)
        if config.add_qkv_bias:
            y = op.add(y, op.constant(self.weights.take(f"{name}query_key_value.bias")))
        y = op.reshape(y, _int([0, 0, heads + 2 * groups, size]), True)
        turned, values = op.variadic_split(y, _int(2), _int([heads + groups, groups])).outputs()
        queries, keys = op.variadic_split(self._turn(turned), _int(2), _int([heads, groups])).outputs()
        queries, keys, values = (op.transpose(part, _int([0, 2, 1, 3])) for part in (queries, keys, values))
        keys, values = (self._all(part, f"{number}.{kind}") for part, kind in ((keys, "keys"), (values, "values")))
        y = op.scaled_dot_product_attention(queries, keys, values, self.mask)
        y = op.reshape(op.transpose(y, _int([0, 2, 1, 3])), _int([0, 0, heads * size]), True)
        return op.matmul(y, self.weights.matrix(f"{name}dense.weight"), False, True)

    def _turn(self, x: Any) -> Any:
        """The rotary embedding of the first half of each head; x [B, L, heads, D]."""
        pairs = self.config.kv_channels // 4
        first, second, rest = op.variadic_split(x, _int(3), _int([pairs, pairs, -1])).outputs()
        return op.concat([
            op.subtract(op.multiply(first, self.cos), op.multiply(second, self.sin)),
            op.add(op.multiply(second, self.cos), op.multiply(first, self.sin)), rest,
        ], 3)  # fmt: skip

    def _all(self, new: Any, name: str) -> Any:
        """Appends new [B, G, L, D] to a state; all of it with a copy for each query head, [B, heads, T, D]."""
        config = self.config
        shape = ov.PartialShape([-1, config.num_kv_heads, -1, config.kv_channels])
        past = op.read_value(self.empty, name, np.float32, shape)
        grown = op.concat([op.gather(past, self.beams, _int(0)), new], 2)
        self.sinks.append(op.assign(grown, name))
        copies = config.num_attention_heads // config.num_kv_heads
        wide = op.broadcast(op.unsqueeze(grown, _int(2)), _int([1, 1, copies, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, _int([0, config.num_attention_heads, -1, config.kv_channels]), True)


class _Weights:
    """Random weights as constants of a type, taken in the order in which the network needs them."""

    def __init__(self, config: GLMConfig, kind: str) -> None:
        self.config, self.kind = config, kind
        self.arrays = random_weights(config)
        self.waiting: dict[str, np.ndarray] = {}

    def take(self, name: str) -> np.ndarray:
        """The array of a parameter, float32."""
        while name not in self.waiting:
            found, value = next(self.arrays)
            self.waiting[found] = value
        value = self.waiting.pop(name)
        return self._sorted(value) if "query_key_value" in name else value

    def matrix(self, name: str, embedding: bool = False) -> Any:
        """A matrix [N, K] as float32 of the graph; an embedding has at least 8 bits."""
        kind, value = self.kind, self.take(name)
        if kind == "float32":
            return op.constant(value)
        if kind == "float16":
            return op.convert(op.constant(value.astype(np.float16)), np.float32)
        return _int4(value) if kind == "int4" and not embedding else _int8(value)

    def _sorted(self, value: np.ndarray) -> np.ndarray:
        """Rows of queries, keys and values in this order, those of queries and keys sorted as `_Attention` says."""
        size = self.config.kv_channels
        places = np.arange(size)
        half = places[: size // 2].reshape(-1, 2).T.ravel()
        order = np.concatenate([half, places[size // 2 :]])
        *turned, values = qkv_parts(value, self.config)
        heads = [part.reshape(-1, size, *value.shape[1:])[:, order].reshape(part.shape) for part in turned]
        return np.concatenate([*heads, values])


def _int8(value: np.ndarray) -> Any:
    """8 bits with a scale for each row, NNCF's INT8_SYM."""
    scale = (np.abs(value).max(1, keepdims=True) / 127).astype(np.float16)
    numbers = np.rint(value / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    return op.convert(op.multiply(op.convert(op.constant(numbers), np.float16), op.constant(scale)), np.float32)


def _int4(value: np.ndarray) -> Any:
    """4 bits, -8 to 7, with a scale for each group of columns, NNCF's INT4_SYM."""
    rows, columns = value.shape
    groups = value.reshape(rows, -1, _GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = (largest / -8).astype(np.float16)
    numbers = np.rint(groups / scale.astype(np.float32)).clip(-8, 7).astype(np.int8) & 15
    packed = ov.Tensor(ov.Type.i4, ov.Shape(groups.shape))  # owns its memory, as a constant does not
    packed.data[:] = (numbers[..., ::2] | (numbers[..., 1::2] << 4)).reshape(packed.data.shape)
    wide = op.multiply(op.convert(op.constant(packed), np.float16), op.constant(scale))
    return op.convert(op.reshape(wide, _int([rows, columns]), False), np.float32)


def _norm(x: Any, weights: _Weights, name: str, config: GLMConfig) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), _int([-1]), True)
    root = op.sqrt(op.add(mean, op.constant(np.float32(config.layernorm_epsilon))))
    return op.multiply(op.multiply(x, op.divide(op.constant(np.float32(1)), root)), op.constant(weights.take(name)))


def _int(values: Any) -> Any:
    return op.constant(np.array(values, np.int64))
