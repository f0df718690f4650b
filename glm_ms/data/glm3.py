"""Preparation of conversations for ChatGLM3, as `finetune_hf.py` and the earlier `MultiTurnDataset` of its release
do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm_ms.data.conversations import Message, Messages
from glm_ms.data.records import Record
from glm_ms.data.rows import IGNORED, row_length

if TYPE_CHECKING:
    from glm_ms.tokenizer import ChatGLM3Tokenizer

_ROLES_WITHOUT_LOSS = ("system", "user")


def messages_of(record: Record) -> Messages:
    """The conversation of a record: user and assistant in turn."""
    messages = []
    for prompt, response in [*record.history, (record.prompt, record.response)]:
        messages.append(Message("user", prompt))
        messages.append(Message("assistant", response, loss=True))
    return tuple(messages)


def message_ids(tokenizer: ChatGLM3Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, unpadded and uncut.

    A message that bears loss does so from the token after its role token to the token that follows the message
    (the next role token, or </s>). Labels are not shifted.

    Raises:
        AssertionError: unknown role.
    """
    input_ids, in_loss = list(tokenizer.prefix_tokens), [False] * len(tokenizer.prefix_tokens)
    for message in messages:
        ids = tokenizer.build_single_message(message.role, message.metadata, message.content)
        input_ids += ids
        in_loss += [message.loss] * len(ids)
    input_ids.append(tokenizer.eos_token_id)
    in_loss.insert(0, False)
    return input_ids, [index if counts else IGNORED for index, counts in zip(input_ids, in_loss)]


def has_labels(tokenizer: ChatGLM3Tokenizer, messages: Sequence[Message], length: int) -> bool:
    """Whether `message_ids` cut to `length` has a label: a long prompt can push every label out of the row."""
    begin = len(tokenizer.prefix_tokens)
    for message in messages:
        if begin + 1 >= length:
            return False
        if message.loss:
            return True
        begin += len(tokenizer.build_single_message(message.role, message.metadata, message.content))
    return False


def answer_ids(
    tokenizer: ChatGLM3Tokenizer, messages: Sequence[Message], max_input_length: int
) -> list[tuple[list[int], list[int]] | None]:
    """For every message of the assistant that bears loss: the ids before it and `<|assistant|>`, and the ids of the
    message with </s>.

    None stands for a message with `max_input_length` ids or more before it.

    Raises:
        AssertionError: unknown role.
    """
    rows: list[tuple[list[int], list[int]] | None] = []
    input_ids = list(tokenizer.prefix_tokens)
    for message in messages:
        wanted = message.role == "assistant" and message.loss
        if len(input_ids) >= max_input_length:
            rows += [None] * wanted
            continue
        ids = tokenizer.build_single_message(message.role, message.metadata, message.content)
        if wanted:
            rows.append((input_ids + ids[:1], [*ids[1:], tokenizer.eos_token_id]))
        input_ids += ids
    return rows


def conversation_ids(
    tokenizer: ChatGLM3Tokenizer,
    conversation: Mapping[str, Any],
    max_input_length: int,
    max_output_length: int,
) -> tuple[list[int], list[int]]:
    """`message_ids` of a conversation for `finetune_hf.py`: assistant and observation bear loss.

    Args:
        conversation: `{"conversations": [{"role", "content"}, ...]}`, roles system, user, assistant,
            observation.
        max_input_length, max_output_length: ids are cut on the right to their sum and one.

    Raises:
        NotImplementedError: the conversation has tools or a tool message.
        AssertionError: unknown role.
    """
    length = row_length(max_input_length, max_output_length)
    input_ids, labels = message_ids(tokenizer, _messages(conversation))
    return input_ids[:length], labels[:length]


def conversation_eval_ids(
    tokenizer: ChatGLM3Tokenizer,
    conversation: Mapping[str, Any],
    max_input_length: int,
    max_output_length: int,
) -> list[tuple[list[int], list[int]]]:
    """`answer_ids` of a conversation for `finetune_hf.py`, without the messages that have too much before them.

    A message with its </s> is cut to `max_output_length` ids.

    Raises:
        NotImplementedError, AssertionError: as `conversation_ids`.
    """
    rows = answer_ids(tokenizer, _messages(conversation), max_input_length)
    return [(row[0], row[1][:max_output_length]) for row in rows if row is not None]


def _messages(conversation: Mapping[str, Any]) -> list[Message]:
    if conversation.get("tools") is not None:
        raise NotImplementedError("a conversation with 'tools' cannot be prepared; remove the field")
    messages = []
    for number, item in enumerate(conversation["conversations"]):
        if item["role"] == "tool":
            raise NotImplementedError(
                f"message {number} has role 'tool', which cannot be prepared; write the call as an assistant "
                "message and its result as an observation"
            )
        loss = item["role"] not in _ROLES_WITHOUT_LOSS
        messages.append(Message(item["role"], item["content"], loss=loss))
    return messages
