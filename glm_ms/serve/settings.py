"""Sizes and limits of a server: `ServeSettings`. Importing it loads no MindSpore."""

from __future__ import annotations

from dataclasses import dataclass

from glm_ms.ops.cpu.rows import STORAGE

HOST, PORT = "127.0.0.1", 8000
# Types of keys and values in memory.
KV_CACHES = tuple(STORAGE)


@dataclass(frozen=True)
class ServeSettings:
    """What a server is compiled for, and what its requests may use."""

    slots: int = 8  # answers at a time
    context: int = 2048  # most tokens of a prompt and its answer; that of the model if that is less
    kv_cache: str | None = None  # type of keys and values, one of KV_CACHES; None: as exact as the arithmetic
    max_queue: int = 64  # most requests that wait for slots
    max_seconds: float = 600.0  # after so many an answer ends as it is, waiting included
    drain_seconds: float = 30.0  # for answers that have begun when the server is told to stop
    max_adapters: int | None = None  # at a time; None: those given at the start
    max_lora_rank: int | None = None  # None: what the adapters need; 16 with room for more
    max_prefix: int | None = None  # most positions of a P-Tuning prefix; None: what the adapters need
