"""Which graphs a network runs over pages: those of the C++ kernels, or the portable ones."""

from __future__ import annotations

from functools import cached_property

from glm_ms.generation.kernel_graphs import KernelGraphs, why_portable
from glm_ms.generation.page_graphs import CHUNK, PageGraphs
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.model.glm import GLMNetwork
from glm_ms.model.kernels import KernelGLM
from glm_ms.peft.rows import AdapterBounds


class GraphMaker:
    """Makes graphs for a network, all of the same kind, which is chosen at the first one.

    Graphs of the kernels share what they compile.
    """

    def __init__(self, network: GLMNetwork) -> None:
        self.network = network
        self._cell: KernelGLM | None = None

    @cached_property
    def why_portable(self) -> str | None:
        """Why the network runs its portable cells; None: it runs the C++ kernels."""
        return why_portable(self.network)

    def __call__(
        self, slots: int, capacity: int, chunk: int = CHUNK, bounds: AdapterBounds | None = None,
        storage: str | None = None
    ) -> PageGraphs:  # fmt: skip
        """Graphs of this size; arguments as of `PageGraphs`.

        Args:
            storage: type of keys and values, for the kernels only, see `KernelGraphs`; None: float32.
        """
        if self.why_portable is not None:
            return PagedGraphs(self.network, slots, capacity, chunk, bounds)
        kept = storage or "float32"
        graphs = KernelGraphs(self.network, slots, capacity, chunk, bounds, cell=self._cell, storage=kept)
        self._cell = graphs.cell
        return graphs
