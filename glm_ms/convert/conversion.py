"""Converts a checkpoint: checks everything first, then streams tensor by tensor."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np

from glm_ms.convert import gguf_model
from glm_ms.convert.dtypes import check_finite, check_float_type, convert_dtype
from glm_ms.convert.gguf_file import TYPES as GGUF_TYPES
from glm_ms.convert.hf_glm import check_config, write_hf_glm_folder
from glm_ms.convert.reader import CheckpointReader, check_names_and_shapes, open_checkpoint
from glm_ms.convert.writers import DEFAULT_SHARD_SIZE, FILE_ENDINGS, Shapes, size_in_bytes, write_file, write_hf_folder
from glm_ms.families import read_config
from glm_ms.model.config import FLOAT_TYPES, GLMConfig
from glm_ms.spelling import argument, given
from glm_ms.storage.atomic import check_target
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.paths import path_problem
from glm_ms.storage.run_folder import resolve_checkpoint
from glm_ms.tokenizer import SentencePieceTokenizer

HF_GLM = "hf-glm"  # a folder for GlmForCausalLM of transformers
GGUF = "gguf"  # a file for llama.cpp
TARGETS = ("hf", "mindspore", HF_GLM, GGUF)
NEED_TOKENIZER = (HF_GLM, GGUF)
# Copied into a Hugging Face folder from the folder of the input or of the config, if they exist.
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenization_chatglm.py",
)  # fmt: skip
# Target that is a file -> endings of its name; other targets are folders.
_FILES = {"mindspore": FILE_ENDINGS, GGUF: (gguf_model.ENDING,)}
_FOREIGN_ENDINGS = (".bin", ".pth", ".pt", ".json", ".yaml", ".npz")


@dataclass(frozen=True)
class Conversion:
    """A conversion that passed all checks of names, shapes and types; `run` executes it.

    Attributes:
        target: "hf", "mindspore", "hf-glm" or "gguf".
        dtype: type of the output; of a GGUF file "float32", the type in which its tensors are read.
        shapes: glm_ms name -> shape, in the order of the input.
        max_shard_size: bytes of tensors in one file of a Hugging Face folder.
        extra_files: tokenizer files to copy.
        tokenizer: of the model, for "hf-glm" and "gguf" only.
        gguf_type: type of the matrices of a GGUF file.
        deltas: glm_ms name -> function giving a float32 array that is added to the tensor, in float32.
    """

    reader: CheckpointReader
    output: Path
    target: str
    config: GLMConfig
    dtype: str
    shapes: Shapes
    max_shard_size: int
    extra_files: tuple[Path, ...]
    overwrite: bool
    deltas: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    tokenizer: SentencePieceTokenizer | None = None
    gguf_type: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters in the output; for a GGUF file, of all that are read."""
        return size_in_bytes(self.shapes, self.dtype)

    def run(self, on_tensor: Callable[[str, int], None] = lambda name, size: None) -> None:
        """Reads, converts and writes the tensors one by one.

        Calls `on_tensor` with the name and the bytes in the output of each tensor that is done.

        Raises:
            CheckpointError: a tensor cannot be read or overflows the type, or the output cannot be written; `output`
                is unchanged then.
        """
        if self.target == GGUF:
            with self.reader:
                gguf_model.write_gguf_model(
                    self.output, self.config, self.gguf_type, self.shapes, self._stream(on_tensor), self.tokenizer,
                    self.overwrite
                )  # fmt: skip
            return
        tensors = self.shapes, self.dtype, self._stream(on_tensor)
        with self.reader:
            more = self.max_shard_size, self.extra_files, self.overwrite
            if self.target == "hf":
                write_hf_folder(self.output, self.config, *tensors, *more)
            elif self.tokenizer is not None:
                write_hf_glm_folder(self.output, self.config, self.tokenizer, *tensors, *more)
            else:
                write_file(self.output, *tensors, self.overwrite)

    def _stream(self, on_tensor: Callable[[str, int], None]) -> Iterator[tuple[str, np.ndarray]]:
        for name in self.shapes:
            array = self.reader.read(name, "float32" if name in self.deltas else self.dtype)
            if name in self.deltas:
                array += self.deltas[name]()
                check_finite(array, "float32", f"{self.reader.path}: {name} with the adapter")
                array = convert_dtype(array, "float32", self.dtype, name)
            size = array.nbytes
            yield name, array
            del array  # so that memory has one tensor, not two, while the next is read
            on_tensor(name, size)


