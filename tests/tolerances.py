"""The tolerances of tests/golden/README.md, by name. Nothing here is ever loosened to make a test pass."""

LOGITS = {"atol": 1e-4, "rtol": 1e-4}  # logits, hidden states, caches, incremental logits
HF_GLM = {"atol": 1e-5, "rtol": 1e-5}  # logits of GlmForCausalLM, whose float32 operations are those of the reference
LOSS = {"atol": 2e-5, "rtol": 0}  # loss and loss per token
GRAD_NORM = {"rtol": 1e-4, "atol": 1e-6}
GRADIENT = 1e-4  # of the largest element of a gradient, element by element
LOSS_CURVE = {"atol": 1e-4, "rtol": 0}
WEIGHT_NORM = {"rtol": 1e-5, "atol": 0}
ADAPTER = {"atol": 1e-4, "rtol": 0}  # trained adapters, element by element
PROBABILITY = {"atol": 1e-6, "rtol": 0}
BEAM_SCORE = {"atol": 1e-4, "rtol": 0}
METRIC = {"atol": 1e-3, "rtol": 0}
ROPE = {"atol": 1e-5, "rtol": 0}  # up to position 100
ROPE_FAR = {"atol": 4e-3, "rtol": 0}  # at position 32767: float32 rounding of the angle
GGUF_LOGITS = {"F32": 1e-5, "Q8_0": 4e-2}  # logits of llama.cpp, of the largest; its Q8_0 rounds activations to 8 bits
# Relative, of a curve whose products have operands of bfloat16 against that of float32.
BF16_LOSS = 5e-3
BF16_GRAD_NORM = 5e-2
