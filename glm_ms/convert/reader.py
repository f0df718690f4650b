"""`open_checkpoint`: one interface to checkpoints of every supported kind; checks and loads their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from typing import Any, Callable

import numpy as np

from glm_ms.convert.adapter_files import LORA, PREFIX_POSITIONS, owner_of
from glm_ms.convert.dtypes import DTYPES, check_finite, check_float_type, convert_dtype, is_floating
from glm_ms.convert.mindspore_file import MindSporeFile
from glm_ms.convert.names import INV_FREQ, expected_shapes, is_training_state, joint_of, part_names, to_glm_name
from glm_ms.convert.safetensors_file import SafetensorsFile
from glm_ms.convert.tensor_file import TensorFile, described_slice, forget_pages
from glm_ms.convert.torch_file import TorchFile
from glm_ms.model.config import GLMConfig
from glm_ms.spelling import argument, tool
from glm_ms.storage.background import Background
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.integrity import check_all_listed, check_listed
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import read_object
from glm_ms.storage.run_folder import OPTIMIZER
from glm_ms.storage.suggest import did_you_mean, misspelled

_BY_ENDING: dict[str, Callable[[Path], TensorFile]] = {
    ".safetensors": SafetensorsFile,
    ".ckpt": MindSporeFile,
    **dict.fromkeys((".bin", ".pth", ".pt"), TorchFile),
}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What a folder may have, in the order of preference.
_FOLDER_CONTENT = (_INDEXES[0], "model.safetensors", _INDEXES[1], "pytorch_model.bin")
_NEW_LINE = "\n    "
# Numbers of a mapped tensor that are checked before its pages are given back.
_CHECKED = 1 << 24
# Parts of names that quantization adds: ChatGLM's own, GPTQ and AWQ, bitsandbytes.
_QUANTIZED = (".quantized.", ".weight_scale.", ".quantized_weight.", ".qweight.", ".absmax.", ".quant_state.", ".SCB.")
# What a name begins with that was saved with the network around it.
_ORIGINS = {
    "module.": "DataParallel and DeepSpeed add it: save model.module.state_dict()",
    "base_model.model.": "peft adds it to the whole network: save the result of merge_and_unload()",
    "_orig_mod.": "torch.compile adds it: save model._orig_mod.state_dict()",
}


class CheckpointReader(AbstractContextManager["CheckpointReader"]):
    """The weights of a checkpoint under glm_ms names, read one tensor at a time.

    At most one file is open at a time; reading in the order of `names()` opens each once. Joins the parts of joint
    weights that a sharded run has saved.

    Args:
        path: folder or file, as the user gave it.
        files: the files of tensors.

    Attributes:
        ignored: stored names of optimizer state and training counters.
        slice: "rank 1 of 8" if a file says that it has the slices of one rank; else None.

    Raises:
        CheckpointError: a parameter is stored twice, or a part of a joint one is missing.
    """

    def __init__(self, path: Path, files: list[TensorFile]) -> None:
        self.path = path
        self.ignored: tuple[str, ...] = ()
        self.slice: str | None = None
        # Parameter -> index of a part -> its tensor; and number of parts.
        self._home: dict[str, dict[int, tuple[TensorFile, str]]] = {}
        self._parts: dict[str, int] = {}
        self._open: TensorFile | None = None
        self._verified: set[Path] = set()
        self._listed: set[Path] = set()  # compared with the manifest beside them, or about to be
        for file in files:
            self.slice = self.slice or described_slice(file)
            for stored in file.entries:
                self._register(file, stored)
        for name, home in self._home.items():
            if len(home) < self._parts[name]:
                missing = [part for place, part in enumerate(part_names(name)) if place not in home]
                raise CheckpointError(f"{path}: parts of {name} are missing: {capped(missing)}")

    def names(self) -> list[str]:
        """Names of all parameters, in the order of the files."""
        return list(self._home)

    def base_names(self) -> list[str]:
        """Names of the parameters that are not of an adapter."""
        return [name for name in self._home if owner_of(name) is None]

    def adapter_names(self) -> list[str]:
        """Names of the tensors of an adapter: without prefix, as MindFormers stores them, or as peft does."""
        return [name for name in self._home if owner_of(name) is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        shapes = [file.entries[stored].shape for file, stored in self._find(name)]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def dtype(self, name: str) -> str:
        """Stored element type of a parameter: "float32", "float16", "bfloat16", ..."""
        file, stored = self._find(name)[0]
        return file.entries[stored].dtype

    def file(self, name: str) -> Path:
        """The file of a parameter."""
        return self._find(name)[0][0].path

    def files(self) -> list[Path]:
        """Every file that has parameters."""
        return list(dict.fromkeys(file.path for home in self._home.values() for file, _ in home.values()))

    def read(self, name: str, dtype: str | None = None, mapped: bool = False) -> np.ndarray:
        """A new array with one parameter, as "float32", "float16", "bfloat16" or, without `dtype`, as it is stored.

        NumPy has no bfloat16: its elements are uint16 bit patterns (`bfloat16_to_float32` converts them). With `mapped`
        a parameter that is stored in this type is a `np.memmap` where the file allows it, see `TensorFile.map`.

        Raises:
            CheckpointError: unknown name, unreadable file, a file that differs from the manifest beside it or from its
                own checksums, NaN or infinity, or a value too large for `dtype`.
        """
        pieces = []
        for file, stored in self._find(name):
            if self._open is not file:
                self.close()
            self._open = file
            self._verify(file)
            piece = file.map(stored) if mapped and file.entries[stored].dtype == dtype else file.read(stored)
            _check_finite(piece, file.entries[stored].dtype, f"{file.path}: {name}")
            if dtype is not None:
                piece = convert_dtype(piece, file.entries[stored].dtype, dtype, f"{file.path}: {name}")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def map(self, name: str) -> np.ndarray:
        """A parameter as it is stored, without reading it where that is possible; see `TensorFile.map`.

        Raises CheckpointError as `read`.
        """
        found = self._find(name)
        if len(found) > 1:
            return self.read(name)
        file, stored = found[0]
        self._verify(file)
        array = file.map(stored)
        _check_finite(array, file.entries[stored].dtype, f"{file.path}: {name}")
        return array

    def verified(self, parameters: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Gives `parameters`, which are read from this checkpoint, while a thread compares its files with the manifest
        beside them. None of them may be used if an error comes after the last one.

        Raises CheckpointError: a file differs, and what reading them raises.
        """
        files = self.files()
        self._listed.update(files)
        comparison = Background(lambda: check_all_listed(files))
        try:
            yield from parameters
        except CheckpointError:
            comparison.wait()  # that the file is damaged says more than what was found in it
            raise
        comparison.wait()

    def _verify(self, file: TensorFile) -> None:
        """Compares a file with its checksums, once and before its first tensor is used."""
        if file.path not in self._verified:
            if file.path not in self._listed:
                check_listed(file.path)
            file.verify()
            self._verified.add(file.path)

    def close(self) -> None:
        """Closes the open file; a later read opens it again."""
        if self._open is not None:
            self._open.release()
            self._open = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def _register(self, file: TensorFile, stored: str) -> None:
        if is_training_state(stored):
            self.ignored += (stored,)
        if is_training_state(stored) or stored == INV_FREQ or PREFIX_POSITIONS.fullmatch(stored):
            return
        name, place, parts = joint_of(to_glm_name(stored))
        home = self._home.setdefault(name, {})
        if place in home or self._parts.setdefault(name, parts) != parts:
            other, its_name = home.get(place) or next(iter(home.values()))
            raise CheckpointError(f"{file.path}: {stored} is stored twice; also as {its_name} in {other.path.name}")
        home[place] = (file, stored)

    def _find(self, name: str) -> list[tuple[TensorFile, str]]:
        if name not in self._home:
            raise CheckpointError(f"{self.path}: no parameter {name!r}{did_you_mean(name, self._home)}")
        home = self._home[name]
        return [home[place] for place in sorted(home)]


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Opens a checkpoint; reads names, shapes and types, no weights.

    Args:
        path: a Hugging Face folder (`model.safetensors`, `pytorch_model.bin`, or shards with their index),
            a folder with one `.safetensors` or `.ckpt` (also in its only subfolder rank_N), or one file:
            `.safetensors` (Hugging Face, glm_ms or MindSpore), `.ckpt` (MindSpore), `.bin`, `.pth`, `.pt` (PyTorch).

    Raises:
        CheckpointError: the path is missing or of no known kind; a file is truncated, damaged or does not match its
            ending; an index names a shard that is missing or lacks a tensor.
    """
    if problem := path_problem(path):
        raise CheckpointError(problem)
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        return _open_folder(path) if path.is_dir() else CheckpointReader(path, [open_file(path)])
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def open_file(path: Path) -> TensorFile:
    """Opens one file of tensors by its ending; raises CheckpointError as `open_checkpoint`."""
    if path.name.endswith(".index.json"):
        raise CheckpointError(f"{path}: an index; give its folder, {path.parent}")
    if path.suffix not in _BY_ENDING:
        raise CheckpointError(f"{path}: unknown ending; known are {', '.join(_BY_ENDING)}, or give a folder")
    try:
        return _BY_ENDING[path.suffix](path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _open_folder(folder: Path) -> CheckpointReader:
    name = next((name for name in _FOLDER_CONTENT if (folder / name).is_file()), None)
    if name in _INDEXES:
        return _open_shards(folder, folder / name)
    if name is not None:
        return CheckpointReader(folder, [open_file(folder / name)])
    found = sorted(item for item in folder.iterdir() if item.suffix in _BY_ENDING and item.is_file())
    found = [item for item in found if item.name != OPTIMIZER] or found  # beside an adapter
    ranks = sorted(item for item in folder.glob("rank_*") if item.is_dir())
    if not found and len(ranks) == 1:  # as tools/transform_ckpt.py makes it
        return _open_folder(ranks[0])
    if not found and ranks:
        raise CheckpointError(
            f"{folder}: has the slices of {len(ranks)} ranks; merge them with {tool('transform_ckpt')}, or give one of "
            "the folders if every rank has the whole checkpoint"
        )
    if not found:
        raise CheckpointError(
            f"{folder}: has no weights; expected one of {', '.join(_FOLDER_CONTENT)}, "
            f"or one file ending in {', '.join(_BY_ENDING)}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: has several checkpoints ({capped([item.name for item in found])}) and no {_INDEXES[0]}; "
            "give one of them"
        )
    return CheckpointReader(folder, [open_file(found[0])])


def _open_shards(folder: Path, index: Path) -> CheckpointReader:
    """Opens the shards of an index and compares them with it."""
    shard_of, total_size = _read_index(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(shards)} shards missing: {capped(missing)}")
    files = {shard: open_file(folder / shard) for shard in shards}
    lacking = [f"{name} (should be in {shard})" for name, shard in shard_of.items() if name not in files[shard].entries]
    if lacking:
        raise CheckpointError(f"{index}: {len(lacking)} tensors are not in their shard: {capped(lacking)}")
    unlisted = [f"{name} (in {shard})" for shard in shards for name in files[shard].entries if name not in shard_of]
    if unlisted:
        raise CheckpointError(f"{index}: {len(unlisted)} tensors of the shards are not listed: {capped(unlisted)}")
    for shard, file in files.items():  # a shard may also have tensors that the index finds in another one
        file.entries = {name: info for name, info in file.entries.items() if shard_of[name] == shard}
    stored = sum(info.nbytes for file in files.values() for info in file.entries.values() if info.dtype in DTYPES)
    if total_size is not None and total_size != stored:
        raise CheckpointError(
            f"{index}: metadata.total_size = {total_size!r}, but the tensors of its shards have {stored} bytes; fetch "
            "index and shards again, or correct the number"
        )
    return CheckpointReader(folder, list(files.values()))


def _read_index(index: Path) -> tuple[dict[str, str], Any]:
    """The shard of every tensor, and the bytes of all, None if the index does not tell."""
    document = read_object(index, CheckpointError)
    shard_of, metadata = document.get("weight_map"), document.get("metadata", {})
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, shard in shard_of.items():
        # Shards are beside their index; a path that leads out of the folder is refused.
        if not isinstance(shard, str) or PurePath(shard).name != shard:
            raise CheckpointError(f"{index}: {name}: {shard!r} is not a file name")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{index}: metadata = {metadata!r:.60}: must be an object")
    return shard_of, metadata.get("total_size")


def _check_finite(array: np.ndarray, dtype: str, what: str) -> None:
    """As `check_finite`; a mapped array is never all in memory meanwhile, and not at all afterwards."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHECKED):
        check_finite(flat[start : start + _CHECKED], dtype, what)
        forget_pages(array)


