"""The call a ChatGLM3 answer makes to a tool: Python syntax, read without running it."""

from __future__ import annotations

import ast
from typing import Any


class ToolCallError(ValueError):
    """The model wrote something that is not a call with plain values."""


def parse_tool_call(code: str) -> dict[str, Any]:
    """Arguments of `tool_call(city='Beijing', days=3)` as a dict.

    Values may be strings, numbers, True, False, None, and lists, tuples, sets and dicts of them.

    Raises:
        ToolCallError: another syntax, another function, positional or repeated arguments, computed values.
    """
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call":
            names = [keyword.arg for keyword in call.keywords]
            if not call.args and None not in names and len(set(names)) == len(names):
                return {name: ast.literal_eval(keyword.value) for name, keyword in zip(names, call.keywords)}
    # Deep nesting exhausts the parser's stack: RecursionError or MemoryError by Python version.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise ToolCallError(f"not a call tool_call(name=value, ...) with plain values: {code[:200]!r}")
