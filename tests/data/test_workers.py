"""Batches in order, with few of them in memory, whatever happens."""

from __future__ import annotations

import os

import pytest

from glm_ms.data import workers
from glm_ms.data.workers import map_batches, processes_for
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import RawValue


class Lines:
    """Work that a worker process can be given."""

    def __call__(self, batch):
        lines = [raw.line for raw in batch]
        if 7 in lines:
            raise DataError(f"line {lines[0]}")
        if 70 in lines:
            os._exit(3)
        return lines, os.getpid()


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
    results = list(map_batches(Lines(), values(150), num_processes))
    assert [line for lines, _ in results for line in lines] == list(range(100, 150))
    assert {len(lines) for lines, _ in results[:-1]} == {3}
    elsewhere = {process for _, process in results} - {os.getpid()}
    assert len(elsewhere) >= (num_processes > 1)
    assert list(map_batches(Lines(), [], num_processes)) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_fault_of_the_file_comes_after_what_stands_before_it(small_batches, num_processes):
    seen = []

    def collect():
        for lines, _ in map_batches(Lines(), values(150, fault=110), num_processes):
            seen.extend(lines)

    with pytest.raises(DataError, match="fault at 110"):
        collect()
    assert seen == list(range(100, 110))


def test_a_fault_in_a_process(small_batches):
    with pytest.raises(DataError, match="line 7"):
        list(map_batches(Lines(), [RawValue(7, 0, b"x")], 2))


def test_a_lost_process_is_no_hang(small_batches):
    with pytest.raises(DataError, match="has ended early: it was killed"):
        list(map_batches(Lines(), [RawValue(70, 0, b"x")], 2))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_few_values_are_read_ahead(small_batches, num_processes):
    read = []

    def watched():
        for value in values(10000):
            read.append(value.line)
            yield value

    results = map_batches(Lines(), watched(), num_processes)
    next(results)
    assert len(read) <= 3 * (2 * num_processes + 2)
    results.close()


def test_small_files_are_not_worth_a_process():
    assert processes_for(1000, 8) == 1
    assert processes_for(1 << 30, 8) == 8
