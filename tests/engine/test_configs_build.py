"""Every YAML under configs builds its network, with one layer and small sizes, and computes a loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import CONFIGS
from marks import slow_unless

from glm_ms import GLMForCausalLM
from glm_ms.settings import load_settings, machine_problems, resolve_vocab_size

FILES = sorted(CONFIGS.rglob("*.yaml"))
SIZES = {
    "num_layers": 1, "padded_vocab_size": 128, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
    "num_attention_heads": 4, "multi_query_group_num": 2,
}  # fmt: skip


# Every file is loaded and checked in tests/configs; a network of each takes three seconds.
@pytest.mark.parametrize("path", slow_unless(FILES[::9], FILES), ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_network_and_loss(path: Path) -> None:
    settings = load_settings(path, flags={"device_target": "CPU", "use_parallel": False}, check_files=False)
    assert not machine_problems(settings, environment={})
    resolve_vocab_size(settings, 100)
    config = settings.glm_config()
    model = GLMForCausalLM(dataclasses.replace(config, **SIZES))
    assert model.config.seq_length == config.seq_length
    assert model.config.compute_dtype == "float32"
    ids = np.arange(2, 26).reshape(2, 12)
    loss = float(model(ids, labels=ids).asnumpy())
    assert loss == pytest.approx(math.log(SIZES["padded_vocab_size"]), abs=0.5)  # of a network that knows nothing
