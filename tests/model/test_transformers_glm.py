"""The network against an independent implementation, transformers' GlmForCausalLM, at sizes the goldens lack."""

from __future__ import annotations

import numpy as np
import pytest
from marks import slow_unless
from tolerances import LOGITS, LOSS

from glm_ms import GLMConfig, GLMForCausalLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# (layers, hidden, ffn, heads, groups, head channels, vocabulary, rope ratio)
SIZES = [(4, 128, 300, 8, 4, 64, 700, 1), (2, 96, 128, 6, 6, 24, 300, 1), (3, 64, 96, 8, 1, 16, 999, 50)]


def build_pair(size: tuple[int, ...]) -> tuple[GLMForCausalLM, object]:
    """Our model and theirs with the same random weights."""
    layers, hidden, ffn, heads, groups, dim, vocab, ratio = size
    torch.manual_seed(layers)
    theirs = transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=dim,
            partial_rotary_factor=0.5,
            rope_theta=10000.0 * ratio,
            rms_norm_eps=1e-5,
            attention_bias=True,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=2,
            max_position_embeddings=256,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    config = GLMConfig(
        num_layers=layers,
        padded_vocab_size=vocab,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        kv_channels=dim,
        num_attention_heads=heads,
        multi_query_group_num=groups,
        seq_length=256,
        rope_ratio=ratio,
    )
    return GLMForCausalLM.from_parameters(config, our_weights(theirs, layers).items()), theirs


def our_weights(theirs: object, layers: int) -> dict[str, np.ndarray]:
    """Their parameters by our names; q, k and v are joined."""
    state = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    weights = {
        "transformer.embedding.embedding_table": state["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
    }
    for i in range(layers):
        old, new = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            weights[f"{new}self_attention.query_key_value.{kind}"] = np.concatenate(parts)
        weights[f"{new}self_attention.dense.weight"] = state[f"{old}self_attn.o_proj.weight"]
        weights[f"{new}mlp.dense_h_to_4h.weight"] = state[f"{old}mlp.gate_up_proj.weight"]
        weights[f"{new}mlp.dense_4h_to_h.weight"] = state[f"{old}mlp.down_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{new}{norm}.weight"] = state[f"{old}{norm}.weight"]
    return weights


@pytest.mark.parametrize("size", slow_unless([SIZES[2]], SIZES))
def test_logits_loss_and_greedy(size: tuple[int, ...]) -> None:
    ours, theirs = build_pair(size)
    ids = np.random.default_rng(0).integers(3, size[6], (2, 40))
    mask = np.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        expected = theirs(torch.tensor(ids), torch.tensor(mask), position_ids=positions).logits.numpy()
        loss = theirs(torch.tensor(ids[:1]), labels=torch.tensor(ids[:1])).loss.item()
        greedy = theirs.generate(torch.tensor(ids[:1]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    real = mask == 1
    np.testing.assert_allclose(ours(ids, mask).asnumpy()[real], expected[real], **LOGITS)
    np.testing.assert_allclose(float(ours(ids[:1], labels=ids[:1])), loss, **LOSS)
    assert ours.generate(ids[:1], max_new_tokens=12, eos_token_id=[]) == greedy.tolist()
