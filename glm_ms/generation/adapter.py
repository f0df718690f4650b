"""Loads an adapter into a network and checks that it has an effect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_ms.generation.graphs import Logits, run_cell
from glm_ms.model.glm import GLMNetwork
from glm_ms.peft.adapter import Adapter, AdapterError, StoredAdapter, attach, read_adapter

_PROBE_LENGTH = 16


@dataclass(frozen=True)
class AdapterReport:
    """The result of loading an adapter.

    Attributes:
        path: file of the adapter.
        kind: "lora" or "ptuning2".
        tensors: number of tensors in the file; each has a parameter.
        parameters: number of values in them.
        norm: root of the sum of their squares.
        logit_change: largest absolute change of a logit on a probe prompt.
    """

    path: Path
    kind: str
    tensors: int
    parameters: int
    norm: float
    logit_change: float

    def __str__(self) -> str:
        return (
            f"adapter: {self.path} ({self.kind}): {self.tensors} of {self.tensors} tensors matched, "
            f"{self.parameters:,} parameters, norm {self.norm:.4g}, largest logit change on a probe prompt "
            f"{self.logit_change:.4g}"
        )


def load_adapter(network: GLMNetwork, source: str | Path | StoredAdapter) -> tuple[Adapter, AdapterReport]:
    """Attaches a stored adapter to a network; see `GLMForCausalLM.load_adapter`."""
    stored = source if isinstance(source, StoredAdapter) else read_adapter(source)
    before = _probe(network)
    adapter = attach(network, stored.config, stored=stored)
    try:
        adapter.assign(stored.tensors, stored.path)
        change = float(np.abs(_probe(network) - before).max())
        if not np.isfinite(change):
            raise AdapterError(f"{stored.path}: with this adapter the network gives no numbers (NaN or infinity)")
        if change == 0:
            raise AdapterError(
                f"{stored.path}: this adapter changes nothing: the logits of a probe prompt are those of the base. "
                "Was it saved before training, or for another model?"
            )
    except AdapterError:
        adapter.detach()
        raise
    count = sum(tensor.size for tensor in stored.tensors.values())
    report = AdapterReport(stored.path, adapter.kind, len(stored.tensors), count, stored.norm, change)
    return adapter, report


def _probe(network: GLMNetwork) -> np.ndarray:
    """Logits of ids spread over the vocabulary, float32 [1, S, V]."""
    length = min(_PROBE_LENGTH, network.config.seq_length)
    ids = np.linspace(0, network.config.padded_vocab_size - 1, length).astype(np.int32)[None]
    places = np.arange(length)
    return run_cell(Logits(network), ids, np.ones_like(ids), places[None], places).asnumpy()
