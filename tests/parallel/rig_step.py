"""Run by the rig for every rank: compiles the training step of a YAML file and holds each slice to the rules.

rig_step.py CONFIG LAYERS [key=value ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import rig

rank, size = rig.start()

import mindspore as ms  # noqa: E402

from glm_ms import GLMForCausalLM  # noqa: E402
from glm_ms.engine.checkpoints.slices import stored_shape  # noqa: E402
from glm_ms.engine.ranks import Ranks  # noqa: E402
from glm_ms.engine.step.adamw import GLMAdamW  # noqa: E402
from glm_ms.engine.step.sharding import ShardedTraining  # noqa: E402
from glm_ms.engine.step.training import parallel_context  # noqa: E402
from glm_ms.engine.weights import adapter_config  # noqa: E402
from glm_ms.parallel.layers import sharded_glm  # noqa: E402
from glm_ms.settings import load_settings, resolve_vocab_size  # noqa: E402
from glm_ms.settings.schema import parallel_of, training_length  # noqa: E402

path, layers, *overrides = sys.argv[1:]
settings = load_settings(
    path, [*overrides, f"model.model_config.num_layers={layers}"], {"output_dir": rig.out_dir()}, check_files=False
)
resolve_vocab_size(settings, 100)
context = {**parallel_context(settings), "parallel_mode": "semi_auto_parallel"}
if settings.parallel_config.pipeline_stage > 1:
    context["pipeline_stages"] = settings.parallel_config.pipeline_stage
ms.set_auto_parallel_context(device_num=size, global_rank=rank, **context)

config = settings.glm_config()
model = GLMForCausalLM(config, sharded_glm(config, parallel_of(settings)))
adapter = adapter_config(settings)
if adapter is not None:
    model.add_adapter(adapter)
training = ShardedTraining(settings, Ranks(rank, size), print)
training.model = model
network = training.build_network(training_length(settings))
step = training.build_step(GLMAdamW(training.trained_parameters(), 1e-3))
layouts = training.compile(step)
moments = {f"adam_m.{parameter.name}" for parameter in training.trained_parameters()}
found = {name: stored_shape(step.parameter_layout_dict[name]) for name in [*layouts, *sorted(moments)]}
for name in moments:
    assert found[name] == found[name.removeprefix("adam_m.")], name
for parameter in network.get_parameters():
    assert parameter.name not in layouts or tuple(parameter.shape) == found[parameter.name], parameter.name
Path(os.environ["RIG_OUT"], f"slices_rank_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
rig.done()
