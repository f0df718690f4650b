"""PyTorch: `GlmForCausalLM` of transformers with the same weights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import DynamicCache, GlmConfig, GlmForCausalLM

from glm_ms.bench.random_weights import random_ids, random_weights, training_batch
from glm_ms.bench.subjects import Setup
from glm_ms.convert.hf_glm import glm_tensors
from glm_ms.model.config import GLMConfig

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "amp": torch.float32}


class TorchPeer:
    """See `glm_ms.bench.subjects`. `amp`: float32 weights, products in bfloat16 (`torch.autocast`); training only."""

    def build(self, setup: Setup) -> dict[str, Any]:
        torch.set_num_threads(setup.threads)
        self.config, self.dtype = GLMConfig(**setup.config), _TYPES[setup.weights]
        self.amp = setup.weights == "amp"
        known = _glm_config(self.config)
        with torch.device("meta"):
            model = GlmForCausalLM(known)
        model = model.to(self.dtype).to_empty(device="cpu")
        weights = {name: parameter for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, value in random_weights(self.config):
                for part, rows in glm_tensors(name, value, self.config):
                    weights.pop(part).copy_(torch.from_numpy(np.ascontiguousarray(rows)))
        assert not weights, sorted(weights)
        # Buffers of the rotation have no data on "meta".
        model.model.rotary_emb = type(model.model.rotary_emb)(known)
        self.model = model.eval()
        return {"version": f"torch {torch.__version__}, transformers {transformers.__version__}"}

    def open(self, rows: int, context: int, steps: int) -> None:
        self.prompt, self.count = max(1, context - steps), steps
        ids = random_ids(self.config, rows * self.prompt, rows).reshape(rows, -1)
        self.cache = DynamicCache()
        for begin in range(0, self.prompt, 512):
            self.first = self._run(ids[:, begin : begin + 512], self.cache)
        self.steps()

    def steps(self) -> list[float]:
        if extra := self.cache.get_seq_length() - self.prompt:
            self.cache.crop(-extra)
        logits, times = self.first, []
        for _ in range(self.count):
            start = time.perf_counter()
            logits = self._run(logits.argmax(-1)[:, None], self.cache)
            times.append(time.perf_counter() - start)
        return times

    def prefill(self, length: int) -> float:
        ids = random_ids(self.config, length, 1)[None]
        start = time.perf_counter()
        self._run(ids, DynamicCache()).argmax(-1)
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._run(np.array([ids]), DynamicCache())[0]

    def _run(self, ids: np.ndarray, cache: DynamicCache) -> np.ndarray:
        """Logits float32 [rows, V] after the last token."""
        with torch.inference_mode():
            tokens = torch.from_numpy(np.ascontiguousarray(ids, np.int64))
            done = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return done.logits[:, -1].float().numpy()

    def open_training(self, rows: int, length: int, lora: bool, used: float, labelled: float) -> None:
        """AdamW, clipping at 1; with LoRA of rank 8 on queries, keys and values, else all weights."""
        self.model.train()
        if lora:
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for layer in self.model.model.layers:
                for name in ("q_proj", "k_proj", "v_proj"):
                    setattr(layer.self_attn, name, _Lora(getattr(layer.self_attn, name)))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        arrays = training_batch(self.config, rows, length, used, labelled)
        self.batch = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
        self.train()

    def train(self) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            ids, labels, mask = self.batch
            loss = self.model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        assert torch.isfinite(loss)
        return seconds

    def write(self, setup: Setup) -> None:
        """The folder that `load` reads."""
        if not setup.file(".hf-glm").exists():
            self.build(setup)
            self.model.save_pretrained(setup.file(".hf-glm"))

    def load(self, setup: Setup) -> dict[str, float]:
        torch.set_num_threads(setup.threads)
        self.config = GLMConfig(**setup.config)
        start = time.perf_counter()
        self.model = GlmForCausalLM.from_pretrained(setup.file(".hf-glm"), dtype=_TYPES[setup.weights]).eval()
        loaded = time.perf_counter()
        self.logits([5])
        return {"load": loaded - start, "first_logits": time.perf_counter() - loaded}


class _Lora(nn.Module):
    """y = base(x) + B A x * 2, rank 8; A normal, B zero."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base, dtype = base, base.weight.dtype
        self.a = nn.Parameter(torch.randn(rank, base.in_features, dtype=dtype) * 0.02)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T * 2


def _glm_config(config: GLMConfig) -> GlmConfig:
    return GlmConfig(
        vocab_size=config.padded_vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.kv_channels, attention_bias=config.add_qkv_bias, attention_dropout=0.0,
        max_position_embeddings=config.seq_length, rms_norm_eps=config.layernorm_epsilon,
        rope_theta=10000.0 * config.rope_ratio, partial_rotary_factor=0.5, tie_word_embeddings=False,
        pad_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
