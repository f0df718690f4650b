"""How the user of the program that runs writes what a message names: an argument, a tool.

An argument has one name in the code and in Python; command lines call it `--model-generation`, `--model_generation` or
`model.pet_config.lora_alpha`. The parser of a program registers its own flags, so a message names the one that exists
there. Importing it takes no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

# Argument -> its other names, as parsers have them.
_ALSO = {
    "adapter": ("load_adapter",),
    "quantization_bit": ("quantize",),
    "target": ("to",),
    "num_samples": ("records",),
    "origin_columns": ("columns",),
}
_flags: dict[str, str] = {}
_commands: dict[str, str] = {}
_in_request: ContextVar[bool] = ContextVar("in_request", default=False)


@contextmanager
def of_program() -> Iterator[None]:
    """For the time that a program runs: what it registers is forgotten at the end."""
    before = dict(_flags), dict(_commands)
    try:
        yield
    finally:
        for table, old in zip((_flags, _commands), before):
            table.clear()
            table.update(old)


@contextmanager
def of_request() -> Iterator[None]:
    """For a request of a client, also in threads that work for it: its fields have the names of Python."""
    token = _in_request.set(True)
    try:
        yield
    finally:
        _in_request.reset(token)


def register_flags(flags: Mapping[str, str]) -> None:
    """Replaces the flags of the program: argument -> as its user writes it."""
    _flags.clear()
    _flags.update(flags)


def register_commands(commands: Mapping[str, str]) -> None:
    """Tool, the name of its file without `.py` -> the command that its user types."""
    _commands.update(commands)


def argument(name: str) -> str:
    """An argument as the user of this program writes it; `name` itself if the program has no such flag, as Python."""
    if _in_request.get():
        return name
    return next((_flags[one] for one in (name, *_ALSO.get(name, ())) if one in _flags), name)


def given(name: str, value: object = True) -> str:
    """An argument with a value, to be typed: `--lora-alpha 32`, `model.kv_cache=int8`; True: the flag alone."""
    flag = argument(name)
    if not flag.startswith("--"):
        return f"{flag}={value}"
    return flag if value is True else f"{flag} {value}"


def tool(name: str) -> str:
    """The command of a tool: `glm-ms merge-lora`, or `tools/merge_lora.py` for a user of the repository."""
    return _commands.get(name, f"tools/{name}.py")


def tool_call(name: str) -> str:
    """What starts a tool in a shell: `glm-ms merge-lora`, or `python tools/merge_lora.py`."""
    return _commands.get(name, f"python tools/{name}.py")


class _Tools:
    """The same for the fields of a format, `{tools[merge_lora]}`."""

    def __getitem__(self, name: str) -> str:
        return tool(name)


TOOLS = _Tools()
