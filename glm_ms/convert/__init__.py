"""Checkpoints: read, checked against a config, converted and written as streams of single tensors."""

from __future__ import annotations

from glm_ms.convert.conversion import Conversion, parse_size, plan_conversion
from glm_ms.convert.dtypes import bfloat16_to_float32, convert_dtype, float32_to_bfloat16
from glm_ms.convert.names import expected_shapes, inverse_frequencies, split_joint, to_glm_name, to_hf_name
from glm_ms.convert.reader import CheckpointReader, check_names_and_shapes, load_parameters, open_checkpoint
from glm_ms.convert.writers import write_file, write_hf_folder
from glm_ms.storage.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Conversion",
    "bfloat16_to_float32",
    "check_names_and_shapes",
    "convert_dtype",
    "expected_shapes",
    "float32_to_bfloat16",
    "inverse_frequencies",
    "load_parameters",
    "open_checkpoint",
    "parse_size",
    "plan_conversion",
    "split_joint",
    "to_glm_name",
    "to_hf_name",
    "write_file",
    "write_hf_folder",
]