def check_names_and_shapes(
    config: GLMConfig, reader: CheckpointReader, with_adapter: bool = False,
    expected: Mapping[str, tuple[int, ...]] | None = None, types: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Compares the parameters of a checkpoint with those of a config.

    Args:
        with_adapter: allow the tensors of an adapter beside them, for a caller that uses these too.
        expected: name -> shape of every parameter; None: those of the config.
        types: name -> type of those whose type is given; others may have any floating one.

    Raises:
        CheckpointError: parameters are missing, unexpected, of a wrong shape or type; lists all, at most ten of a kind,
            with the file and the expected and found shapes. The checkpoint is an adapter or contains
            one.
    """
    _check_adapter(reader, with_adapter)
    if expected is None:
        expected = expected_shapes(config)
        _check_not_quantized(reader, expected)
    found, types = reader.base_names(), types or {}
    known = set(found)
    absent = [name for name in expected if name not in known]
    problems: dict[str, list[str]] = {
        "missing": [f"{name} {list(expected[name])}" for name in absent],
        "unexpected": [],
        "of the wrong shape": [],
        "not floating point": [],
        "of the wrong type": [],
    }
    for name in found:
        shape, file = reader.shape(name), reader.file(name).name
        if name not in expected:
            near = misspelled(name, absent)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems["unexpected"].append(f"{name} {list(shape)} in {file}{hint}")
            continue
        if shape != expected[name]:
            problems["of the wrong shape"].append(
                f"{name} in {file}: expected {list(expected[name])}, found {list(shape)}"
            )
        if name in types and reader.dtype(name) != types[name]:
            problems["of the wrong type"].append(f"{name} in {file}: {reader.dtype(name)}, not {types[name]}")
        elif name not in types and not is_floating(reader.dtype(name)):
            problems["not floating point"].append(f"{name} in {file}: {reader.dtype(name)}")
    listed = [f"\n  {len(items)} {what}:\n    {capped(items, _NEW_LINE)}" for what, items in problems.items() if items]
    if listed:
        remark = _why_other_names(reader, found, expected)
        if remark:
            listed.append(f"\n  {remark}")
        if reader.slice is not None:
            listed.append(f"\n  It is the slice of {reader.slice}: merge all slices with {tool('transform_ckpt')}")
        raise CheckpointError(
            f"{reader.path}: {len(found)} parameters do not fit the config, which expects {len(expected)}"
            + "".join(listed)
        )


def has_adapter(path: str | Path) -> bool:
    """Whether weights contain the tensors of an adapter too; False if there are no weights."""
    try:
        with open_checkpoint(path) as reader:
            return bool(reader.adapter_names())
    except CheckpointError:
        return False


def _check_adapter(reader: CheckpointReader, allowed: bool) -> None:
    """Raises CheckpointError for a checkpoint that is an adapter, or contains one that is not allowed."""
    tuned = reader.adapter_names()
    if tuned and not reader.base_names():
        merge = f", or merge both first ({tool('merge_lora')})" if owner_of(tuned[0]) is LORA else ""
        raise CheckpointError(
            f"{reader.path}: contains an adapter, not weights; give the weights that it was trained on, and "
            f"this as {argument('adapter')}{merge}"
        )
    if tuned and not allowed:
        use = "use it in a run, as load_checkpoint alone"
        if owner_of(tuned[0]) is LORA:
            use = f"merge it first: {tool('merge_lora')} with this as --base and --adapter"
        use += f", or convert the weights alone: {tool('convert_weight')} --without_adapter"
        raise CheckpointError(f"{reader.path}: contains weights and an adapter ({capped(tuned)}); {use}")


def _check_not_quantized(reader: CheckpointReader, expected: Mapping[str, object]) -> None:
    """Raises CheckpointError for integers where the network has floating point weights; a list of names, of which none
    fits, would hide the reason."""
    names = reader.base_names()
    small = any(reader.dtype(name) in ("int8", "uint8") for name in names if name in expected)
    if small or any(part in f"{name}." for name in names for part in _QUANTIZED):
        raise CheckpointError(
            f"{reader.path}: quantized weights (int4 or int8), and floating point weights are needed here: give the "
            "unquantized release. Only eval, predict, chat, serve and finetuning of adapters take quantized ones, "
            "those of glm-ms quantize and the official ones of ChatGLM2 and ChatGLM3"
        )


def _why_other_names(reader: CheckpointReader, found: list[str], expected: Mapping[str, object]) -> str:
    """What a checkpoint is that does not fit, for the error message; empty if that is not known."""
    if "transformer.word_embeddings.weight" in found:
        return "This is ChatGLM-6B of the first generation, another network: use ChatGLM2-6B or ChatGLM3-6B"
    if any(".base_layer." in name for name in found):
        return "These are weights under an adapter of peft: save the result of merge_and_unload()"
    if "encoder.layers.0.input_layernorm.weight" in found:
        return "Every name lacks transformer.: save the whole ChatGLMForConditionalGeneration, with its output layer"
    pairs = ((name, plain) for name in found for plain in expected if name.endswith(f".{plain}"))
    prefix = next((name.removesuffix(plain) for name, plain in pairs), "")
    if not prefix or not all(name.startswith(prefix) for name in found):
        return ""
    origin = next(
        (text for start, text in _ORIGINS.items() if prefix.startswith(start)), "save the inner network alone"
    )
    return f"Every name begins with {prefix}, which the network does not have; {origin}"


def load_parameters(
    reader: CheckpointReader, config: GLMConfig, dtype: str, with_adapter: bool = False, mapped: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Checks a checkpoint with a config, then gives (glm_ms name, array) of every parameter, in the order of the files.

    `dtype` is "float32", "float16" or "bfloat16"; the last as uint16 bit patterns. `with_adapter` as of
    `check_names_and_shapes`; the tensors of the adapter are not given. `mapped` as of `CheckpointReader.read`.

    Raises:
        CheckpointError: at once if names or shapes do not fit or `dtype` is unknown; during the iteration if a tensor
            cannot be read, is not finite or overflows `dtype`.
    """
    check_float_type(dtype)
    check_names_and_shapes(config, reader, with_adapter)
    return ((name, reader.read(name, dtype, mapped)) for name in reader.base_names())
