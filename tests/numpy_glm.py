"""A GLM in plain NumPy that computes everything anew at each step: an independent reference for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from slot_decoder import SlotDecoder


class NumpyGLM(SlotDecoder):
    """All variants of the golden models, read from a folder in Hugging Face format."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = json.loads((folder / "config.json").read_text())
        self.vocab_size = self.config["padded_vocab_size"]
        self.weights = load_file(folder / "model.safetensors")

    def scores(self, rows):
        longest = max(len(row.ids) for row in rows)
        ids, mask, positions = np.zeros((3, len(rows), longest), np.int32)
        for index, row in enumerate(rows):
            start = longest - len(row.ids)
            ids[index, start:], mask[index, start:], positions[index, start:] = row.ids, 1, row.positions
        return self.logits(ids, mask, positions)[:, -1]

    def logits(self, input_ids, attention_mask, position_ids):
        config = self.config
        x = self.weights["transformer.embedding.word_embeddings.weight"][input_ids]
        for layer in range(config["num_layers"]):
            name = f"transformer.encoder.layers.{layer}"
            normed = self.norm(x, f"{name}.input_layernorm")
            residual = normed if config["apply_residual_connection_post_layernorm"] else x
            x = residual + self.attention(normed, attention_mask, position_ids, f"{name}.self_attention")
            normed = self.norm(x, f"{name}.post_attention_layernorm")
            residual = normed if config["apply_residual_connection_post_layernorm"] else x
            gate, up = np.split(self.linear(normed, f"{name}.mlp.dense_h_to_4h"), 2, axis=-1)
            x = residual + self.linear(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.dense_4h_to_h")
        if config["post_layer_norm"]:
            x = self.norm(x, "transformer.encoder.final_layernorm")
        return self.linear(x, "transformer.output_layer")

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", np.float32(0))

    def norm(self, x, name):
        if not self.config["rmsnorm"]:
            x = x - x.mean(-1, keepdims=True)
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config["layernorm_epsilon"]))
        return x * scale * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", np.float32(0))

    def attention(self, x, mask, positions, name):
        (batch, length, _), heads = x.shape, self.config["num_attention_heads"]
        size, qkv = self.config["kv_channels"], self.linear(x, f"{name}.query_key_value")
        if self.config["multi_query_attention"]:
            groups = self.config["multi_query_group_num"]
            parts = np.split(qkv, [heads * size, (heads + groups) * size], axis=-1)
            q, k, v = (part.reshape(batch, length, -1, size) for part in parts)
            k, v = np.repeat(k, heads // groups, axis=2), np.repeat(v, heads // groups, axis=2)
        else:
            q, k, v = np.split(qkv.reshape(batch, length, heads, 3 * size), 3, axis=-1)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(np.float32(size))
        visible = np.tril(np.ones((length, length), bool)) & (mask == 1)[:, None, None, :]
        scores = np.where(visible, scores, np.float32(-1e30))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        out = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
        return self.linear(out, f"{name}.dense")

    def rotate(self, x, positions):
        half = self.config["kv_channels"] // 2
        base = 10000 * self.config.get("rope_ratio", 1)
        angles = positions[..., None, None] * base ** (-np.arange(0, half, 2) / half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        even, odd = x[..., 0:half:2], x[..., 1:half:2]
        turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return np.concatenate([turned.reshape(*even.shape[:-1], half), x[..., half:]], axis=-1)
