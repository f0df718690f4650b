"""Pages of a KV cache: who uses them, and which contents can be used again. No MindSpore: numbers only."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

# Tokens of a page.
PAGE = 16
# Pages that no sequence owns: tokens that belong to none are written to the first, and the second stays zero.
SCRATCH, ZEROS = 0, 1
RESERVED = 2


class NoRoom(ValueError):  # noqa: N818, its name says what happened
    """All slots or pages are in use; there is room again when a sequence has ended."""


def page_keys(root: bytes, ids: np.ndarray, positions: np.ndarray) -> Iterator[bytes]:
    """The key of each full page of a sequence: a hash of its tokens, of all before them and of `root`.

    Args:
        root: what else determines keys and values, such as the adapter.
        ids, positions: int32 [S].
    """
    key = root
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        content = np.stack((ids[start : start + PAGE], positions[start : start + PAGE]))
        key = hashlib.sha256(key + np.ascontiguousarray(content, np.int32).tobytes()).digest()
        yield key


class PagePool:
    """Counts the users of pages, and remembers the contents of those without users until they are needed.

    Args:
        count: pages for sequences; their numbers are `RESERVED`, ..., `RESERVED + count - 1`.
    """

    def __init__(self, count: int) -> None:
        self.total = count
        self._users = [0] * (RESERVED + count)
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._free = list(range(RESERVED + count - 1, RESERVED - 1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # without users, with a key; the first to be taken first

    @property
    def used(self) -> int:
        """Pages with users."""
        return self.total - len(self._free) - len(self._idle)

    def take(self) -> int:
        """A page with any content, for one user; of those without users the one that was released first goes last.

        Raises NoRoom.
        """
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self.forget(page)
        else:
            raise NoRoom(f"all {self.total} pages of the cache are in use: wait for the end of a sequence")
        self._users[page] = 1
        return page

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of all keys, with one more user each; none if one of them is not there."""
        pages = [self._pages[key] for key in keys if key in self._pages]
        if len(pages) < len(keys):
            return []
        for page in pages:
            self.share(page)
        return pages

    def share(self, page: int) -> None:
        """One more user."""
        self._users[page] += 1
        self._idle.pop(page, None)

    def is_shared(self, page: int) -> bool:
        """Whether a page has several users."""
        return self._users[page] > 1

    def register(self, page: int, key: bytes) -> None:
        """The page has the content of `key` now and for as long as it has users; if another page has it, nothing."""
        if key not in self._pages:
            self._pages[key], self._keys[page] = page, key

    def is_registered(self, page: int) -> bool:
        """Whether `find` finds this page."""
        return page in self._keys

    def release(self, page: int) -> bool:
        """One user less. Returns whether it was the last one."""
        self._users[page] -= 1
        if self._users[page]:
            return False
        if page in self._keys:
            self._idle[page] = None
        else:
            self._free.append(page)
        return True

    def forget(self, page: int) -> None:
        """`find` no longer finds this page, if it did."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]
        if self._idle.pop(page, page) is None:
            self._free.append(page)
