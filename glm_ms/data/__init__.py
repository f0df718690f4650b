"""Records of text to rows of ids and labels, with NumPy alone."""

from __future__ import annotations

from glm_ms.data.adgen import AdgenDataset, AdgenEncoder, AdgenEvalDataset
from glm_ms.data.cache import CacheRequest
from glm_ms.data.chat import (
    ConversationEncoder,
    ToolAlpacaEncoder,
)
from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.encoder import Encoder
from glm_ms.data.loaders import section_encoder
from glm_ms.data.order import epoch_order
from glm_ms.data.records import Record, RecordReader, read_records
from glm_ms.data.rows import IGNORED, Row, row_length
from glm_ms.storage.errors import DataError

__all__ = [
    "IGNORED",
    "AdgenDataset",
    "AdgenEncoder",
    "AdgenEvalDataset",
    "CacheRequest",
    "ConversationEncoder",
    "DataError",
    "Encoder",
    "EvalDataset",
    "Record",
    "RecordReader",
    "Row",
    "ToolAlpacaEncoder",
    "TrainDataset",
    "epoch_order",
    "read_records",
    "row_length",
    "section_encoder",
]
