"""Planned activations against what MindSpore's memory pool really held, on a CPU with the portable operators.

The plan is one for cards; the kernels of the CPU keep less.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow_unless

from glm_ms.ops.cpu import library
from glm_ms.plan import plan_run
from glm_ms.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "tiny" / "finetune_glm3_tiny.yaml"
TOLERANCE = 0.25  # of what was measured


def keys(rows: int, length: int, layers: int, hidden: int, ffn: int, vocabulary: int, *more: str) -> tuple[str, ...]:
    """Settings of a network of 8 heads, 2 groups."""
    sizes = {
        "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "padded_vocab_size": vocabulary,
        "num_attention_heads": 8, "kv_channels": hidden // 8, "multi_query_group_num": 2, "seq_length": length,
    }  # fmt: skip
    return (
        *(f"model.model_config.{name}={value}" for name, value in sizes.items()),
        f"train_dataset.max_source_length={length // 2}", f"train_dataset.max_target_length={length - length // 2 - 1}",
        f"runner_config.batch_size={rows}", "do_eval=False", *more,
    )  # fmt: skip


RECOMPUTE = "recompute_config.recompute=True"
BASE = "load_checkpoint=base"
LORA = (BASE, "model.pet_config.pet_type=lora", "model.pet_config.lora_rank=2")
SHARDED = ("use_parallel=True", "parallel.parallel_mode=1", "parallel.full_batch=True")
# Long rows: scores. Wide: the MLP. Words: logits.
LONG, WIDE, WORDS = (8, 384, 3, 128, 256, 512), (16, 128, 4, 128, 1024, 512), (8, 128, 1, 64, 128, 32000)
CASES = {
    "long": keys(*LONG),
    "long, recompute": keys(*LONG, RECOMPUTE),
    "long, deeper, recompute": keys(8, 384, 8, 128, 256, 512, RECOMPUTE),
    "wide": keys(*WIDE),
    "wide, recompute": keys(*WIDE, RECOMPUTE),
    "words": keys(*WORDS),
    "long, lora": keys(*LONG, *LORA),
    "wide, lora on everything": keys(*WIDE, *LORA, "model.pet_config.target_modules=.*encoder.*"),
    "wide, lora, recompute": keys(*WIDE, *LORA, RECOMPUTE),
    "long, prefix": keys(*LONG, BASE, "model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=64"),
    "wide, dropout": keys(*WIDE, "model.model_config.hidden_dropout=0.1"),
    "long, dropout": keys(*LONG, "model.model_config.attention_dropout=0.1"),
    "long, layer norm": keys(*LONG, "model.model_config.rmsnorm=False"),
    "long, sharded": keys(*LONG, *SHARDED),
    "wide, sharded": keys(*WIDE, *SHARDED),
    "wide, sharded, recompute": keys(*WIDE, *SHARDED, RECOMPUTE),
    "words, sharded": keys(*WORDS, *SHARDED),
}
EVERY_DAY = ()


def measured(overrides: tuple[str, ...]) -> int:
    """Most bytes that the pool held; parameters and moments lie elsewhere on a CPU."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure_step.py")), str(CONFIG), *overrides],
        env={
            **os.environ, library.SWITCH: "0", "MS_DEV_RUNTIME_CONF": "memory_statistics:True",
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = re.search(r"peak used mem:(\d+)M", done.stdout + done.stderr)
    assert found, (done.stdout + done.stderr)[-3000:]
    return int(found.group(1)) * 2**20


@pytest.mark.parametrize("name", slow_unless(EVERY_DAY, CASES))
def test_activations(name: str) -> None:
    settings = load_settings(CONFIG, CASES[name], check_files=False)
    card = plan_run(settings, 1).card
    peak = measured(CASES[name])
    # Only part of the gradients is there at the peak: they must not decide.
    assert card.gradients < 0.2 * peak
    assert abs(card.activations - peak) < TOLERANCE * peak, f"planned {card.activations:,}, measured {peak:,}"
