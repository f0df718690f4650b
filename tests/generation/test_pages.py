"""Bookkeeping of pages: users, contents that are found again, what is forgotten first."""

from __future__ import annotations

import numpy as np
import pytest

from glm_ms.generation.pages import PAGE, RESERVED, NoRoom, PagePool, page_keys


def keys_of(ids: list[int], root: bytes = b"", shift: int = 0) -> list[bytes]:
    return list(page_keys(root, np.array(ids, np.int32), np.arange(shift, shift + len(ids), dtype=np.int32)))


def test_keys_are_those_of_everything_before() -> None:
    ids = list(range(2 * PAGE + 5))
    keys = keys_of(ids)
    assert len(keys) == 2
    assert keys == keys_of(ids[: 2 * PAGE]) == keys_of([*ids, 7, 8])
    assert keys[0] == keys_of([*ids[:PAGE], *range(100, 120)])[0]
    assert keys_of([1, *ids[1:]])[1] != keys[1], "the second page has the same tokens after other ones"
    assert not set(keys) & {*keys_of(ids, b"adapter"), *keys_of(ids, shift=3)}
    assert keys_of(ids[: PAGE - 1]) == []


def test_pages_are_shared_and_found() -> None:
    pool = PagePool(3)
    page = pool.take()
    assert page == RESERVED
    pool.register(page, b"a")
    assert pool.find([b"b"]) == pool.find([b"a", b"b"]) == []
    assert not pool.is_shared(page), "all or none"
    assert pool.find([b"a"]) == [page]
    assert pool.is_shared(page)
    assert (pool.used, pool.total) == (1, 3)
    pool.release(page)
    assert not pool.is_shared(page)
    pool.release(page)
    assert pool.used == 0
    assert pool.find([b"a"]) == [page], "its content stays until the memory is needed"
    assert pool.used == 1


def test_memory_that_is_needed_is_taken_from_the_page_released_first() -> None:
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for page, key in zip(pages, (b"a", b"b", b"c")):
        pool.register(page, key)
    with pytest.raises(NoRoom, match="all 3 pages of the cache are in use"):
        pool.take()
    for page in (pages[1], pages[0], pages[2]):
        pool.release(page)
    assert pool.find([b"b"]) == [pages[1]]  # and so it is the last one to be released
    pool.release(pages[1])
    assert pool.take() == pages[0]
    assert pool.find([b"a"]) == []
    assert pool.find([b"c"]) == [pages[2]]
    assert pool.take() == pages[1]
    assert pool.find([b"b"]) == []


def test_the_first_page_with_a_content_has_its_key() -> None:
    pool = PagePool(2)
    first, second = pool.take(), pool.take()
    pool.register(first, b"a")
    pool.register(second, b"a")
    assert pool.is_registered(first)
    assert not pool.is_registered(second)
    pool.release(second)
    assert pool.take() == second, "nothing finds it, so it is free at once"
    assert pool.find([b"a"]) == [first]


def test_forgotten_pages() -> None:
    pool = PagePool(1)
    page = pool.take()
    pool.register(page, b"a")
    pool.forget(page)
    assert pool.find([b"a"]) == []
    assert pool.used == 1
    pool.register(page, b"b")
    pool.release(page)
    pool.forget(page)
    assert pool.find([b"b"]) == []
    assert pool.take() == page


def test_random_use_loses_no_page() -> None:
    rng, pool, held = np.random.default_rng(0), PagePool(8), []
    for number in range(2000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.integers(len(held))))
        elif rng.random() < 0.3:
            held += pool.find([bytes([rng.integers(20)])])
        elif pool.used < pool.total:
            held.append(pool.take())
            if rng.random() < 0.7:
                pool.register(held[-1], bytes([number % 20]))
        assert pool.used == len(set(held))
    for page in held:
        pool.release(page)
    assert pool.used == 0
    assert len({pool.take() for _ in range(8)}) == 8
