"""Prepared rows on disk, read through a memory map.

A cache is a folder whose name is a hash of everything that decides about its rows. It has `input_ids.npy` and
`labels.npy`, the rows one after the other without padding (int32), `offsets.npy` (int64, row i is offsets[i] to
offsets[i + 1]) and `cache.json`. It appears when it is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glm_ms.data.rows import IGNORED
from glm_ms.data.workers import check_may_start, map_batches, processes_for
from glm_ms.storage.atomic import staged
from glm_ms.storage.errors import DataError
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.json_lines import JsonFile, RawValue
from glm_ms.storage.lock import locked
from glm_ms.storage.readers import read_json

if TYPE_CHECKING:
    from glm_ms.data.encoder import Encoder

# Raise it if the same records make other rows.
FORMAT_VERSION = 1
_ABOUT = "cache.json"
_ARRAYS: dict[str, np.dtype] = {
    "input_ids": np.dtype("<i4"), "labels": np.dtype("<i4"), "offsets": np.dtype("<i8"),
}  # fmt: skip
_NPY_HEADER = 128
_CHUNK = 4 << 20
# Sizes of a record that makes no row.
_EMPTY, _WITHOUT_LABELS = -1, -2

Say = Callable[[str], None]


class _NoRows(Exception):  # noqa: N818 - an outcome, which `TrainDataset` reports
    """No record of a file makes a row."""


class CacheRequest(NamedTuple):
    """Where and how to keep rows.

    Attributes:
        folder: of the caches of any number of data sets; created if missing.
        num_workers: processes that prepare rows.
    """

    folder: str | Path
    num_workers: int = 1


class CachedRows:
    """Ids and labels of the rows of a cache.

    Args:
        folder: of the cache.
        verify: compare the checksums of all files, which reads them once.

    Attributes:
        skipped, without_labels: records skipped when it was prepared, see `TrainDataset`.

    Raises:
        DataError: the cache is damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        try:
            about = read_json(folder / _ABOUT, DataError)
            self.skipped: int = about["skipped"]
            self.without_labels: int = about["without_labels"]
            arrays = {
                name: _mapped(folder / f"{name}.npy", about["files"][name], dtype, verify)
                for name, dtype in _ARRAYS.items()
            }
        except OSError as error:
            raise DataError(f"{error.filename or folder}: {error.strerror or error}") from None
        except DataError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _ABOUT}: not what was written ({error})") from None
        self._input_ids, self._labels, self._offsets = (arrays[name] for name in _ARRAYS)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a row, unpadded, int32."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._input_ids[start:end], self._labels[start:end]

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedRows, (self.folder, False)  # pickling a map would copy the file


def cached_rows(
    path: Path, encoder: Encoder, num_samples: int | None, request: CacheRequest, say: Say
) -> CachedRows | None:
    """The rows of a file from its cache, which is prepared first if it does not exist; None if there are none.

    If several processes need the same cache, one prepares it and the others wait.

    Args:
        path: of the records.
        encoder: of the records.
        num_samples: rows at most; None for all.
        request: place of the cache.
        say: takes a line for the user: rows are prepared, a cache is damaged.

    Raises:
        DataError: the file or the folder of caches cannot be used.
    """
    file = JsonFile(path)
    num_processes = processes_for(file.num_bytes, request.num_workers)
    if num_processes > 1:
        check_may_start()  # before the lock: a process started here would wait for it for ever
    identity = _identity(file, encoder, num_samples)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()[:32]
    folder = Path(request.folder) / digest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        found = _found(folder)
        if isinstance(found, CachedRows):
            return found
        waiting = f"{folder.parent}: waiting for another process that prepares the same rows"
        with locked(folder.with_name(f".{digest}.lock"), on_wait=lambda: say(waiting)):
            found = _found(folder)
            if isinstance(found, CachedRows):
                return found
            if found is not None:
                say(f"{folder}: this cache of prepared rows is damaged ({found}); it is made again")
            with staged(folder, folder=True) as partial:
                _write(partial, file, encoder, num_samples, num_processes, identity, say)
    except _NoRows:
        return None
    except OSError as error:
        # Without file locks another process may have been first; its rows are the same.
        if isinstance(found := _found(folder), CachedRows):
            return found
        raise DataError(
            f"train_dataset.cache_dir: {error.filename or folder.parent}: cannot be written: "
            f"{error.strerror or error}; choose another folder, or cache_dir: null for none"
        ) from error
    return CachedRows(folder, verify=False)


def _identity(file: JsonFile, encoder: Encoder, num_samples: int | None) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "records": file_sha256(file.path),
        "vocabulary": hashlib.sha256(encoder.tokenizer.sp.serialized_model_proto()).hexdigest(),
        "tokenizer": type(encoder.tokenizer).__name__,
        "num_samples": num_samples,
        **encoder.identity(),
    }


