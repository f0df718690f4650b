"""Prepared rows on disk: made once, read through a memory map.

A cache is a folder named by a hash of all that decides its rows. It holds `input_ids.npy` and `labels.npy`, the rows
one after the other without padding (int32), `offsets.npy` (int64, row i is offsets[i] to offsets[i + 1]) and
`cache.json`. It appears when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from glm_ms.data.preparation import EMPTY, WITHOUT_LABELS, PrepareRows, first_rows
from glm_ms.data.workers import check_may_start, map_batches, processes_for
from glm_ms.storage.atomic import staged
from glm_ms.storage.errors import DataError
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.json_lines import JsonFile
from glm_ms.storage.lock import locked
from glm_ms.storage.readers import read_json

if TYPE_CHECKING:
    from glm_ms.data.encoder import Encoder

# To be raised whenever the same records make other rows.
FORMAT_VERSION = 1
_ABOUT = "cache.json"
_ARRAYS = {"input_ids": np.dtype("<i4"), "labels": np.dtype("<i4"), "offsets": np.dtype("<i8")}
_NPY_HEADER = 128
_CHUNK = 4 << 20

Say = Callable[[str], None]


class NoRows(Exception):  # noqa: N818 - an outcome, for `TrainDataset` to report
    """A file has no record that makes a row; there is nothing to keep."""


class CacheRequest(NamedTuple):
    """That rows are to be kept.

    Attributes:
        folder: holds the caches of any number of data sets; made if it is not there.
        num_workers: processes that make a cache.
    """

    folder: str | Path
    num_workers: int = 1


class CachedRows:
    """Ids and labels of the rows of a cache.

    Args:
        folder: of the cache.
        verify: compare the checksums of all files, which reads them once.

    Attributes:
        skipped, without_labels: records that were passed over when it was made, see `TrainDataset`.

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
        return CachedRows, (self.folder, False)  # a pickled map would be a copy of the file


def cached_rows(
    path: Path, encoder: Encoder, num_samples: int | None, request: CacheRequest, say: Say
) -> CachedRows:
    """The rows of a file from its cache, which is made first if it is not there.

    Of several processes that want the same cache at the same time one makes it and the others wait.

    Args:
        path: of the records.
        encoder: what becomes of them.
        num_samples: rows at most; None for all.
        request: where the cache lies.
        say: takes a line for the user: that rows are prepared, that a cache was damaged.

    Raises:
        DataError: the file or the folder of caches cannot be used.
        NoRows: no record makes a row.
    """
    file = JsonFile(path)
    num_processes = processes_for(file.num_bytes, request.num_workers)
    if num_processes > 1:
        check_may_start()  # before the lock, which a process of ours could only wait for
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
    """The rows; or what is wrong with them; or None where there are none."""
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
        raise DataError(f"{path}: holds {array.dtype} {array.shape}, expected {dtype} ({about['items']},)")
    if verify and _checksum(path) != about["crc32"]:
        raise DataError(f"{path}: its checksum is not the one that was written")
    return array


def _checksum(path: Path) -> int:
    """CRC-32 of the items. They are read and not mapped, for pages of a map would count as memory in use."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(_NPY_HEADER)
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _write(
    partial: Path,
    file: JsonFile,
    encoder: Encoder,
    num_samples: int | None,
    num_processes: int,
    identity: dict[str, Any],
    say: Say,
) -> None:
    """Streams over the file of records into the files of a cache."""
    if num_processes > 1:
        say(f"{file.path}: preparing its rows in {num_processes} processes")
    counts = {EMPTY: 0, WITHOUT_LABELS: 0}
    writers = {name: _NpyWriter(partial / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    try:
        writers["offsets"].write(np.zeros(1, np.int64))
        end = 0
        parts = map_batches(PrepareRows(encoder, file.path), file.raw_values(), num_processes)
        for part in first_rows(parts, num_samples):
            for kind in counts:
                counts[kind] += int((part.sizes == kind).sum())
            offsets = end + np.cumsum(part.sizes[part.sizes > 0])
            end += len(part.input_ids)
            writers["offsets"].write(offsets)
            writers["input_ids"].write(part.input_ids)
            writers["labels"].write(part.labels)
    finally:
        files = {name: writer.close() for name, writer in writers.items()}
    if not end:
        raise NoRows
    about = {
        "skipped": counts[EMPTY],
        "without_labels": counts[WITHOUT_LABELS],
        "files": files,
        "path": str(file.path),
        "made_of": identity,
    }
    (partial / _ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class _NpyWriter:
    """A one-dimensional .npy file, written piece by piece."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(_NPY_HEADER))
        self._dtype, self._items, self._checksum = dtype, 0, 0

    def write(self, values: np.ndarray) -> None:
        """Appends values."""
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values)
        self._items += len(values)
        self._checksum = zlib.crc32(values, self._checksum)

    def close(self) -> dict[str, int]:
        """Writes the header, which has the number of items.

        Returns:
            `items` and `crc32` of them.
        """
        shape = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({self._items},), }}"
        size = _NPY_HEADER - 10  # of format 1.0: magic string, version, size of the header as two bytes
        header = b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + shape.encode().ljust(size - 1) + b"\n"
        with self._file as file:
            file.seek(0)
            file.write(header)
        return {"items": self._items, "crc32": self._checksum}
