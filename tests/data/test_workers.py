"""Results in order, with few values in memory, whatever happens."""

from __future__ import annotations

import os
import signal
import time

import pytest

from glm_ms.data import workers
from glm_ms.data.workers import map_values, processes_for
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import RawValue


def line_of(raw):
    """Work that a worker process can be given."""
    if raw.line == 7:
        raise DataError("line 7")
    if raw.line == 70:
        time.sleep(1)
        os._exit(3)
    if raw.line == 71:
        time.sleep(60)
    return raw.line, os.getpid()


def values(last, fault=None):
    for line in range(100, last):
        if line == fault:
            raise DataError(f"fault at {line}")
        yield RawValue(line, 0, b"x")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(workers, "_BATCH_BYTES", 3)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_order(small_batches, num_processes):
    results = list(map_values(line_of, values(150), num_processes))
    assert [line for line, _ in results] == list(range(100, 150))
    elsewhere = {process for _, process in results} - {os.getpid()}
    assert len(elsewhere) >= (num_processes > 1)
    assert list(map_values(line_of, [], num_processes)) == []


def test_batches_have_one_size(small_batches):
    sizes = [len(batch) for batch in workers._batches(values(150), [])]
    assert sizes == [*[3] * 16, 2]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_fault_of_the_file_comes_after_what_stands_before_it(small_batches, num_processes):
    seen = []

    def collect():
        for line, _ in map_values(line_of, values(150, fault=110), num_processes):
            seen.append(line)

    with pytest.raises(DataError, match="fault at 110"):
        collect()
    assert seen == list(range(100, 110))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_fault_of_the_work_comes_after_what_stands_before_it(small_batches, num_processes):
    seen = []

    def collect():
        for line, _ in map_values(line_of, [*values(104), RawValue(7, 0, b"x"), *values(109)], num_processes):
            seen.append(line)

    with pytest.raises(DataError, match="line 7"):
        collect()
    assert seen == list(range(100, 104))


@pytest.mark.parametrize("blocked", [(), (signal.SIGINT, signal.SIGTERM)])
def test_a_lost_process_is_no_hang(small_batches, blocked):
    """Also in a program that receives signals in one thread: processes inherit which are blocked."""
    mask, start = signal.pthread_sigmask(signal.SIG_BLOCK, blocked), time.monotonic()
    try:
        with pytest.raises(DataError, match="has ended early: it was killed"):
            list(map_values(line_of, [*values(120), *(RawValue(line, 0, b"xxx") for line in (71, 70))], 2))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert time.monotonic() - start < 30  # the other process was busy for longer


@pytest.mark.parametrize("num_processes", [1, 2])
def test_few_values_are_read_ahead(small_batches, num_processes):
    read = []

    def watched():
        for value in values(10000):
            read.append(value.line)
            yield value

    results = map_values(line_of, watched(), num_processes)
    next(results)
    assert len(read) <= 3 * (2 * num_processes + 2)
    results.close()


def test_small_files_are_not_worth_a_process():
    assert processes_for(1000, 8) == 1
    assert processes_for(1 << 30, 8) == 8
