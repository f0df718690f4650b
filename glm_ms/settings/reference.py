"""Writes the page `docs/settings.md` from the declarations: python -m glm_ms.settings.reference > docs/settings.md."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from glm_ms.settings.errors import joined
from glm_ms.settings.schema import FLAGS, Settings, allowed, default_of, keys_of, leaf_keys, used_with
from glm_ms.settings.values import LIMITS, expected_type

_HEAD = """# Settings

Every key of a configuration. This page is generated from the declarations in `glm_ms/settings/schema.py`:
`python -m glm_ms.settings.reference > docs/settings.md`.

A key is set in the YAML file, or on the command line as `key.sub=value`, which takes precedence. Frequently used keys
also have a flag. `python run_glm.py --help` lists the flags, `--help_keys` the keys.
"""


def reference() -> str:
    """The page."""
    return _HEAD + "".join(_section(Settings, "", "keys outside of sections"))


def keys_help() -> str:
    """The text of --help_keys: each key, its default and its documentation."""
    keys = leaf_keys().items()
    return "".join(f"{name} = {_default(item)}\n    {item.metadata['doc']}\n" for name, item in keys)


def _section(kind: type, path: str, doc: str) -> Iterator[str]:
    hints, flags = get_type_hints(kind), {flag.key: f"; flag `--{name}`" for name, flag in FLAGS.items()}
    leaves = [item for item in keys_of(kind) if not dataclasses.is_dataclass(hints[item.name])]
    if leaves:
        yield f"\n## {f'`{path}`' if path else 'Top level'}\n\n{doc[:1].upper()}{doc[1:]}.\n\n"
        yield "| key | default | values | meaning |\n|---|---|---|---|\n"
    for item in leaves:
        meaning = item.metadata["doc"]
        if "used_with" in item.metadata:
            other, values = used_with(item)
            meaning += f" (with `{other}` {' or '.join(f'`{value}`' for value in values)})"
        meaning += flags.get(joined(path, item.name), "")
        row = (f"`{item.name}`", f"`{_default(item)}`", _values(hints[item.name], item), meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n"
    for item in keys_of(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _section(hints[item.name], joined(path, item.name), item.metadata["doc"])


def _values(hint: Any, item: dataclasses.Field) -> str:
    """The allowed values of a key in words."""

    def listed(values: Iterable[Any]) -> str:
        return ", ".join(f"`{value}`" for value in values)

    rules = item.metadata
    inner = [kind for kind in (get_args(hint) if get_origin(hint) is Union else (hint,)) if kind is not type(None)]
    if "choices" in rules:
        words = f"{'one or several of ' if rules.get('or_one') else ''}{listed(allowed(item))}"
    else:
        types = (listed(get_args(kind)) if get_origin(kind) is Literal else expected_type(kind) for kind in inner)
        words = " or ".join(types)
    words += "".join(f", {LIMITS[rule][0]} {rules[rule]}" for rule in LIMITS if rule in rules)
    words += f", {' or '.join(map(str, rules['length']))} values" if "length" in rules else ""
    words += f" such as `{rules['example']}`" if "example" in rules else ""
    return f"{words}, or null" if type(None) in get_args(hint) else words


def _default(item: dataclasses.Field) -> str:
    """The default of a key as YAML."""
    value = default_of(item)
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if value is None:
        return "null"
    return '""' if value == "" else str(value)


if __name__ == "__main__":
    sys.stdout.write(reference())
