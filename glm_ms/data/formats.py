"""The data formats: `data_loader.type` of a configuration -> how its records are read and encoded.

A new format is a reader, with an encoder if none of the existing ones fits, in a file of its own and a line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from glm_ms.data.encoder import Columns, Encoder, Reader
from glm_ms.data.messages import ConversationEncoder, ToolAlpacaEncoder
from glm_ms.data.records import (
    other_columns,
    other_keys,
    parse_conversation,
    parse_tool_conversation,
    read_prompt_and_answer,
)


@dataclass(frozen=True)
class DataFormat:
    """One format of records."""

    read: Reader
    encoder: type[Encoder] | None = None  # None for prompt and answer, which the model family encodes
    unused_keys: tuple[str, ...] = ()  # of a section, without effect
    # (value that `read` takes, columns) -> names in it that have no effect, for one line to the user
    left_out: Callable[[Any, Columns], Iterable[str]] = lambda value, columns: ()

    @property
    def uses_max_seq_length(self) -> bool:
        """See `Encoder`."""
        return self.encoder is not None and self.encoder.uses_max_seq_length


_COLUMNS = tuple(
    f"data_loader.{name}" for name in ("origin_columns", *(f"{kind}_column" for kind in Columns._fields[2:]))
)
FORMATS: dict[str, DataFormat] = {
    "ADGenDataLoader": DataFormat(read_prompt_and_answer, left_out=other_columns),
    "ConversationDataLoader": DataFormat(parse_conversation, ConversationEncoder, _COLUMNS, other_keys),
    "ToolAlpacaDataLoader": DataFormat(
        parse_tool_conversation,
        ToolAlpacaEncoder,
        (*_COLUMNS, "max_source_length", "max_target_length"),
        other_keys,
    ),
}


def formats_with_max_seq_length() -> tuple[str, ...]:
    """The formats whose rows have `max_seq_length` ids."""
    return tuple(name for name, data_format in FORMATS.items() if data_format.uses_max_seq_length)
