"""Weight-only quantization: how many bits, in which groups. Importing it loads no MindSpore.

Weights of linear layers become integers of 8 or 4 bits with scales; activations, norms, biases and the embedding keep
their types. `glm_ms.ops.packing` defines the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm_ms.storage.errors import CheckpointError

BITS = (8, 4)
GROUPS = (32, 64, 128)  # those of `glm_ms.ops.packing`, which needs NumPy
DEFAULT_GROUP = 32


class QuantizationError(CheckpointError):
    """Weights cannot be quantized as asked, or quantized ones cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a network are quantized; always symmetric, without zero points.

    Attributes:
        bits: 8 or 4.
        group: inputs that share a scale, for 4 bits one of `GROUPS`; 0 for 8 bits: all inputs of an output share one.
        output_layer: the output layer is quantized too; the official files of ChatGLM2 and ChatGLM3 leave it as it is.
        embedding: storage type of the embedding, a floating one; None: that of the other parameters.

    Raises:
        QuantizationError: a value that is not allowed.
    """

    bits: int
    group: int = 0
    output_layer: bool = True
    embedding: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise QuantizationError(f"quantization: {self.bits!r} bits: must be 8 or 4")
        if self.bits == 8 and self.group != 0:
            raise QuantizationError(
                f"quantization: group {self.group} with 8 bits: groups are for 4 bits; leave the group out"
            )
        if self.bits == 4 and self.group not in GROUPS:
            raise QuantizationError(f"quantization: group {self.group}: must be one of {', '.join(map(str, GROUPS))}")

    @property
    def kind(self) -> str:
        """Kind of the linear layers: a key of `glm_ms.model.layers.LINEARS`."""
        return "int8" if self.bits == 8 else f"int4-group{self.group}"

    @property
    def numbers(self) -> tuple[int, int]:
        """Bits and group, which decide about the values."""
        return self.bits, self.group

    def __str__(self) -> str:
        return "int8, a scale for each output" if self.bits == 8 else f"int4, a scale for {self.group} inputs"


def from_flags(bits: int | None, group: int | None) -> Quantization | None:
    """What --quantize and --quantize-group ask for; raises QuantizationError for a group without 4 bits."""
    if group is not None and bits != 4:
        raise QuantizationError(f"--quantize-group {group}: is for --quantize 4 only; remove it")
    return None if bits is None else quantization(bits, group)


def quantization(bits: int, group: int | None = None) -> Quantization:
    """The `Quantization` of a number of bits and a group; None or 0: `DEFAULT_GROUP` for 4 bits."""
    return Quantization(bits, group or (DEFAULT_GROUP if bits == 4 else 0))
