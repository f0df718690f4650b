"""The thread that compiles and runs cells, and the cell for logits of whole sequences."""

from __future__ import annotations

import atexit
import functools
import os
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Callable, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from glm_ms.model.glm import GLMNetwork

try:  # what `Cell.compile_and_run` calls in the end; not of MindSpore's interface
    from mindspore.graph.api import _cell_graph_executor as EXECUTOR
except ImportError:
    EXECUTOR = None

T = TypeVar("T")

# Inputs of graphs that are compiled once for every batch size and length.
MATRIX = Tensor(shape=[None, None], dtype=ms.int32)
VECTOR = Tensor(shape=[None], dtype=ms.int32)

# The compiler recurses through a graph. With `ulimit -s unlimited` glibc gives threads 2 MB only.
_STACK_BYTES = 64 << 20


class GraphThread:
    """Runs functions one after another in its own thread; any thread may call `run`.

    MindSpore must not compile or run cells in two threads at once. The thread is a daemon and not of an executor:
    executors refuse work as soon as the main thread has ended, while other threads of a program may still generate.
    """

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # threads do not survive a fork
        atexit.register(self._finish)

    def reset(self) -> None:
        """The next call starts a thread."""
        self._jobs: SimpleQueue[tuple[Future, Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def _finish(self) -> None:
        """Waits for the running cell: MindSpore must not be torn down under it."""
        if self._thread is not None:
            self.run(lambda: None)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Returns function(*args), or raises what it raises. Runs at once if the caller is this thread."""
        if self._thread is None:
            self._start()
        if threading.current_thread() is self._thread:
            return function(*args)
        future: Future[T] = Future()
        self._jobs.put((future, function, args))
        return future.result()

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            previous = threading.stack_size(_STACK_BYTES)
            try:
                thread = threading.Thread(target=self._work, name="glm_ms graphs", daemon=True)
                thread.start()
                self._thread = thread
            finally:
                threading.stack_size(previous)

    def _work(self) -> None:
        while True:
            future, function, args = self._jobs.get()
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
            del future, function, args  # an idle thread keeps no network alive


# One for all networks: the compiler of MindSpore is one per process.
GRAPHS = GraphThread()


def on_graph_thread(method: Callable[..., T]) -> Callable[..., T]:
    """A method that runs in the graph thread, whatever thread calls it."""

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> T:
        return GRAPHS.run(functools.partial(method, *args, **options))

    return run


def run_cell(cell: nn.Cell, *arrays: np.ndarray | None) -> Any:
    """Runs a cell as a compiled graph on int32 copies of `arrays`, in PyNative programs too. None stays None."""
    tensors = [None if array is None else Tensor(np.ascontiguousarray(array, np.int32)) for array in arrays]
    return GRAPHS.run(cell.compile_and_run, *tensors)


class FixedGraph:
    """A cell that compiles once, for inputs of the shapes and types of the first call.

    `compile_and_run` looks for the graph of its inputs every time, and marks every cell inside meanwhile: for 28 layers
    that takes longer than to run their operators. A MindSpore without `EXECUTOR` does so.
    """

    def __init__(self, cell: nn.Cell) -> None:
        self.cell = cell
        self._compiled = False

    def __call__(self, *inputs: Tensor) -> Any:
        """What the cell returns; call it in the thread of `GRAPHS`."""
        if EXECUTOR is None:
            return self.cell.compile_and_run(*inputs)
        if not self._compiled:
            self.cell.compile(*inputs)
            self._compiled = True
        return EXECUTOR(self.cell, *inputs, phase=self.cell.phase)


class Logits(nn.Cell):
    """Wrapper cell of a network, which keeps its parameter names. A network with a new adapter needs a new one."""

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor) -> Tensor:
        """As `GLMNetwork.construct`, without dropout."""
        return self.network(input_ids, attention_mask, position_ids, slots)
