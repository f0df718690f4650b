"""Records of text to rows of ids and labels, with NumPy alone."""

from __future__ import annotations

from glm_ms.data.adgen import AdgenDataset, AdgenEvalDataset
from glm_ms.data.order import epoch_order
from glm_ms.data.records import DataError, Record, RecordReader, read_records
from glm_ms.data.rows import IGNORED, Row, row_length

__all__ = [
    "IGNORED",
    "AdgenDataset",
    "AdgenEvalDataset",
    "DataError",
    "Record",
    "RecordReader",
    "Row",
    "epoch_order",
    "read_records",
    "row_length",
]
