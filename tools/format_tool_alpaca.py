"""Converts ToolAlpaca (train_data.json) to conversations with tools, for ToolAlpacaDataLoader.

    python tools/format_tool_alpaca.py --path train_data.json --output formatted_data/tool_alpaca.jsonl

Every instance becomes a line {"tools": [...], "conversations": [...]}, the form of finetune_chatmodel_demo of
ChatGLM3: `tools` is the documentation of the record, each step becomes the thought of the assistant and a message of
the role `tool`, and the answer of the assistant is the final thought and the output. The tool lists all records and
instances that it cannot convert, and then writes nothing, unless --skip_bad is given.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.data.records import checked_text, parse_tool_conversation, tool_call_problem
from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.atomic import atomic_output
from glm_ms.storage.errors import CheckpointError, DataError
from glm_ms.storage.json_lines import parse_value, raw_values

_INSTANCE_KEYS = ("input", "output", "Final Thought", "intermediate_steps")
# Under this key Function_Description explains types, not a function.
_COMPONENTS = "components"
# The function with which the agent of ToolAlpaca asks the user; it has no description.
_ASK_USER = "getDetails"
# Separates the thought from the call in a log.
_ACTION = re.compile(r"(?:ASSISTANT\s+)?Action\s*\d*\s*:")


class BadRecordError(ValueError):
    """A part of a record cannot be converted; the message has the reason."""


@dataclass
class Report:
    """Counts and errors of a conversion.

    Attributes:
        records, conversations: read and written.
        questions: steps that ask the user.
        bad: a line for each record or instance that cannot be converted.
    """

    records: int = 0
    conversations: int = 0
    questions: int = 0
    bad: list[str] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/format_tool_alpaca.py --path train_data.json",
    )
    parser.add_argument("--path", required=True, metavar="FILE", help="train_data.json of ToolAlpaca")
    parser.add_argument(
        "--output", default="formatted_data/tool_alpaca.jsonl", metavar="FILE", help="JSON lines (default: %(default)s)"
    )
    parser.add_argument("--skip_bad", action="store_true", help="list what cannot be converted, and skip it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one conversion; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    report, output = Report(), Path(options.output)
    try:
        if output.exists() and output.resolve() == Path(options.path).resolve():
            raise BadRecordError(f"{output}: is the input; choose another --output")
        whole = atomic_output(output, overwrite=options.overwrite, parents=True)
        with whole as partial, partial.open("w", encoding="utf-8") as file:
            write_conversations(Path(options.path), file, report)
            _check(report, options.skip_bad, options.path)
    except (BadRecordError, DataError, CheckpointError, OSError) as error:
        for line in report.bad:
            print(line, file=sys.stderr)
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for line in report.bad:
        print(line, file=sys.stderr)
    skipped = f", {len(report.bad)} malformed records or instances skipped" if report.bad else ""
    print(f"{output}: {report.conversations} conversations of {report.records} records{skipped}")
    if report.questions:
        print(
            f"{report.questions} steps call {_ASK_USER}, with which ToolAlpaca asks its user; the tools of a "
            "conversation do not describe it"
        )
    return 0


def _check(report: Report, skip_bad: bool, path: str) -> None:
    if report.bad and not skip_bad:
        raise BadRecordError(
            f"{path}: {len(report.bad)} malformed records or instances; correct them, or skip them with --skip_bad"
        )
    if not report.conversations:
        raise BadRecordError(f"{path}: has no conversation that can be converted")


def write_conversations(path: Path, file: TextIO, report: Report) -> None:
    """Streams over the records; writes a line for every instance and adds every error to `report`.

    Raises:
        DataError: the file cannot be read, or has an array that is not valid JSON.
    """
    for number, raw in enumerate(raw_values(path), start=1):
        place = f"{path}:{raw.line}: record {number}"
        report.records += 1
        try:
            value = parse_value(raw, path)
            tools, functions = _tools(value)
            name, instances = value["Name"], value["Instances"]
        except BadRecordError as error:
            report.bad.append(f"{place}: {error}")
            continue
        except DataError as error:  # a broken line; a broken array ends the loop
            report.bad.append(str(error))
            continue
        for instance_number, instance in enumerate(instances, start=1):
            where = f"{place} ({name}), instance {instance_number}"
            try:
                conversation = _conversation(instance, functions)
                record = {"tools": tools, "conversations": conversation}
                parse_tool_conversation(record, where)  # the output can be trained on
                line = checked_text(json.dumps(record, ensure_ascii=False), where)
            except BadRecordError as error:
                report.bad.append(f"{where}: {error}")
            except DataError as error:
                report.bad.append(str(error))
            else:
                report.conversations += 1
                report.questions += sum(message.get("name") == _ASK_USER for message in conversation)
                file.write(line + "\n")


def _tools(record: Any) -> tuple[list[str], set[str]]:
    """The documentation of the tools, and the names of their functions."""
    if not isinstance(record, dict):
        raise BadRecordError(f"must be an object with Name, Function_Description and Instances, found {_kind(record)}")
    _text(record, "Name")
    descriptions = _value(record, "Function_Description", dict)
    for name in descriptions:
        _text(descriptions, name, "Function_Description of ")
    _value(record, "Instances", list)
    functions = {name for name in descriptions if name != _COMPONENTS}
    documentation = record.get("NLDocumentation")
    if documentation is None:
        return [_documentation(descriptions)], functions
    return [_text(record, "NLDocumentation")], functions


def _documentation(descriptions: Mapping[str, str]) -> str:
    """NLDocumentation made of the descriptions as in ToolAlpaca, for records without it."""
    functions = "".join(f"{name}: {text}\n" for name, text in descriptions.items() if name != _COMPONENTS)
    components = descriptions.get(_COMPONENTS)
    return f"{functions}\n{components}\n" if components else functions


def _conversation(instance: Any, functions: set[str]) -> list[dict[str, Any]]:
    if not isinstance(instance, dict):
        raise BadRecordError(f"must be an object with {', '.join(_INSTANCE_KEYS)}, found {_kind(instance)}")
    if "error" in instance and "output" not in instance:
        raise BadRecordError(f"ToolAlpaca itself failed here: {str(instance['error'])[:100]}")
    messages: list[dict[str, Any]] = [{"role": "user", "content": _text(instance, "input")}]
    for number, step in enumerate(_value(instance, "intermediate_steps", list), start=1):
        try:
            messages += _step(step, functions)
        except BadRecordError as error:
            raise BadRecordError(f"step {number}: {error}") from None
    answer = f"{_text(instance, 'Final Thought')}\n{_text(instance, 'output')}"
    return [*messages, {"role": "assistant", "content": answer}]


def _step(step: Any, functions: set[str]) -> Iterator[dict[str, Any]]:
    shape = "[[action, action_input, log], observation]"
    if not isinstance(step, list) or len(step) != 2:
        raise BadRecordError(f"must be {shape}, found {_kind(step)}")
    call, observation = step
    if not isinstance(call, list) or len(call) != 3:
        raise BadRecordError(f"must be {shape}, found {_kind(call)} in place of the call")
    action, action_input, log = call
    for name, value in (("action", action), ("log", log)):
        if not isinstance(value, str):
            raise BadRecordError(f"{name} must be a string, found {_kind(value)}")
    if action not in functions and action != _ASK_USER:
        raise BadRecordError(
            f"function {action!r} is not in Function_Description, which has {', '.join(sorted(functions)) or 'none'}"
        )
    parameters = _parameters(action_input)
    yield {"role": "assistant", "content": _ACTION.split(log, maxsplit=1)[0].strip()}
    yield {"role": "tool", "name": action, "parameters": parameters, "observation": observation}


def _parameters(action_input: Any) -> dict[str, Any]:
    """The arguments of a call, an object or its JSON."""
    parameters = action_input
    if isinstance(action_input, str):
        try:
            parameters = json.loads(action_input)
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"action_input is not valid JSON: {error}: {action_input[:60]!r}") from None
    if not isinstance(parameters, dict):
        raise BadRecordError(f"action_input must be an object, found {_kind(parameters)}")
    problem = tool_call_problem(parameters)
    if problem:
        raise BadRecordError(f"action_input: {problem}")
    return parameters


def _value(holder: Mapping[str, Any], key: str, kind: type, of: str = "") -> Any:
    if key not in holder:
        raise BadRecordError(f"no key {key!r}")
    if not isinstance(holder[key], kind):
        wanted = {str: "a string", dict: "an object", list: "a list"}[kind]
        raise BadRecordError(f"{of}{key!r} must be {wanted}, found {_kind(holder[key])}")
    return holder[key]


def _text(holder: Mapping[str, Any], key: str, of: str = "") -> str:
    return _value(holder, key, str, of)


def _kind(value: Any) -> str:
    return f"{type(value).__name__}: {json.dumps(value, ensure_ascii=False)[:60]}"


if __name__ == "__main__":
    sys.exit(main())
