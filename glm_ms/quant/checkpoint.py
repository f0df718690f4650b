"""Quantized weights in files: our own, which are memory-mapped, and the official ones of ChatGLM2 and ChatGLM3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.convert.names import expected_shapes
from glm_ms.convert.reader import CheckpointReader, check_names_and_shapes, load_parameters
from glm_ms.model.config import FLOAT_TYPES, GLMConfig
from glm_ms.model.glm import OUTPUT_LAYER, Cells
from glm_ms.ops.cpu import library
from glm_ms.ops.packing import pack_int4, pack_int8
from glm_ms.quant import GROUPS, Quantization, QuantizationError
from glm_ms.quant.network import SCALE, WEIGHT, cells_for, is_quantized, quantized_parameters, replaced_shapes
from glm_ms.spelling import argument
from glm_ms.storage.readers import read_object

EMBEDDING = "transformer.embedding.embedding_table"
# Ending of the scales of an official file; its integers have the name of the weight.
OFFICIAL_SCALE = "weight_scale"
# Official files have one scale for an output. With 4 bits it is repeated for every group of so many inputs.
OFFICIAL_GROUP = 128
_OWN_WEIGHT, _OFFICIAL_SCALE = f".{WEIGHT}", f".{OFFICIAL_SCALE}"


def weights_of(
    reader: CheckpointReader, config: GLMConfig, wanted: Quantization | None = None, mapped: bool = False
) -> tuple[Cells | None, Iterator[tuple[str, np.ndarray]], Quantization | None]:
    """What a network is built of: its classes, its parameters, and how its weights are quantized, None if they are not.

    Weights that are quantized in the file stay so; others are quantized as `wanted` while they are read. Tensors of an
    adapter beside the weights are left out.

    Args:
        config: its `param_init_type` is the type of all parameters that are not quantized.
        mapped: parameters that are stored in this type stay in the memory of their file, see `CheckpointReader.read`.

    Raises:
        CheckpointError: at once if names, shapes or types do not fit the config, if `config.json` says that weights are
            quantized and they are not, or if they are quantized in another way than `wanted`; during the iteration as
            `glm_ms.convert.reader.load_parameters`.
    """
    found, dtype = stored_quantization(reader, config), config.param_init_type
    if found is None:
        _check_description(reader)
        parameters = reader.verified(load_parameters(reader, config, dtype, with_adapter=True, mapped=mapped))
        if wanted is not None:
            parameters = quantized_parameters(parameters, expected_shapes(config), wanted)
        return cells_for(wanted), parameters, wanted
    told = described_quantization(_folder(reader))
    if told is not None and told.numbers != found.numbers:
        raise QuantizationError(
            f"{_folder(reader) / 'config.json'}: says {told}, but the weights of {reader.path} are {found}; fetch or "
            "quantize them again"
        )
    if wanted is not None and wanted.numbers != found.numbers:
        raise QuantizationError(
            f"{reader.path}: these weights are quantized already ({found}), so they cannot become {wanted}; leave "
            f"{argument('quantization_bit')} out, or give the unquantized release"
        )
    own = any(name.endswith(_OWN_WEIGHT) for name in reader.base_names())
    read = _own_parameters if own else _official_parameters
    return cells_for(found), reader.verified(read(reader, config, found, dtype)), found


def storage_on_cpu(reader: CheckpointReader, config: GLMConfig) -> str:
    """The type in which a CPU keeps the weights of a checkpoint, all of them exactly.

    That of the file if all its tensors are float16 or all are bfloat16, the config has one of both, and the C++
    kernels, which read them, are there; else float32.
    """
    stored = {reader.dtype(name) for name in reader.base_names()}
    if config.param_init_type == "float32" or library.load() is None or stored not in ({"float16"}, {"bfloat16"}):
        return "float32"
    return stored.pop()


def stored_quantization(reader: CheckpointReader, config: GLMConfig) -> Quantization | None:
    """How the weights of a checkpoint are quantized, by their names, types and shapes; None if they are not.

    Raises QuantizationError if they are quantized, but not in a way that is known.
    """
    names = set(reader.base_names())
    shapes, find = expected_shapes(config), _find_own
    modules = [name.removesuffix(_OWN_WEIGHT) for name in reader.base_names() if name.endswith(_OWN_WEIGHT)]
    if not modules:
        modules = [name.removesuffix(_OFFICIAL_SCALE) for name in reader.base_names() if name.endswith(_OFFICIAL_SCALE)]
        find = partial(_find_official, shapes)
    if not modules:
        return None
    # Single layers may be damaged, which is said later, with the name.
    (numbers, _), *_ = Counter(find(reader, names, module) for module in modules).most_common(1)
    if numbers is None:
        raise QuantizationError(
            f"{reader.path}: quantized weights of an unknown kind ({modules[0]}); known are the files of glm-ms "
            "quantize, and the official ones of ChatGLM2 and ChatGLM3"
        )
    embedding = reader.dtype(EMBEDDING) if EMBEDDING in names else None
    kept = embedding if embedding in FLOAT_TYPES else None
    return Quantization(*numbers, OUTPUT_LAYER in modules, kept)


def _find_own(reader: CheckpointReader, names: Collection[str], module: str) -> tuple[int, int] | None:
    """Bits and group of a layer as `glm-ms quantize` writes it, None if they are not known."""
    weight, scale = f"{module}.{WEIGHT}", f"{module}.{SCALE}"
    if scale not in names:
        return None
    if reader.dtype(weight) == "int8":
        return 8, 0
    blocks, groups = reader.shape(weight)[1:2], reader.shape(scale)[1:2]
    group = 8 * blocks[0] // groups[0] if blocks and groups and groups[0] else 0
    return (4, group) if group in GROUPS and reader.dtype(weight) == "uint8" else None


def _find_official(
    shapes: Mapping[str, tuple[int, ...]], reader: CheckpointReader, names: Collection[str], module: str
) -> tuple[int, int] | None:
    """Bits and group of a layer of an official file, None if they are not known."""
    name = f"{module}.weight"
    if name not in names or name not in shapes:
        return None
    width, stored = shapes[name][1], reader.shape(name)[1:2]
    return {width: (8, 0), width // 2: (4, OFFICIAL_GROUP)}.get(stored[0]) if stored else None


def described_quantization(path: str | Path) -> Quantization | None:
    """How the weights beside a `config.json` are quantized according to it; None without one, or if they are not.

    Raises QuantizationError if it describes it in an unknown way.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if file.name != "config.json" or not file.is_file():
        return None
    document = read_object(file, QuantizationError)
    section, bits = document.get("quantization"), document.get("quantization_bit")
    if isinstance(section, dict):
        try:
            return Quantization(**section)
        except TypeError:
            raise QuantizationError(f"{file}: quantization = {section!r:.80}: unknown keys") from None
    if section is not None or bits not in (None, 0, 4, 8):
        raise QuantizationError(f"{file}: quantization = {section!r:.80}, quantization_bit = {bits!r:.20}: not known")
    return Quantization(bits, OFFICIAL_GROUP if bits == 4 else 0, False, "float16") if bits else None


