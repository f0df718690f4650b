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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glm_ms.data.rows import IGNORED
from glm_ms.data.workers import map_values, processes_for
from glm_ms.storage.atomic import staged
from glm_ms.storage.errors import DataError
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.json_lines import JsonFile, RawValue
from glm_ms.storage.lock import locked
from glm_ms.storage.readers import read_object

if TYPE_CHECKING:
    from glm_ms.data.encoder import Encoder

# Raise it if the same records make other rows.
FORMAT_VERSION = 2
_ABOUT = "cache.json"
_ARRAYS: dict[str, np.dtype] = {"input_ids": np.dtype("<i4"), "labels": np.dtype("<i4"), "offsets": np.dtype("<i8")}
_CHUNK = 4 << 20
_WAITING = 1 << 16  # items that are written together; a checksum and a write for every row would be slower

Say = Callable[[str], None]
_Ids = tuple[array, array]  # ids and labels


class _NoRows(Exception):  # noqa: N818 - an outcome, which `TrainDataset` reports
    """No record of a file makes a row."""


class CacheRequest(NamedTuple):
    """Where and how to keep rows."""

    folder: str | Path  # of the caches of any number of data sets; created if missing
    num_workers: int = 1  # processes that prepare rows


class CachedRows:
    """Ids and labels of the rows of a cache; attributes as in `TrainDataset`.

    Args:
        verify: compare the checksums of all files, which reads them once.

    Raises:
        DataError: the cache is damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        about = read_object(folder / _ABOUT, DataError)
        try:
            self.skipped: int = about["skipped"]
            self.without_labels: int = about["without_labels"]
            self.left_out: set[str] = set(about["left_out"])
            self._input_ids, self._labels, self._offsets = (
                _mapped(folder / f"{name}.npy", about["files"][name], dtype, verify) for name, dtype in _ARRAYS.items()
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / _ABOUT}: not what was written ({error})") from None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a row, unpadded, int32."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._input_ids[start:end], self._labels[start:end]

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedRows, (self.folder, False)  # pickling a map would copy the file


def _mapped(path: Path, about: dict[str, int], dtype: np.dtype, verify: bool) -> np.ndarray:
    try:
        items = np.load(path, mmap_mode="r")
        if items.dtype != dtype or items.shape != (about["items"],):
            raise DataError(f"{path}: has {items.dtype} {items.shape}, expected {dtype} ({about['items']},)")
        if verify and _checksum(path, items.offset) != about["crc32"]:
            raise DataError(f"{path}: its checksum is not the one that was written")
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return items


def _checksum(path: Path, start: int) -> int:
    """CRC-32 of the items. It reads the file, because pages of a map would count as memory in use."""
    checksum = 0
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def cached_rows(
    path: Path, encoder: Encoder, num_samples: int | None, request: CacheRequest, say: Say
) -> CachedRows | None:
    """The rows of a file from its cache, which is prepared first if it does not exist; None if there are none.

    If several processes need the same cache, one prepares it and the others wait.

    Args:
        num_samples: rows at most; None for all.
        say: takes a line for the user: rows are prepared, a cache is damaged.

    Raises:
        DataError: the file or the folder of caches cannot be used.
    """
    file = JsonFile(path)
    # Before the lock: it raises an error in a process started here, which would wait for the lock for ever.
    num_processes = processes_for(file.num_bytes, request.num_workers)
    identity = _identity(file, encoder, num_samples)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()[:32]
    folder = Path(request.folder) / digest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        rows = _found(folder)
        if rows is not None:
            return rows
        waiting = f"{folder.parent}: waiting for another process that prepares the same rows"
        with locked(folder.with_name(f".{digest}.lock"), on_wait=lambda: say(waiting)):
            rows = _found(folder, say)
            if rows is not None:
                return rows
            with staged(folder, folder=True) as partial:
                if num_processes > 1:
                    say(f"{path}: preparing its rows in {num_processes} processes")
                work = functools.partial(_encoded, encoder, file.path)
                written = _write(partial, map_values(work, file.raw_values(), num_processes), num_samples)
                _describe(partial, {**written, "path": str(path), "made_of": identity})
    except _NoRows:
        return None
    except OSError as error:
        # Without file locks another process may have been first; its rows are the same.
        rows = _found(folder)
        if rows is not None:
            return rows
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of a WriteError
        raise DataError(
            f"train_dataset.cache_dir: {cause.filename or folder.parent}: cannot be written: "
            f"{cause.strerror or cause}; choose another folder, or cache_dir: null for none"
        ) from error
    return CachedRows(folder, verify=False)


def _identity(file: JsonFile, encoder: Encoder, num_samples: int | None) -> dict[str, Any]:
    """All that the rows of a file depend on."""
    return {
        "format_version": FORMAT_VERSION,
        "records": file_sha256(file.path),
        "vocabulary": hashlib.sha256(encoder.tokenizer.sp.serialized_model_proto()).hexdigest(),
        "tokenizer": type(encoder.tokenizer).__name__,
        "template": encoder.tokenizer.template,
        "num_samples": num_samples,
        **encoder.identity(),
    }


def _describe(folder: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
    (folder / _ABOUT).write_text(text, encoding="utf-8")


def _found(folder: Path, say: Say | None = None) -> CachedRows | None:
    """The rows, if there are any; tells `say` what is wrong with them."""
    try:
        return CachedRows(folder) if folder.exists() else None
    except DataError as error:
        if say is not None:
            say(f"{folder}: this cache of prepared rows is damaged ({error}); it is made again")
        return None


def _encoded(encoder: Encoder, path: Path, raw: RawValue) -> tuple[_Ids | None, set[str]]:
    """Ids and labels of a value, unpadded (None for an empty record, no ids if there is no label); what is left out."""
    left_out: set[str] = set()
    record = encoder.read_raw(raw, path, left_out)
    if record is None:
        return None, left_out
    input_ids, labels = encoder.train_ids(record)
    if all(label == IGNORED for label in labels):
        return (array("i"), array("i")), left_out
    return (array("i", input_ids), array("i", labels)), left_out


def _write(partial: Path, rows: Iterable[tuple[_Ids | None, set[str]]], num_samples: int | None) -> dict[str, Any]:
    """Writes the arrays of a cache, piece by piece; returns what `cache.json` says about them."""
    skipped = without_labels = num_rows = end = 0
    left_out: set[str] = set()
    writers = {name: _NpyWriter(partial / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    try:
        writers["offsets"].write([0])
        for row, names in rows:
            left_out |= names
            if row is None:
                skipped += 1
            elif not row[0]:
                without_labels += 1
            else:
                end += len(row[0])
                for name, values in zip(_ARRAYS, (*row, [end])):
                    writers[name].write(values)
                num_rows += 1
                if num_rows == num_samples:
                    break
    finally:
        files = {name: writer.close() for name, writer in writers.items()}
    if not num_rows:
        raise _NoRows
    return {"skipped": skipped, "without_labels": without_labels, "left_out": sorted(left_out), "files": files}


class _NpyWriter:
    """A one-dimensional .npy file, written piece by piece."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = path.open("wb")
        self._dtype, self._items, self._checksum = dtype, 0, 0
        self._waiting = array(dtype.char)
        self._write_header()

    def _write_header(self) -> None:
        """It takes the same number of bytes for any number of items."""
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._items,)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def write(self, values: Sequence[int]) -> None:
        """Appends values; they may wait in memory until `close`."""
        self._waiting.extend(values)
        if len(self._waiting) >= _WAITING:
            self._flush()

    def _flush(self) -> None:
        content = np.asarray(self._waiting, self._dtype).tobytes()
        self._file.write(content)
        self._items += len(self._waiting)
        self._checksum = zlib.crc32(content, self._checksum)
        del self._waiting[:]

    def close(self) -> dict[str, int]:
        """Completes the header; returns `items` and their `crc32`."""
        with self._file as file:
            self._flush()
            file.seek(0)
            self._write_header()
        return {"items": self._items, "crc32": self._checksum}
