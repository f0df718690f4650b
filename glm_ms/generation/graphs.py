"""The thread that compiles and runs cells, and the cell for logits of whole sequences."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from glm_ms.model.glm import GLMNetwork

T = TypeVar("T")

# Inputs of graphs that are compiled once for every batch size and length.
MATRIX = Tensor(shape=[None, None], dtype=ms.int32)
VECTOR = Tensor(shape=[None], dtype=ms.int32)

# The compiler recurses through a graph. With `ulimit -s unlimited` glibc gives threads 2 MB only.
_STACK_BYTES = 64 << 20


class GraphThread:
    """Runs functions one after another in its own thread; any thread may call `run`.

    MindSpore must not compile or run cells in two threads at once.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "glm_ms graphs")
        self._thread: int | None = None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Returns function(*args), or raises what it raises. Runs at once if the caller is this thread."""
        if self._thread is None:
            self._start()
        if threading.get_ident() == self._thread:
            return function(*args)
        return self._executor.submit(function, *args).result()

    def _start(self) -> None:
        previous = threading.stack_size(_STACK_BYTES)
        try:
            self._thread = self._executor.submit(threading.get_ident).result()
        finally:
            threading.stack_size(previous)


# One for all networks: the compiler of MindSpore is one per process.
GRAPHS = GraphThread()


def on_graph_thread(method: Callable[..., T]) -> Callable[..., T]:
    """A method that runs in the graph thread, whatever thread calls it."""

    @functools.wraps(method)
    def run(*args: Any) -> T:
        return GRAPHS.run(method, *args)

    return run


def run_cell(cell: nn.Cell, *arrays: np.ndarray) -> Any:
    """Runs a cell as a compiled graph on int32 copies of `arrays`, in PyNative programs too."""
    tensors = [Tensor(np.ascontiguousarray(array, np.int32)) for array in arrays]
    return GRAPHS.run(cell.compile_and_run, *tensors)


class Logits(nn.Cell):
    """Wrapper cell of a network. A new one is compiled anew, as a network with a new adapter needs.

    Args:
        network: weights; parameter names stay as they are.
    """

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor) -> Tensor:
        """As `GLMNetwork.construct`, without dropout."""
        return self.network(input_ids, attention_mask, position_ids, slots)
