"""Sizes and limits of a server: `ServeSettings`. Importing it loads no MindSpore."""

from __future__ import annotations

from dataclasses import dataclass

HOST, PORT = "127.0.0.1", 8000


@dataclass(frozen=True)
class ServeSettings:
    """What a server is compiled for, and what its requests may use."""

    slots: int = 8  # answers at a time
    context: int = 2048  # most tokens of a prompt and its answer; that of the model if that is less
    max_queue: int = 64  # most requests that wait for slots
    max_seconds: float = 600.0  # after so many an answer ends as it is, waiting included
    prompt_lookup_num_tokens: int = 10  # of every answer, see `GenerationConfig`, whose default this is; 0: none
    drain_seconds: float = 30.0  # for answers that have begun when the server is told to stop
    max_adapters: int | None = None  # at a time; None: those given at the start
    max_lora_rank: int | None = None  # None: what the adapters need; 16 with room for more
    max_prefix: int | None = None  # most positions of a P-Tuning prefix; None: what the adapters need