def _found(folder: Path) -> CachedRows | str | None:
    """The rows; or what is wrong with them; or None if there are none."""
    if not folder.exists():
        return None
    try:
        return CachedRows(folder)
    except DataError as error:
        return str(error)


def _mapped(path: Path, about: dict[str, int], dtype: np.dtype, verify: bool) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: {error}") from None
    if array.dtype != dtype or array.shape != (about["items"],):
        raise DataError(f"{path}: has {array.dtype} {array.shape}, expected {dtype} ({about['items']},)")
    if verify and _checksum(path) != about["crc32"]:
        raise DataError(f"{path}: its checksum is not the one that was written")
    return array


def _checksum(path: Path) -> int:
    """CRC-32 of the items. It reads the file, because pages of a map would count as memory in use."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(_NPY_HEADER)
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


class _Prepared(NamedTuple):
    """The rows of a batch of values, unpadded, one after the other.

    Attributes:
        sizes: int64, for every value the number of its ids, or _EMPTY or _WITHOUT_LABELS.
        input_ids, labels: int32 [sum of the sizes above 0].
        error: of the value after the last one of `sizes`.
    """

    sizes: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    error: DataError | None = None


def _prepare(encoder: Encoder, path: Path, batch: list[RawValue]) -> _Prepared:
    """Stops at the first value that is not a record, with the error."""
    sizes, input_ids, labels = array("q"), array("i"), array("i")
    error = None
    for raw in batch:
        try:
            record = encoder.read_raw(raw, path)
        except DataError as caught:
            error = caught
            break
        if record is None:
            sizes.append(_EMPTY)
            continue
        own_ids, own_labels = encoder.train_ids(record)
        if all(label == IGNORED for label in own_labels):
            sizes.append(_WITHOUT_LABELS)
            continue
        sizes.append(len(own_ids))
        input_ids.extend(own_ids)
        labels.extend(own_labels)
    return _Prepared(np.array(sizes, np.int64), np.array(input_ids, np.int32), np.array(labels, np.int32), error)


def _first_rows(parts: Iterable[_Prepared], num_rows: int | None) -> Iterator[_Prepared]:
    """Parts up to the row with a number, all of them if it is None; raises the first error before it."""
    for part in parts:
        if num_rows is not None:
            ends = np.flatnonzero(part.sizes > 0)
            if len(ends) >= num_rows:
                sizes = part.sizes[: int(ends[num_rows - 1]) + 1]
                ids = int(sizes[sizes > 0].sum())
                yield _Prepared(sizes, part.input_ids[:ids], part.labels[:ids])
                return
            num_rows -= len(ends)
        yield part
        if part.error is not None:
            raise part.error


def _write(
    partial: Path,
    file: JsonFile,
    encoder: Encoder,
    num_samples: int | None,
    num_processes: int,
    identity: dict[str, Any],
    say: Say,
) -> None:
    """Streams from the file of records into the files of a cache."""
    if num_processes > 1:
        say(f"{file.path}: preparing its rows in {num_processes} processes")
    counts = {_EMPTY: 0, _WITHOUT_LABELS: 0}
    writers = {name: _NpyWriter(partial / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    try:
        writers["offsets"].write(np.zeros(1, np.int64))
        end = 0
        work = functools.partial(_prepare, encoder, file.path)
        for part in _first_rows(map_batches(work, file.raw_values(), num_processes), num_samples):
            for kind in counts:
                counts[kind] += int((part.sizes == kind).sum())
            writers["offsets"].write(end + np.cumsum(part.sizes[part.sizes > 0]))
            writers["input_ids"].write(part.input_ids)
            writers["labels"].write(part.labels)
            end += len(part.input_ids)
    finally:
        files = {name: writer.close() for name, writer in writers.items()}
    if not end:
        raise _NoRows
    about = {
        "skipped": counts[_EMPTY],
        "without_labels": counts[_WITHOUT_LABELS],
        "files": files,
        "path": str(file.path),
        "made_of": identity,
    }
    (partial / _ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class _NpyWriter:
    """A one-dimensional .npy file, written piece by piece."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(_NPY_HEADER))
        self._dtype, self._items, self._checksum = dtype, 0, 0

    def write(self, values: np.ndarray) -> None:
        """Appends values."""
        content = np.ascontiguousarray(values, self._dtype).tobytes()
        self._file.write(content)
        self._items += len(values)
        self._checksum = zlib.crc32(content, self._checksum)

    def close(self) -> dict[str, int]:
        """Writes the header; returns `items` and their `crc32`."""
        shape = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({self._items},), }}"
        size = _NPY_HEADER - 10  # of format 1.0: magic string, version, size of the header as two bytes
        header = b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + shape.encode().ljust(size - 1) + b"\n"
        with self._file as file:
            file.seek(0)
            file.write(header)
        return {"items": self._items, "crc32": self._checksum}
