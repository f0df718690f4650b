"""The programs that are measured. Each runs in a process of its own (`glm_ms.bench.worker`) and imports only what it
needs, so that a peer's interpreter may lack MindSpore.

A subject is a class with these methods; times are seconds.

    build(setup)                  loads the weights; returns its version
    open(rows, context, steps)    prepares steps of `rows` sequences, the last of which ends at `context` tokens
    steps() -> [float]            the time of each step; every call begins at the same length
    prefill(length) -> float      a prompt of random ids, up to the logits after its last token
    logits(ids) -> float32 [V]    after the last of some ids
    open_training(rows, length, lora, used, labelled)
    train() -> float              one update with rows x length places; see `training_batch`
    load(setup) -> {}             a checkpoint on disk to the first logits

One that does not train has no methods for that.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OURS, TORCH, LLAMA_CPP, OPENVINO = "glm_ms", "torch", "llamacpp", "openvino"


class Kind(NamedTuple):
    """Where the class of a subject is, the types of weights it has with their bits per element, packages it needs.

    `trains`, `loads` and `runs` are the types that it trains, that it loads from files, and that do all else.
    """

    place: str
    bits: dict[str, float]
    packages: tuple[str, ...] = ()
    trains: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


_OPENVINO_BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4.5}
_LLAMA_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8.5, "int4": 4.5}  # with scales of 32 elements
SUBJECTS = {
    OURS: Kind(
        "glm_ms.bench.subjects.ours:Ours",
        {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4.5, "amp": 32}, (), ("float32", "amp"),
        ("float32", "int8", "int4"), ("float32", "bfloat16", "float16", "int8", "int4"),
    ),
    TORCH: Kind(
        "glm_ms.bench.subjects.torch_peer:TorchPeer", {"float32": 32, "bfloat16": 16, "amp": 32},
        ("torch", "transformers", "sentencepiece", "yaml"), ("float32", "bfloat16", "amp"), ("float32", "bfloat16"),
        ("float32", "bfloat16"),
    ),
    LLAMA_CPP: Kind(
        "glm_ms.bench.subjects.llama_peer:LlamaPeer", _LLAMA_BITS, ("llama_cpp", "numpy", "sentencepiece", "yaml"), (),
        tuple(_LLAMA_BITS), tuple(_LLAMA_BITS),
    ),
    OPENVINO: Kind(
        "glm_ms.bench.subjects.openvino_peer:OpenVinoPeer", _OPENVINO_BITS,
        ("openvino", "numpy", "sentencepiece", "yaml"), (), tuple(_OPENVINO_BITS), tuple(_OPENVINO_BITS),
    ),
}  # fmt: skip


@dataclass
class Setup:
    """What a subject builds.

    Attributes:
        config: fields of `GLMConfig`.
        weights: type of the weights, a key of `Kind.bits`.
        threads: threads to use; the process may use so many cores.
        folder: for files of weights, which later subjects of the same network use again.
    """

    config: dict[str, Any]
    weights: str
    threads: int
    folder: str

    def file(self, ending: str) -> Path:
        """The file of these weights in `folder`; a name per network and type."""
        numbers = {key: value for key, value in self.config.items() if not isinstance(value, (bool, str))}
        sizes = "-".join(str(value) for key, value in numbers.items() if key != "seq_length")
        return Path(self.folder, f"{sizes}-{self.weights}{ending}")


def make(name: str) -> Any:
    """A subject by its name; ImportError if a package is missing here."""
    module, _, cls = SUBJECTS[name].place.partition(":")
    return getattr(importlib.import_module(module), cls)()


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024


def timed_load(build: Callable[[], object], run: Callable[[], object]) -> dict[str, float]:
    """What `load` returns: seconds of loading, and of the first logits."""
    start = time.perf_counter()
    build()
    loaded = time.perf_counter()
    run()
    return {"load": loaded - start, "first_logits": time.perf_counter() - loaded}
