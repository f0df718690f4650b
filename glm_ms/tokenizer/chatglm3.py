"""ChatGLM3: a prompt template of messages that begin with role tokens; tools and observations."""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import parse_json
from glm_ms.tokenizer.base import (
    CHAT,
    FOREIGN_CALLS,
    PLAIN,
    SentencePieceTokenizer,
    history_items,
    replace_training_date,
    sequence_dict,
)

ROLES = ("system", "user", "assistant", "observation")
_ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
_ROLE_SPLIT = re.compile("(" + "|".join(re.escape(token) for token in _ROLE_TOKENS) + ")")


class ToolCallError(ValueError):
    """An answer of the model is not a tool call with plain values."""


class ChatGLM3Tokenizer(SentencePieceTokenizer):
    """Tokenizer of ChatGLM3-6B.

    Args:
        vocab_file, template, padding_side, truncation_side: as of `SentencePieceTokenizer`.
        encode_special_tokens: `tokenize`, `encode` and a call turn text that spells role tokens into role tokens. For
            trusted text only. It has no effect on chat messages.
    """

    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLE_TOKENS)
    roles = ROLES
    # </s>, or the beginning of a message of another role.
    stop_tokens = ("<eos>", "<|user|>", "<|observation|>")

    options = (*SentencePieceTokenizer.options, "encode_special_tokens")

    def __init__(
        self,
        vocab_file: str | Path,
        encode_special_tokens: bool = False,
        template: str = CHAT,
        padding_side: str = "left",
        truncation_side: str = "right",
    ) -> None:
        super().__init__(vocab_file, template, padding_side, truncation_side)
        self.encode_special_tokens = encode_special_tokens

    def _special_piece(self, index: int) -> str:
        return self.special_tokens[index - self._num_pieces] if index < self.vocab_size else ""

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text; with `encode_special_tokens` role tokens are pieces of their own."""
        if not self.encode_special_tokens:
            return super().tokenize(text)
        pieces: list[str] = []
        for part in _ROLE_SPLIT.split(text):
            pieces += [part] if part in _ROLE_TOKENS else super().tokenize(part)
        return pieces

    def _text_ids(self, text: str) -> list[int]:
        if not self.encode_special_tokens:
            return self._piece_ids(text)
        ids = []
        for part in _ROLE_SPLIT.split(text):
            ids += [self.get_command(part)] if part in _ROLE_TOKENS else self._piece_ids(part)
        return ids

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        r"""Ids of one message: `<|role|>`, then `metadata\n`, then the message.

        Args:
            role: system, user, assistant or observation.
            metadata: "" or the name of the tool that an assistant message calls.

        Raises:
            AssertionError: unknown role (the type the reference raises).
        """
        _check_role(role)
        ids = [self.get_command(f"<|{role}|>")]
        return ids + self._piece_ids(f"{metadata}\n") + self._piece_ids(message)

    def build_chat_input(
        self, query: str, history: Sequence[Mapping[str, Any]] | None = None, role: str = "user"
    ) -> dict[str, list[int]]:
        """Ids of a conversation, ending with the `<|assistant|>` that opens the answer.

        Args:
            query: the new message.
            history: messages `{"role", "content"}`, optionally with `metadata`; a system message may have `tools`,
                a list or the JSON text of one, which are appended to it as JSON.
            role: role of the new message.

        Raises:
            AssertionError: unknown role.
            ValueError: a history that is not a list of such messages.
        """
        if self.template == PLAIN:
            return self._plain_input(query, history, role)
        ids = list(self.prefix_tokens)
        for item in _messages(history):
            content = item["content"]
            if item["role"] == "system" and item.get("tools") is not None:
                content += "\n" + tools_json(item["tools"])
            ids += self.build_single_message(item["role"], item.get("metadata") or "", content)
        ids += self.build_single_message(role, "", query)
        ids.append(self.get_command("<|assistant|>"))
        return sequence_dict(ids)

    def process_response(
        self, output: str, history: Sequence[Mapping[str, Any]]
    ) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
        """Splits an answer of the model into messages.

        Args:
            output: decoded answer, without the `<|assistant|>` before it and without stop tokens.
            history: messages so far with the question. It is not changed.

        Returns:
            The answer and the history with the new messages. The answer is a text; or, if the model calls a tool,
            `{"name", "parameters"}` (tools given in the first, system, message) or `{"name", "content"}` (code to run).

        Raises:
            AssertionError: unknown role in `history`.
            ToolCallError: the text of a tool call is not `tool_call(name=value, ...)` with plain values.
            ValueError: `history` is not a list of messages.
        """
        messages: list[Any] = copy.deepcopy(_messages(history))
        has_tools = bool(messages) and messages[0]["role"] == "system" and messages[0].get("tools") is not None
        answer: str | dict[str, Any] = ""
        for part in output.split("<|assistant|>"):
            metadata, line_break, content = part.partition("\n")
            if not line_break:
                metadata, content = "", part
            name = metadata.strip()
            if not name:
                content = content.strip()
            messages.append({"role": "assistant", "metadata": metadata, "content": content})
            if not name:
                answer = replace_training_date(content)
            elif has_tools:
                code = "\n".join(content.split("\n")[1:-1])  # less the ```python fence
                answer = {"name": name, "parameters": parse_tool_call(code)}
            else:
                answer = {"name": name, "content": content}
        return answer, messages

    def _encode_template_body(self, body: str) -> list[int]:
        r"""Ids of `<|role|> metadata\n message` one after the other; the last role token may have no message."""
        opening, *parts = _ROLE_SPLIT.split(body)
        ids = self._piece_ids(opening)
        for i in range(0, len(parts), 2):
            token, text = parts[i : i + 2]
            metadata, line_break, message = text.partition("\n")
            if line_break:
                metadata, message = self._without_space(metadata), self._without_space(message)
                ids += self.build_single_message(token[2:-2], metadata, message)
            elif i + 2 == len(parts) and not text.strip(" "):
                ids.append(self.get_command(token))
            else:
                raise ValueError(f"{(token + text)[:40]!r}: a message is written '{token} \\n text'")
        return ids


def _check_role(role: Any) -> None:
    if role not in ROLES:
        raise AssertionError(f"role = {role!r}: must be one of {', '.join(ROLES)}")


def _messages(history: Any) -> list[dict[str, Any]]:
    """The messages of a history; those with `tools` have them as a list or mapping, or None.

    Raises:
        AssertionError: unknown role (the type the reference raises).
        ValueError: anything else, for example pairs of ChatGLM2, or calls in the form of other models.

    Tools in a message that is not of the system have no effect in the reference; a warning names them.
    """
    messages = []
    for number, item in enumerate(history_items(history, "messages with role and content")):
        place = f"history[{number}]"
        if not isinstance(item, Mapping) or not isinstance(item.get("content"), str) or "role" not in item:
            raise ValueError(f"{place} = {item!r:.80}: must be a mapping with role and content, a text")
        if not isinstance(item.get("metadata"), (str, type(None))):
            raise ValueError(f"{place}: metadata = {item['metadata']!r:.80}: must be a text")
        for key in FOREIGN_CALLS:
            if item.get(key):
                raise ValueError(f"{place}: {key!r} is not known; a call is a message with the tool's name as metadata")
        _check_role(item["role"])
        message = dict(item)
        if "tools" in item:
            if item["role"] != "system" and item["tools"]:
                warnings.warn(
                    f"{place}: tools belong to a system message; in one of the {item['role']} they have no effect",
                    stacklevel=3,
                )
            try:
                message["tools"] = checked_tools(item["tools"])
            except ValueError as error:
                raise ValueError(f"{place}: tools {error}") from None
        messages.append(message)
    return messages


def checked_tools(tools: Any) -> list[Any] | Mapping[str, Any] | None:
    """Tools of a system message, parsed if they are JSON text; None for null or empty text.

    Raises:
        ValueError: neither a list of objects or names nor an object. The message follows the name of the value.
    """
    if tools is None or tools == "":
        return None
    if isinstance(tools, str):
        tools = _parsed(tools)
    if isinstance(tools, (list, tuple)):
        tools = [_parsed(tool) if isinstance(tool, str) and tool.lstrip().startswith("{") else tool for tool in tools]
        if all(isinstance(tool, Mapping) or (isinstance(tool, str) and tool.strip()) for tool in tools):
            return tools
    if not isinstance(tools, Mapping):
        raise ValueError(f"must be a list of objects, one for each tool, found {tools!r:.60}")
    return tools


def _parsed(text: str) -> Any:
    try:
        return parse_json(text, "")
    except FileError as error:
        reason = str(error).partition(": ")[2]  # without the place
        raise ValueError(f"must be a list of objects, or the JSON text of one, found {text!r:.60}; {reason}") from None


def tools_json(tools: Any) -> str:
    """Tools as the released model was trained on them."""
    return json.dumps(tools, indent=4, ensure_ascii=False)


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
                return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    # Deep nesting exhausts the parser's stack: RecursionError or MemoryError by Python version.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise ToolCallError(f"not a call tool_call(name=value, ...) with plain values: {code[:200]!r}")
