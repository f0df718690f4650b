"""A ChatGLM network in torch with the module names of the original, for what only torch libraries can show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn


class TorchConfig(SimpleNamespace):
    """config.json as attributes; `peft` asks for it as a dict."""

    def to_dict(self) -> dict:
        return vars(self)

    def get(self, name: str, default: object = None) -> object:
        return getattr(self, name, default)


class RMSNorm(nn.Module):
    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layernorm_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.dim = config.kv_channels
        width = (self.heads + 2 * self.groups) * self.dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=True)
        self.dense = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, N, D]; positions 0, 1, ..."""
        half = self.dim // 2
        theta = 10000.0 ** (-torch.arange(0, half, 2) / half)
        angle = torch.outer(torch.arange(x.shape[1]).float(), theta)[None, :, None]
        even, odd = x[..., :half:2], x[..., 1:half:2]
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        return torch.cat((turned, x[..., half:]), -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.query_key_value(x).view(batch, length, -1, self.dim)
        query, key, value = qkv.split((self.heads, self.groups, self.groups), dim=2)
        query, key = self.rotate(query), self.rotate(key)
        key, value = (t.repeat_interleave(self.heads // self.groups, dim=2) for t in (key, value))
        scores = torch.einsum("bsnd,btnd->bnst", query, key) / math.sqrt(self.dim)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("bnst,btnd->bsnd", weights, value).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config), RMSNorm(config)
        self.self_attention, self.mlp = SelfAttention(config), MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config)


class Transformer(nn.Module):
    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)


class TorchGLM(nn.Module):
    """Logits of unpadded rows, for configurations like those of the released models.

    Args:
        folder: Hugging Face folder with safetensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = TorchConfig(**json.loads((folder / "config.json").read_text()))
        self.transformer = Transformer(self.config)
        weights = load_file(folder / "model.safetensors")
        weights.pop("transformer.rotary_pos_emb.inv_freq", None)
        self.load_state_dict(weights)

    def forward(self, input_ids: torch.Tensor, **absent: object) -> torch.Tensor:
        """Logits; `peft` passes further arguments, all of them None or False."""
        assert not any(absent.values())
        x = self.transformer.embedding["word_embeddings"](input_ids)
        for layer in self.transformer.encoder.layers:
            x = layer(x)
        return self.transformer.output_layer(self.transformer.encoder.final_layernorm(x))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`peft` wants the method to be there for a causal language model."""
        return {"input_ids": input_ids}
