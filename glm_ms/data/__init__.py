"""Records of text to rows of ids and labels, with NumPy alone.

`formats.FORMATS` has the formats of records; `glm_ms.families.build_encoder` combines one with a tokenizer.
"""

from __future__ import annotations

from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import EvalDataset, TrainDataset, epoch_order
from glm_ms.data.encoder import Encoder
from glm_ms.data.formats import FORMATS, DataFormat
from glm_ms.data.rows import IGNORED, Row, row_length
from glm_ms.storage.errors import DataError

__all__ = [
    "FORMATS",
    "IGNORED",
    "CacheRequest",
    "DataError",
    "DataFormat",
    "Encoder",
    "EvalDataset",
    "Row",
    "TrainDataset",
    "epoch_order",
    "row_length",
]
