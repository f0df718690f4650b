"""Processes that work on the values of a file; results come in the order of the file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import RawValue

Result = TypeVar("Result")

_BATCH_BYTES = 1 << 19
# Preparing a smaller file takes less time than starting processes.
_WORTH_PROCESSES = 4 << 20

_NO_GUARD = (
    'the running script has no `if __name__ == "__main__":`, which Python needs to start processes; add it, or set '
    "train_dataset.num_parallel_workers: 1 to do without processes"
)

_work: Callable[[list[RawValue]], Any] | None = None  # of a worker process


def processes_for(num_bytes: int, num_workers: int) -> int:
    """Number of processes that pay for a file of this size; 1 is the present process."""
    return num_workers if num_bytes >= _WORTH_PROCESSES else 1


def check_may_start() -> None:
    """Raises DataError in a process that imports the script of its parent: the script has no guard."""
    # multiprocessing itself checks this attribute before it starts a process.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(_NO_GUARD)


def map_batches(
    work: Callable[[list[RawValue]], Result], values: Iterable[RawValue], num_processes: int
) -> Generator[Result, None, None]:
    """Yields `work(batch)` for every batch of values, in order, with few batches in memory.

    Processes are spawned and not forked, because a fork breaks the threads of MindSpore. Python imports the running
    script in each of them, so the script needs `if __name__ == "__main__":`.

    Args:
        work: can be pickled if `num_processes` is above 1; each process receives it once.
        values: of a file.
        num_processes: 1 works in the present process.

    Raises:
        DataError: a process ended early; and the first error of `values` or `work`.
    """
    if num_processes == 1:
        for batch, error in _batches(values):
            if batch:
                yield work(batch)
            if error is not None:
                raise error
        return
    pool = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(work,)
    )
    try:
        yield from _in_order(pool, values, 2 * num_processes)
    except BrokenProcessPool:
        raise DataError(
            f"a process that prepared records has ended early: it was killed (out of memory?), or {_NO_GUARD}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, values: Iterable[RawValue], most: int) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    for batch, error in _batches(values):
        if batch:
            waiting.append(pool.submit(_run, batch))
        while waiting and (error is not None or len(waiting) > most):
            yield waiting.popleft().result()
        if error is not None:
            raise error
    while waiting:
        yield waiting.popleft().result()


def _batches(values: Iterable[RawValue]) -> Iterator[tuple[list[RawValue], DataError | None]]:
    """Batches of about one size; the last one has the error that ended the values, if any."""
    batch: list[RawValue] = []
    size = 0
    try:
        for value in values:
            batch.append(value)
            size += len(value.text)
            if size >= _BATCH_BYTES:
                yield batch, None
                batch, size = [], 0
    except DataError as error:
        yield batch, error
        return
    yield batch, None


def _begin(work: Callable[[list[RawValue]], Any]) -> None:
    """Prepares a worker process."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C, too, and ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this process when its parent is killed; otherwise it would wait for work for ever."""
    wait([sentinel])
    os._exit(1)


def _run(batch: list[RawValue]) -> Any:
    assert _work is not None
    return _work(batch)
