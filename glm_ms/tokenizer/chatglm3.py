"""ChatGLM3: a prompt template of messages that begin with role tokens; tools and observations."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import parse_json
from glm_ms.tokenizer.answers import AnswerParser, ToolCallError, is_tool_name, parse_call, replace_training_date
from glm_ms.tokenizer.base import (
    CHAT,
    FOREIGN_CALLS,
    PLAIN,
    SentencePieceTokenizer,
    history_items,
    sequence_dict,
    tell_unknown_keys,
)

ROLES = ("system", "user", "assistant", "observation")
_MESSAGE_KEYS = ("role", "content", "metadata", "tools")
_ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
_ANSWER_TOKEN = "<|assistant|>"  # between the messages of one answer, too
_ROLE_SPLIT = re.compile("(" + "|".join(re.escape(token) for token in _ROLE_TOKENS) + ")")


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

    def add_answer(self, output: str, query: str, history: Sequence[Any] | None, role: str) -> tuple[Any, list[Any]]:
        """As of `process_response`."""
        earlier = [*(history or []), {"role": role, "content": query}]
        if self.template == CHAT:
            return self.process_response(output, earlier)
        answer = output.strip()
        return answer, [*earlier, {"role": "assistant", "content": answer}]

    def tools_of(self, history: Sequence[Mapping[str, Any]] | None) -> list[str]:
        if not history or history[0]["role"] != "system":
            return []
        return tool_names(checked_tools(history[0].get("tools")))

    def answer_parser(self, tools: Iterable[str] = ()) -> AnswerParser:
        return AnswerParser(tools, _ANSWER_TOKEN) if self.template == CHAT else super().answer_parser(tools)

    def process_response(self, output: str, history: Sequence[Mapping[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        """Splits an answer of the model into messages.

        Args:
            output: decoded answer, without the `<|assistant|>` before it and without stop tokens.
            history: messages so far with the question. It is not changed.

        Returns:
            The answer and the history with the new messages. The answer is a text, the last one if there are several;
            or, if the model calls a tool, `{"name", "parameters"}` (tools given in the first, system, message) or
            `{"name", "content"}` (code to run); or a list of such calls. A message is a call if its first line is the
            name of a tool or a word, as `interpreter`, and with tools a code fence follows the word; in the reference,
            if the first line is not blank.

        Raises:
            AssertionError: unknown role in `history`.
            ValueError: `history` is not a list of messages.

        Warns:
            UserWarning: a call is not `tool_call(name=value, ...)` with plain values. It is text of the answer then.
        """
        messages: list[Any] = copy.deepcopy(_messages(history))
        tools = messages[0].get("tools") if messages and messages[0]["role"] == "system" else None
        names, text = tool_names(tools), ""
        calls: list[dict[str, Any]] = []
        for part in output.split(_ANSWER_TOKEN):
            metadata, line_break, content = part.partition("\n")
            name = metadata.strip()
            is_call = name in names or (is_tool_name(name) and (tools is None or content.lstrip().startswith("```")))
            if not line_break or not is_call:
                text = part.strip()
                blank = metadata if line_break and not name else ""
                messages.append({"role": "assistant", "metadata": blank, "content": text})
                continue
            messages.append({"role": "assistant", "metadata": metadata, "content": content})
            try:
                call = {"content": content} if tools is None else {"parameters": parse_call(content)}
                calls.append({"name": name, **call})
            except ToolCallError as error:
                text = part.strip()
                warnings.warn(f"the answer is text, because the call in it cannot be read: {error}", stacklevel=2)
        answer = calls[0] if len(calls) == 1 else calls or replace_training_date(text)
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
        tell_unknown_keys(item, _MESSAGE_KEYS, place)
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


def tool_names(tools: list[Any] | Mapping[str, Any] | None) -> list[str]:
    """Names in the tools of a system message, of `checked_tools`; those without a name are left out.

    A tool is `{"name": ...}`, `{"function": {"name": ...}}` as OpenAI writes it, or a name. Instead of a list there may
    be one tool, or an object with the names as keys.
    """
    if isinstance(tools, Mapping):
        is_tool = isinstance(tools.get("name"), str) or isinstance(tools.get("function"), Mapping)
        tools = [tools] if is_tool else list(tools)
    names = []
    for tool in tools or []:
        if isinstance(tool, Mapping):
            inner = tool.get("function")
            tool = (inner if isinstance(inner, Mapping) else tool).get("name")
        if isinstance(tool, str):
            names.append(tool)
    return names


def tools_json(tools: Any) -> str:
    """Tools as the released model was trained on them."""
    return json.dumps(tools, indent=4, ensure_ascii=False)