def plan_conversion(
    source: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    dtype: str | None = None,
    target: str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    with_adapter: bool = False,
    tokenizer: SentencePieceTokenizer | None = None,
    gguf_type: str | None = None,
) -> Conversion:
    """Opens the input and checks names, shapes, types and the output.

    Args:
        source: checkpoint that `open_checkpoint` reads, or the output folder of a run.
        output: a folder (Hugging Face), a `.ckpt` or a `.safetensors` (MindSpore), a `.gguf` (llama.cpp).
        config: folder, config.json or YAML; by default the config.json in a `source` folder.
        dtype: one of `FLOAT_TYPES`; by default that of all weights of the input.
        target: "hf", "mindspore", "hf-glm" or "gguf"; by default by the ending of `output`, a folder is "hf".
        max_shard_size: bytes of tensors in one file, for folders only; 2 GB by default.
        with_adapter: allow the tensors of an adapter beside the weights; they are left out.
        tokenizer: of the model; needed for "hf-glm" and "gguf", whose output has its vocabulary and its chat template.
        gguf_type: type of the matrices of a GGUF file, a key of `gguf_file.TYPES`, in place of `dtype`; F16 by default.

    Raises:
        CheckpointError, ConfigError: the input, the config or the output cannot be used, or do not fit.
    """
    source = resolve_checkpoint(source)
    if problem := path_problem(output):
        raise CheckpointError(problem)
    output = Path(output)
    target = _target(output, target)
    _check_options(target, tokenizer, max_shard_size, dtype, gguf_type)
    check_target(output, folder=target not in _FILES, overwrite=overwrite)
    reader = open_checkpoint(source)
    for file in reader.files():  # overwriting must not delete the input
        if output.resolve() in (file.resolve(), *file.resolve().parents):
            raise CheckpointError(f"{output}: would replace the input {file}; choose another output")
    if config is None and not source.is_dir():
        raise CheckpointError(
            f"{source}: a single file does not have the architecture; give its {argument('config')}: "
            "a folder with config.json, a .json or a .yaml"
        )
    glm_config = read_config(source if config is None else config)
    check_names_and_shapes(glm_config, reader, with_adapter)
    if target == GGUF:
        gguf_model.check_gguf(glm_config, tokenizer, config or source)
    elif tokenizer is not None:
        check_config(glm_config, tokenizer, config or source)
    return Conversion(
        reader=reader,
        output=output,
        target=target,
        config=glm_config,
        dtype="float32" if target == GGUF else dtype or _common_dtype(reader),
        shapes={name: reader.shape(name) for name in reader.base_names()},
        max_shard_size=max_shard_size or DEFAULT_SHARD_SIZE,
        extra_files=_tokenizer_files(source, config) if target == "hf" else (),
        overwrite=overwrite,
        tokenizer=tokenizer,
        gguf_type=(gguf_type or "F16") if target == GGUF else "",
    )


def _check_options(
    target: str, tokenizer: SentencePieceTokenizer | None, max_shard_size: int | None, dtype: str | None,
    gguf_type: str | None
) -> None:  # fmt: skip
    """Raises CheckpointError for options that this target does not take, or that are missing for it."""
    if (tokenizer is not None) != (target in NEED_TOKENIZER):
        needed = " and ".join(NEED_TOKENIZER)
        raise CheckpointError(f"target {target!r}: a tokenizer is needed for {needed}, and for these only")
    is_file = target in _FILES
    if max_shard_size is not None and (is_file or max_shard_size < 1):
        raise CheckpointError(
            f"{given('max_shard_size', max_shard_size)}: must be positive, and is for Hugging Face output only; "
            f"a {' or '.join(_FILES[target if is_file else 'mindspore'])} is one file"
        )
    _check_type_of_file(target, dtype, gguf_type)
    if dtype is not None:
        check_float_type(dtype)


def _check_type_of_file(target: str, dtype: str | None, gguf_type: str | None) -> None:
    """Raises CheckpointError for a type that is unknown or not of the target."""
    if target == GGUF and dtype is not None:
        raise CheckpointError(f"{given('dtype', dtype)}: the type of a GGUF file is given by {argument('gguf_type')}")
    if target != GGUF and gguf_type is not None:
        raise CheckpointError(f"{given('gguf_type', gguf_type)}: is for {given('target', GGUF)} only; remove it")
    if gguf_type is not None and gguf_type not in GGUF_TYPES:
        raise CheckpointError(f"gguf_type {gguf_type!r}: must be one of {', '.join(GGUF_TYPES)}")


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GB", "500MB" (powers of 1000), "1GiB" (powers of 1024) or "1000000".

    Raises CheckpointError if it is not a positive size.
    """
    number, unit = text.strip(), 1
    for power, letter in enumerate("KMGT", 1):
        for ending, base in ((f"{letter}IB", 1024), (f"{letter}B", 1000)):
            if number.upper().endswith(ending):
                number, unit = number[: -len(ending)].strip(), base**power
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise CheckpointError(f"size {text!r}: expected a positive number with a unit, such as 2GB or 500MB")
    return size


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        # Not ru_maxrss: Linux passes that of the parent process on over fork and exec.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _target(output: Path, target: str | None) -> str:
    """The kind of output, by the ending of its name."""
    if target is not None and target not in TARGETS:
        raise CheckpointError(f"target {target!r}: must be one of {', '.join(TARGETS)}")
    inferred = next((kind for kind, endings in _FILES.items() if output.suffix in endings), "hf")
    if output.suffix in _FOREIGN_ENDINGS:
        every = [ending for endings in _FILES.values() for ending in endings]
        raise CheckpointError(
            f"{output}: cannot write {output.suffix}; give a folder or a name that ends in {' or '.join(every)}"
        )
    if target is not None and (inferred if inferred in _FILES or target in _FILES else target) != target:
        remedy = f"a name that ends in {' or '.join(_FILES[target])}" if target in _FILES else "a folder"
        raise CheckpointError(f"{output}: is not an output of kind {target}; give {remedy}")
    return target or inferred


def _common_dtype(reader: CheckpointReader) -> str:
    found = sorted({reader.dtype(name) for name in reader.base_names()})
    if len(found) != 1 or found[0] not in FLOAT_TYPES:
        raise CheckpointError(
            f"{reader.path}: has {' and '.join(found)}; choose the type of the output, {argument('dtype')}: "
            f"{', '.join(FLOAT_TYPES)}"
        )
    return found[0]


def _tokenizer_files(source: Path, config: str | Path | None) -> tuple[Path, ...]:
    """The tokenizer files of the config's folder; those in the folder of the input take precedence."""
    folders = (Path(config or source), source)
    found = {name: folder / name for folder in folders for name in TOKENIZER_FILES if (folder / name).is_file()}
    return tuple(found.values())
