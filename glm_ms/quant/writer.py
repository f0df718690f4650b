"""Writes checkpoints of quantized weights, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glm_ms.convert.conversion import Conversion, plan_conversion
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.safetensors_file import write_header, write_tensor
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.convert.writers import check_space, copy_files
from glm_ms.model.config import FLOAT_TYPES
from glm_ms.quant import Quantization
from glm_ms.quant.checkpoint import EMBEDDING, description
from glm_ms.quant.network import InputsOf, is_quantized, quantized_parameters, replaced_shapes
from glm_ms.storage.atomic import atomic_output

WEIGHTS = "model.safetensors"
# Packed weights begin at multiples of it, as caches and vector loads like it.
_ALIGNMENT = 64


@dataclass(frozen=True)
class QuantizedCopy:
    """A checkpoint that can be quantized, after all checks of names, shapes and types; `run` writes the copy.

    The output is a folder with `config.json`, which has a section `quantization`, one `model.safetensors`, and the
    files of the tokenizer. Its tensors are the parameters of the quantized network under their names: packed weights,
    which programs map into memory, the embedding as in the input, all else float32.

    Attributes:
        conversion: the input, the output and its configuration.
        quantization: how to quantize.
    """

    conversion: Conversion
    quantization: Quantization

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the output, in its order."""
        shapes, found = self.conversion.shapes, dict[str, TensorInfo]()
        replaced = iter(replaced_shapes(shapes, self.quantization).items())
        for name, shape in shapes.items():
            if is_quantized(name, self.quantization, shapes):
                for _ in range(2):
                    packed, (packed_shape, dtype) = next(replaced)
                    found[packed] = TensorInfo(packed_shape, dtype)
            else:
                found[name] = TensorInfo(shape, self._stored_as(name))
        return found

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(info.nbytes for info in self.tensors.values())

    def run(
        self, inputs_of: InputsOf | None = None, on_tensor: Callable[[str, int], None] = lambda name, size: None
    ) -> None:
        """Reads, quantizes and writes the tensors one by one.

        Args:
            inputs_of: `glm_ms.quant.calibration.Calibration.inputs_of` of the input.
            on_tensor: called with the name and the bytes of each tensor that is written.

        Raises:
            CheckpointError: a tensor cannot be read or quantized, or the output cannot be written, which then
                does not change.
        """
        plan, tensors = self.conversion, self.tensors
        document = dataclasses.replace(plan.config, param_init_type="float32").to_hf_dict()
        document["quantization"] = description(self.quantization)
        with plan.reader, atomic_output(plan.output, folder=True, overwrite=plan.overwrite, parents=True) as work:
            check_space(work, plan.output, self.total_bytes)
            read = ((name, plan.reader.read(name, self._read_as(name), mapped=True)) for name in plan.shapes)
            with (work / WEIGHTS).open("xb") as file:
                write_header(file, tensors, {"format": "ms"}, _ALIGNMENT)
                for name, array in quantized_parameters(read, plan.shapes, self.quantization, inputs_of):
                    write_tensor(file, array)
                    on_tensor(name, array.nbytes)
                    del array
            (work / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            copy_files(plan.extra_files, work)

    def _stored_as(self, name: str) -> str:
        return self.quantization.embedding or "float32" if name == EMBEDDING else "float32"

    def _read_as(self, name: str) -> str:
        """Weights to quantize are read as they are stored: in float32 they would take twice the memory."""
        if is_quantized(name, self.quantization, self.conversion.shapes):
            stored = self.conversion.reader.dtype(name)
            return stored if stored in ("float16", "bfloat16") else "float32"
        return self._stored_as(name)


def plan_quantization(
    source: str | Path, output: str | Path, quantization: Quantization, config: str | Path | None = None,
    overwrite: bool = False
) -> QuantizedCopy:  # fmt: skip
    """Opens the input and checks names, shapes, types and the output; arguments and errors as of `plan_conversion`.

    The tensors have the order of the network, in which a calibration knows the inputs of its layers.
    """
    plan = plan_conversion(source, output, config=config, dtype="float32", target="hf", overwrite=overwrite)
    plan = dataclasses.replace(plan, shapes={name: plan.shapes[name] for name in expected_shapes(plan.config)})
    stored = plan.reader.dtype(EMBEDDING)
    embedding = stored if stored in FLOAT_TYPES else "float32"
    return QuantizedCopy(plan, dataclasses.replace(quantization, embedding=embedding))
