"""Decoders for calls of `generate`, which share compiled graphs."""

from __future__ import annotations

from glm_ms.generation.decoder import cache_capacity, slot_count
from glm_ms.generation.graph_choice import GraphMaker
from glm_ms.generation.page_graphs import PageGraphs
from glm_ms.generation.paged import PagedDecoder
from glm_ms.model.glm import GLMNetwork


class DecoderPool:
    """Makes decoders. Those of a size share compiled graphs, so that only the first one of a size compiles; with the
    C++ kernels only the first one of all.

    Args:
        storage: type of keys and values, see `GraphMaker`, which raises StorageError.

    Attributes:
        make_graphs: makes the graphs, and says of which kind they are.
    """

    def __init__(self, network: GLMNetwork, storage: str | None = None) -> None:
        self.make_graphs = GraphMaker(network, storage)
        self._graphs: dict[tuple[int, int], PageGraphs] = {}

    def decoder(self, rows: int, length: int) -> PagedDecoder:
        """A decoder with slots for `rows` sequences of `length` tokens, of the sizes that are compiled.

        Idle sizes give their memory back: it may be large, and graphs are kept for as long as the network.
        """
        size = slot_count(rows), cache_capacity(length)
        graphs = self._graphs.get(size) or self._graphs.setdefault(size, self.make_graphs(*size))
        for other in [*self._graphs.values()]:
            if other is not graphs:
                other.release()
        return PagedDecoder(graphs)
