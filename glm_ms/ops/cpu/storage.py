"""Types of keys and values in the memory of the decoder. Importing it loads neither MindSpore nor NumPy."""

from __future__ import annotations

# Type -> its number in the tables of the operators (`Run` in src/call.h), bytes of an item.
STORAGE = {"float32": (0, 4), "bfloat16": (1, 2), "int8": (2, 1)}
