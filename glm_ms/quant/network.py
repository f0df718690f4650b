"""Networks of quantized layers: built from scratch, or made of a network with weights; and their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from glm_ms.convert.dtypes import bfloat16_to_float32
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import OUTPUT_LAYER, Cells, GLMNetwork
from glm_ms.model.layers import Embedding, Linear, build_linear
from glm_ms.ops.packing import PANEL, Packed, pack_int4, pack_int8
from glm_ms.ops.quantized import packed_shapes
from glm_ms.quant import Quantization, QuantizationError
from glm_ms.quant.algorithms import quantize_int4, quantize_int8
from glm_ms.quant.compensation import Inputs
from glm_ms.quant.linear import QuantizedLinear

WEIGHT, SCALE = "quantized.weight", "quantized.scale"
# Outputs that are quantized and packed at a time: whole panels.
_OUTPUTS = 64 * PANEL
InputsOf = Callable[[str], Inputs]  # layer -> its inputs on real text


def cells_for(quantization: Quantization | None) -> Cells | None:
    """The classes of a network with quantized layers; None, for the plain ones, without quantization."""
    if quantization is None:
        return None
    output = quantization.kind if quantization.output_layer else "plain"
    return Cells(quantization.kind, partial(_embedding, dtype=quantization.embedding), output=output)


def _embedding(config: GLMConfig, dtype: str | None) -> nn.Cell:
    """The embedding, whose table may have another storage type than the other parameters."""
    return Embedding(dataclasses.replace(config, param_init_type=dtype or config.param_init_type))


def is_quantized(name: str, quantization: Quantization, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a parameter, of a network with these `shapes`, is the weight of a linear layer to quantize."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or len(shapes[name]) != 2:
        return False
    return module != OUTPUT_LAYER or quantization.output_layer


def replaced_shapes(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and type of the quantized parameters that replace weights of `shapes`, in their order."""
    found = {}
    for name, shape in shapes.items():
        if is_quantized(name, quantization, shapes):
            module, (rows, width) = name.removesuffix("weight"), shape
            found[module + WEIGHT], found[module + SCALE] = packed_shapes(rows, width, *quantization.numbers)
    return found


def quantized_weight(name: str, weight: np.ndarray, quantization: Quantization, inputs: Inputs | None = None) -> Packed:
    """The packed weight, of a weight [N, K] of a floating type or of bit patterns of bfloat16 (uint16).

    Outputs are quantized and packed some at a time, so that the integers of all are never in memory besides.

    Args:
        inputs: of the layer, see `glm_ms.quant.algorithms`.

    Raises:
        QuantizationError: values are too large for float16 scales; the message says `name`.
    """
    (rows, width), group = weight.shape, quantization.group
    data, scale = (np.empty(*kind) for kind in packed_shapes(rows, width, *quantization.numbers))
    for start in range(0, rows, _OUTPUTS):
        part = weight[start : start + _OUTPUTS]
        part = bfloat16_to_float32(part) if part.dtype == np.uint16 else part
        packed = _packed(name, part, quantization, inputs)
        place = start // PANEL
        data[place : place + len(packed.data)] = packed.data
        place = place if group else start  # scales of 8 bits are not in panels
        scale[place : place + len(packed.scale)] = packed.scale
    return Packed(data, scale, (rows, width), group)


def _packed(name: str, weight: np.ndarray, quantization: Quantization, inputs: Inputs | None) -> Packed:
    if quantization.bits == 8:
        return pack_int8(*quantize_int8(weight, inputs))
    q, scale = quantize_int4(weight, quantization.group, inputs)
    if not np.isfinite(scale).all():
        raise QuantizationError(f"{name}: has values too large for 4 bits with float16 scales; use 8 bits")
    return pack_int4(q, scale, quantization.group)


def quantized_parameters(
    parameters: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Quantization,
    inputs_of: InputsOf | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every parameter, those of linear layers quantized; one weight in memory at a time.

    Args:
        parameters: floating point, or bit patterns of bfloat16, of a network with these `shapes`.
        inputs_of: called with the name of each layer before it is quantized; None: without calibration.

    Raises QuantizationError as `quantized_weight`.
    """
    for name, value in parameters:
        if not is_quantized(name, quantization, shapes):
            yield name, value
            continue
        module = name.removesuffix("weight")
        inputs = None if inputs_of is None else inputs_of(module.removesuffix("."))
        packed = quantized_weight(name, value, quantization, inputs)
        del value
        yield module + WEIGHT, packed.data
        yield module + SCALE, packed.scale


def quantize_network(network: GLMNetwork, quantization: Quantization) -> None:
    """Replaces the linear layers of a network with weights, one after another; compiled graphs must be made anew.

    Raises:
        QuantizationError: the network is quantized already, has an adapter, or is split over cards.
    """
    linears = network.linears()
    for name, linear in linears.items():
        if isinstance(linear, QuantizedLinear):
            raise QuantizationError("this network is quantized already; load the weights again for other bits")
        if not isinstance(linear, Linear):
            raise QuantizationError(f"{name}: layers of a sharded network cannot be quantized; use parallel_mode: 0")
        if linear.lora is not None:
            raise QuantizationError("this network has an adapter; quantize it before the adapter is loaded")
    if network.transformer.prefix_encoder is not None:
        raise QuantizationError("this network has an adapter; quantize it before the adapter is loaded")
    for name, linear in linears.items():
        if name == OUTPUT_LAYER and not quantization.output_layer:
            continue
        packed = quantized_weight(f"{name}.weight", linear.weight.asnumpy(), quantization)
        _replace(network, name, linear, quantization, packed)


def _replace(network: GLMNetwork, name: str, linear: Linear, quantization: Quantization, packed: Packed) -> None:
    with no_init_parameters():
        cell = build_linear(
            quantization.kind, network.config, linear.in_features, linear.out_features, linear.bias is not None
        )
    if linear.bias is not None:
        cell.bias.set_data(Tensor(linear.bias.asnumpy(), linear.bias.dtype))
    cell.quantized.weight.set_data(Tensor(packed.data))
    cell.quantized.scale.set_data(Tensor(packed.scale))
    parent, _, place = name.rpartition(".")
    setattr(_cell_at(network, parent), place, cell)
    for ending, parameter in ((WEIGHT, cell.quantized.weight), (SCALE, cell.quantized.scale), ("bias", cell.bias)):
        if parameter is not None:
            parameter.name = f"{name}.{ending}"  # MindSpore has named it by its place in the parent


def _cell_at(network: nn.Cell, path: str) -> nn.Cell:
    cell = network
    for part in path.split("."):
        cell = cell[int(part)] if part.isdecimal() else getattr(cell, part)
    return cell