def description(quantization: Quantization) -> dict[str, Any]:
    """The section `quantization` of `config.json`, see `described_quantization`."""
    return {key: value for key, value in vars(quantization).items() if value is not None}


def _folder(reader: CheckpointReader) -> Path:
    return reader.path if reader.path.is_dir() else reader.path.parent


def _check_description(reader: CheckpointReader) -> None:
    folder = _folder(reader)
    told = described_quantization(folder)
    if told is not None:
        raise QuantizationError(
            f"{folder / 'config.json'}: says that the weights are quantized ({told}), but those of {reader.path} are "
            "not; remove quantization_bit from it, or fetch the quantized weights"
        )


def _own_parameters(
    reader: CheckpointReader, config: GLMConfig, quantization: Quantization, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Packed tensors and the embedding are mapped, the small ones are read."""
    shapes = expected_shapes(config)
    replaced = replaced_shapes(shapes, quantization)
    expected = {name: shape for name, shape in shapes.items() if not is_quantized(name, quantization, shapes)}
    expected.update((name, shape) for name, (shape, _) in replaced.items())
    check_names_and_shapes(config, reader, True, expected, {name: dtype for name, (_, dtype) in replaced.items()})
    mapped = {*replaced, EMBEDDING} if quantization.embedding else set(replaced)
    return (
        (name, reader.map(name) if name in mapped else reader.read(name, dtype)) for name in reader.base_names()
    )  # fmt: skip


def _official_parameters(
    reader: CheckpointReader, config: GLMConfig, quantization: Quantization, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Packs the integers of an official file, without any rounding.

    A weight [N, K] of 8 bits is int8 [N, K]; of 4 bits int8 [N, K / 2], whose byte i has the input 2 i in its high and
    2 i + 1 in its low half, each with a sign. Scales are float16 [N]. Source: quantization.py of the released models,
    `QuantizedLinear` and the kernels int4WeightExtraction and int8WeightExtraction.
    """
    expected, types = expected_shapes(config), {}
    quantized = [name for name in expected if is_quantized(name, quantization, expected)]
    for name in quantized:
        rows, width = expected[name]
        expected[name], types[name] = (rows, width * quantization.bits // 8), "int8"
        expected[name.removesuffix("weight") + OFFICIAL_SCALE] = (rows,)
    check_names_and_shapes(config, reader, True, expected, types)
    modules = [name.removesuffix(".weight") for name in quantized]
    return _packed_official(reader, frozenset(modules), quantization, dtype)


def _packed_official(
    reader: CheckpointReader, modules: frozenset[str], quantization: Quantization, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    for name in reader.base_names():
        module, _, kind = name.rpartition(".")
        if module not in modules or kind not in ("weight", OFFICIAL_SCALE):
            kept = quantization.embedding if name == EMBEDDING and quantization.embedding else dtype
            yield name, reader.read(name, kept)
        elif kind == "weight":
            integers, scale = reader.read(name), reader.read(f"{module}.{OFFICIAL_SCALE}", "float32")
            if quantization.bits == 8:
                if integers.size and integers.min() < -127:
                    raise QuantizationError(f"{reader.file(name)}: {name}: has -128, which is not symmetric; damaged?")
                packed = pack_int8(integers, scale)
            else:
                q = official_int4(integers)
                groups = -(-q.shape[1] // quantization.group)
                packed = pack_int4(q, np.repeat(scale[:, None], groups, axis=1), quantization.group)
            yield f"{module}.{WEIGHT}", packed.data
            yield f"{module}.{SCALE}", packed.scale


def official_int4(halves: np.ndarray) -> np.ndarray:
    """The integers, int8 [N, K] in [-8, 7], of an official weight of 4 bits, int8 [N, K / 2]."""
    q = np.empty((halves.shape[0], 2 * halves.shape[1]), np.int8)
    q[:, 0::2] = halves >> 4  # keeps the sign
    q[:, 1::2] = (halves << 4) >> 4
    return q
