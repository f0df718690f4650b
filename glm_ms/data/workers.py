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
from contextlib import closing
from multiprocessing.connection import wait
from typing import Any, TypeVar

from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import RawValue

Result = TypeVar("Result")
Work = Callable[[RawValue], Any]
_Done = tuple[list[Any], "DataError | None"]  # results of a batch, and the error that ended it

_BATCH_BYTES = 1 << 19
# Preparing a smaller file takes less time than starting processes.
_WORTH_PROCESSES = 4 << 20
_NO_GUARD = (
    'the running script has no `if __name__ == "__main__":`, which Python needs to start processes; add it, or set '
    "train_dataset.num_parallel_workers: 1 to do without processes"
)

_work: Work | None = None  # of a worker process


def processes_for(num_bytes: int, num_workers: int) -> int:
    """Number of processes that pay for a file of this size; 1 is the present process.

    Raises:
        DataError: this process imports the script of its parent, so the script has no guard.
    """
    number = num_workers if num_bytes >= _WORTH_PROCESSES else 1
    # multiprocessing itself checks this attribute before it starts a process.
    if number > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(_NO_GUARD)
    return number


def map_values(
    work: Callable[[RawValue], Result], values: Iterable[RawValue], num_processes: int
) -> Generator[Result, None, None]:
    """Yields `work(value)` for every value of a file, in order, with few of them in memory.

    Processes are spawned and not forked, because a fork breaks the threads of MindSpore. Python imports the running
    script in each of them, so the script needs `if __name__ == "__main__":`.

    Args:
        work: can be pickled if `num_processes` is above 1; each process receives it once.
        values: a DataError from them comes after the results of the values before it.
        num_processes: 1 works in the present process.

    Raises:
        DataError: a process ended early; and the first error of `values` or `work`.
    """
    failures: list[DataError] = []
    batches = _batches(values, failures)
    with closing(_here(work, batches) if num_processes == 1 else _in_pool(work, batches, num_processes)) as done:
        for results, error in done:
            yield from results
            if error is not None:
                raise error
    if failures:
        raise failures[0]


def _batches(values: Iterable[RawValue], failures: list[DataError]) -> Iterator[list[RawValue]]:
    """Batches of about one size. An error ends the values and is added to `failures`."""
    batch: list[RawValue] = []
    size = 0
    try:
        for value in values:
            batch.append(value)
            size += len(value.text)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    except DataError as error:
        failures.append(error)
    if batch:
        yield batch


def _apply(work: Work, batch: list[RawValue]) -> _Done:
    results: list[Any] = []
    try:
        for value in batch:
            results.append(work(value))
    except DataError as error:
        return results, error
    return results, None


def _here(work: Work, batches: Iterable[list[RawValue]]) -> Generator[_Done, None, None]:
    for batch in batches:
        yield _apply(work, batch)


def _in_pool(work: Work, batches: Iterable[list[RawValue]], num_processes: int) -> Generator[_Done, None, None]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin, initargs=(work,))
    waiting: deque[Future[_Done]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_run, batch))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"a process that prepared records has ended early: it was killed (out of memory?), or {_NO_GUARD}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Work) -> None:
    """Prepares a worker process."""
    global _work
    _work = work
    # A run blocks signals in all threads but one. Processes inherit that, and a pool ends its workers by SIGTERM.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C, too, and ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this process when its parent is killed; otherwise it would wait for work for ever."""
    wait([sentinel])
    os._exit(1)


def _run(batch: list[RawValue]) -> _Done:
    assert _work is not None
    return _apply(_work, batch)
