"""llama.cpp through llama-cpp-python, with a GGUF file of the same weights."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as cpp
import numpy as np

from glm_ms.bench.random_weights import random_ids, random_weights
from glm_ms.bench.subjects import Setup, timed_load
from glm_ms.convert.gguf_model import ENDING, write_gguf_model
from glm_ms.convert.names import expected_shapes
from glm_ms.model.config import GLMConfig

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
_CHUNK = 512  # tokens of a call, llama.cpp's default


class LlamaPeer:
    """See `glm_ms.bench.subjects`."""

    context: Any = None
    batch: Any = None

    def write(self, setup: Setup) -> None:
        """The file that `build` and `load` read."""
        config = GLMConfig(**setup.config)
        if not setup.file(ENDING).exists():
            write_gguf_model(
                setup.file(ENDING), config, TYPES[setup.weights], expected_shapes(config), random_weights(config), None
            )

    def build(self, setup: Setup) -> dict[str, Any]:
        self.write(setup)
        self.config, self.threads = GLMConfig(**setup.config), setup.threads
        cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        cpp.llama_backend_init()
        options = cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = cpp.llama_model_load_from_file(str(setup.file(ENDING)).encode(), options)
        assert self.model, f"llama.cpp cannot load {setup.file(ENDING)}"
        return {"version": f"llama-cpp-python {cpp.__version__}"}

    def open(self, rows: int, context: int, steps: int) -> None:
        self.prompt, self.count = max(1, context - steps), steps
        self._new_context(rows, self.prompt + steps)
        ids = random_ids(self.config, rows * self.prompt, rows).reshape(rows, -1)
        self.first = np.stack([self._run_prompt(row, number) for number, row in enumerate(ids)])
        self.steps()

    def steps(self) -> list[float]:
        for row in range(len(self.first)):
            cpp.llama_memory_seq_rm(self.memory, row, self.prompt, -1)
        logits, times = self.first, []
        for step in range(self.count):
            start = time.perf_counter()
            logits = self._decode([(token, self.prompt + step, row) for row, token in enumerate(logits.argmax(-1))])
            times.append(time.perf_counter() - start)
        return times

    def prefill(self, length: int) -> float:
        self._new_context(1, length)
        ids = random_ids(self.config, length, 1)
        start = time.perf_counter()
        self._run_prompt(ids, 0).argmax(-1)
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        self._new_context(1, len(ids))
        return self._run_prompt(np.array(ids), 0)

    def load(self, setup: Setup) -> dict[str, float]:
        return timed_load(lambda: self.build(setup), lambda: self.logits([5]))

    def _new_context(self, rows: int, tokens: int) -> None:
        """A cache for `rows` sequences of so many tokens; its types are llama.cpp's defaults."""
        if self.context is not None:
            cpp.llama_batch_free(self.batch)
            cpp.llama_free(self.context)
        options = cpp.llama_context_default_params()
        room = -(-tokens // 256) * 256  # llama.cpp rounds likewise
        options.n_ctx, options.n_seq_max = room * rows, rows
        options.n_batch = options.n_ubatch = _CHUNK
        options.n_threads = options.n_threads_batch = self.threads
        self.context = cpp.llama_init_from_model(self.model, options)
        assert self.context, "llama.cpp has no memory for this cache"
        self.memory = cpp.llama_get_memory(self.context)
        self.batch = cpp.llama_batch_init(_CHUNK, 0, 1)

    def _run_prompt(self, ids: np.ndarray, row: int) -> np.ndarray:
        """Logits [V] after the last token of a prompt in an empty row."""
        cpp.llama_memory_seq_rm(self.memory, row, 0, -1)
        for begin in range(0, len(ids), _CHUNK):
            part = ids[begin : begin + _CHUNK]
            places = [(token, begin + place, row) for place, token in enumerate(part)]
            logits = self._decode(places, last_only=True)
        return logits[0]

    def _decode(self, places: list[tuple[Any, int, int]], last_only: bool = False) -> np.ndarray:
        """Runs (token, position, row) triples. Logits float32 [n, V], after all of them or the last one."""
        batch = self.batch
        batch.n_tokens = len(places)
        for index, (token, position, row) in enumerate(places):
            batch.token[index], batch.pos[index] = int(token), position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = not last_only or index == len(places) - 1
        code = cpp.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returned {code}"
        wanted = [len(places) - 1] if last_only else range(len(places))
        width = self.config.padded_vocab_size
        return np.stack([
            np.ctypeslib.as_array(cpp.llama_get_logits_ith(self.context, index), (width,)) for index in wanted
        ])  # fmt: skip


@cpp.llama_log_callback
def _SILENT(level: int, text: bytes, data: Any) -> None:  # noqa: N802, kept for the life of the process
    """llama.cpp writes pages of notes."""
