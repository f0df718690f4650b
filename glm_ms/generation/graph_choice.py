"""Which graphs a network runs over pages: those of the C++ kernels, or the portable ones."""

from __future__ import annotations

from functools import cached_property

from glm_ms.generation.graphs import FixedGraph
from glm_ms.generation.kernel_graphs import KernelGraphs, why_portable
from glm_ms.generation.page_graphs import CHUNK, PageGraphs
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops.cpu.storage import STORAGE
from glm_ms.peft.rows import AdapterBounds
from glm_ms.spelling import given
from glm_ms.storage.errors import FileError


class StorageError(FileError):
    """Keys and values cannot be stored as asked; the message says why and what to do."""


class GraphMaker:
    """Makes graphs for a network, all of the same kind, which is chosen at the first one.

    Graphs of the kernels share what they compile.

    Args:
        storage: type of keys and values, of the kernels only, see `KernelGraphs`; None: float32.

    Raises:
        StorageError: an unknown type, or the network runs its portable cells.
    """

    def __init__(self, network: GLMNetwork, storage: str | None = None) -> None:
        self.network = network
        self._graph: FixedGraph | None = None
        self._storage = storage or "float32"
        if self._storage not in STORAGE:
            raise StorageError(f"{given('kv_cache', storage)}: must be one of {', '.join(STORAGE)}")
        if storage is not None and self.why_portable is not None:
            raise StorageError(
                f"{given('kv_cache', storage)}: needs the C++ kernels of the CPU, which do not run: "
                f"{self.why_portable}; or leave it out"
            )

    @cached_property
    def why_portable(self) -> str | None:
        """Why the network runs its portable cells; None: it runs the C++ kernels."""
        return why_portable(self.network)

    def __call__(
        self, slots: int, capacity: int, chunk: int = CHUNK, bounds: AdapterBounds | None = None
    ) -> PageGraphs:  # fmt: skip
        """Graphs of this size; arguments as of `PageGraphs`."""
        if self.why_portable is not None:
            return PagedGraphs(self.network, slots, capacity, chunk, bounds)
        graphs = KernelGraphs(self.network, slots, capacity, chunk, bounds, graph=self._graph, storage=self._storage)
        self._graph = graphs.graph
        return graphs
