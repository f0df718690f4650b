"""glm_ms as it is used: the slot decoder for generation, the training step of the engine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms.bench.random_weights import random_ids, random_weights, training_batch
from glm_ms.bench.subjects import Setup
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.writers import write_hf_folder
from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.network import TrainingNetwork
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.generation import GLMForCausalLM
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.pool import DecoderPool
from glm_ms.model.config import GLMConfig
from glm_ms.peft.lora import LoraConfig
from glm_ms.pretrained import load_pretrained
from glm_ms.quant import quantization
from glm_ms.quant.network import cells_for, quantized_parameters
from glm_ms.quant.writer import plan_quantization
from glm_ms.version import __version__

_QUANTISED = {"int8": quantization(8), "int4": quantization(4)}
_LORA_TARGETS = ".*query_key_value"


class Ours:
    """See `glm_ms.bench.subjects`. `amp`: float32 weights, products in bfloat16; training only."""

    model: GLMForCausalLM
    decoder: PagedDecoder

    def build(self, setup: Setup) -> dict[str, Any]:
        """Random weights in memory, or quantized ones of an earlier run in files."""
        ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
        self.config, self.amp = GLMConfig(**setup.config), setup.weights == "amp"
        if setup.weights in ("float16", "bfloat16"):
            self.config = replace(self.config, param_init_type=setup.weights)
        how, weights = _QUANTISED.get(setup.weights), random_weights(self.config, self.config.param_init_type)
        if how is not None and setup.file(".hf").exists():
            self.model = load_pretrained(setup.file(".hf"), self.config)
        else:
            if how is not None:
                weights = quantized_parameters(weights, expected_shapes(self.config), how)
            self.model = GLMForCausalLM.from_parameters(self.config, weights, cells_for(how), share=True)
        self.decoders = DecoderPool(self.model.network)
        self.running: list[int] = []
        self.prompts = 0
        return {"version": f"{__version__}, MindSpore {ms.__version__}"}

    def open(self, rows: int, context: int, steps: int) -> None:
        """Compiles, and runs the prompts once: later calls of `steps` find their pages."""
        self.decoder = self.decoders.decoder(rows, context)
        self.running, self.count = [], steps
        ids = random_ids(self.config, rows * max(1, context - steps), rows).reshape(rows, -1)
        self.rows = [Prompt(row, np.arange(len(row), dtype=np.int32)) for row in ids]
        self.steps()

    def steps(self) -> list[float]:
        self.decoder.free(self.running)
        self.running, logits = self.decoder.add(self.rows)
        times = []
        for _ in range(self.count):
            start = time.perf_counter()
            logits = self.decoder.step(self.running, logits.argmax(-1).astype(np.int32))
            times.append(time.perf_counter() - start)
        return times

    def prefill(self, length: int) -> float:
        """A prompt that nobody has computed before."""
        self.prompts += 1
        ids = random_ids(self.config, length, self.prompts)
        decoder = self.decoder = self.decoders.decoder(1, length)
        start = time.perf_counter()
        slots, logits = decoder.add([Prompt(ids, np.arange(length, dtype=np.int32))])
        logits.argmax(-1)
        seconds = time.perf_counter() - start
        decoder.free(slots)
        return seconds

    def logits(self, ids: list[int]) -> np.ndarray:
        decoder = self.decoder = self.decoders.decoder(1, len(ids))
        slots, logits = decoder.add([Prompt(np.array(ids, np.int32), np.arange(len(ids), dtype=np.int32))])
        decoder.free(slots)
        return logits[0].astype(np.float32)

    def open_training(self, rows: int, length: int, lora: bool, used: float, labelled: float) -> None:
        """AdamW, clipping at 1; with LoRA of rank 8 on query_key_value, else all weights."""
        if lora:
            self.model.add_adapter(LoraConfig(rank=8, dropout=0.0, target_modules=_LORA_TARGETS))
        network = TrainingNetwork(self.model.network, length, bfloat16=self.amp)
        network.set_train(True)
        self.step = GLMTrainOneStep(network, GLMAdamW(network.trainable_params(), 1e-4), max_grad_norm=1.0)
        any_length = Tensor(shape=[rows, None], dtype=ms.int32)
        self.step.set_inputs(*[any_length] * 4)
        ids, labels, mask = training_batch(self.config, rows, length, used, labelled)
        places = np.tile(np.arange(ids.shape[1], dtype=np.int32), (rows, 1))
        self.batch = [Tensor(array) for array in (ids, labels, mask, places)]
        self.train()

    def train(self) -> float:
        start = time.perf_counter()
        loss = self.step(*self.batch)[0].asnumpy()
        seconds = time.perf_counter() - start
        assert np.isfinite(loss)
        return seconds

    def load(self, setup: Setup) -> dict[str, float]:
        """A Hugging Face folder to the first logits."""
        ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
        self.config = GLMConfig(**setup.config)
        start = time.perf_counter()
        self.model = load_pretrained(setup.file(".hf"))
        loaded = time.perf_counter()
        self.decoders = DecoderPool(self.model.network)
        self.logits([5])
        return {"load": loaded - start, "first_logits": time.perf_counter() - loaded}

    def write(self, setup: Setup) -> None:
        """The files that `load` reads."""
        config, plain = GLMConfig(**setup.config), replace(setup, weights="float32").file(".hf")
        if not plain.exists():
            write_hf_folder(plain, config, expected_shapes(config), "float32", random_weights(config))
        if setup.weights in _QUANTISED and not setup.file(".hf").exists():
            plan_quantization(plain, setup.file(".hf"), _QUANTISED[setup.weights]).run()
