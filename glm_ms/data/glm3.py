"""Preparation of conversations for ChatGLM3, as `finetune_hf.py` of its release does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm_ms.data.records import DataError, Record
from glm_ms.data.rows import IGNORED, Row, left_padded_row, row_length

if TYPE_CHECKING:
    from glm_ms.tokenizer import ChatGLM3Tokenizer

_ROLES_WITHOUT_LOSS = ("system", "user")


def conversation_of(record: Record) -> dict[str, Any]:
    """The conversation of a record: user and assistant in turn."""
    messages = []
    for prompt, response in [*record.history, (record.prompt, record.response)]:
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": response})
    return {"conversations": messages}


def conversation_ids(
    tokenizer: ChatGLM3Tokenizer,
    conversation: Mapping[str, Any],
    max_input_length: int,
    max_output_length: int,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, unpadded.

    A message of the assistant or an observation takes part in the loss from the token after its role token
    to the token that follows the message (the next role token, or </s>). Labels are not shifted.

    Args:
        conversation: `{"conversations": [{"role", "content"}, ...]}`, roles system, user, assistant,
            observation.
        max_input_length, max_output_length: ids are cut on the right to their sum and one.

    Raises:
        NotImplementedError: the conversation has tools or a tool message.
        AssertionError: unknown role.
    """
    input_ids, in_loss = list(tokenizer.prefix_tokens), [False] * len(tokenizer.prefix_tokens)
    for message in _messages(conversation):
        ids = tokenizer.build_single_message(message["role"], "", message["content"])
        input_ids += ids
        in_loss += [message["role"] not in _ROLES_WITHOUT_LOSS] * len(ids)
    input_ids.append(tokenizer.eos_token_id)
    in_loss.insert(0, False)
    labels = [index if counts else IGNORED for index, counts in zip(input_ids, in_loss)]
    length = row_length(max_input_length, max_output_length)
    return input_ids[:length], labels[:length]


def conversation_eval_ids(
    tokenizer: ChatGLM3Tokenizer,
    conversation: Mapping[str, Any],
    max_input_length: int,
    max_output_length: int,
) -> list[tuple[list[int], list[int]]]:
    """For every assistant message: the ids before it and `<|assistant|>`, and the ids of the message.

    The ids before it are cut to `max_input_length` on the right. A message that begins after
    `max_input_length` ids is left out, as in the reference. The message ends with </s> and is cut to
    `max_output_length` ids.

    Raises:
        NotImplementedError, AssertionError: as `conversation_ids`.
    """
    rows = []
    input_ids = list(tokenizer.prefix_tokens)
    for message in _messages(conversation):
        if len(input_ids) >= max_input_length:
            break
        ids = tokenizer.build_single_message(message["role"], "", message["content"])
        if message["role"] == "assistant":
            answer = [*ids[1:], tokenizer.eos_token_id]
            rows.append((input_ids[:max_input_length] + ids[:1], answer[:max_output_length]))
        input_ids += ids
    return rows


def train_row(
    tokenizer: ChatGLM3Tokenizer,
    record: Record,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
) -> Row:
    """`conversation_ids` of a record, padded on the left.

    Returns:
        int32 [max_source_length + max_target_length + 1] each.

    Raises:
        DataError: `ignore_pad_token_for_loss` is false, which the reference does not know.
    """
    if not ignore_pad_token_for_loss:
        raise DataError(
            "ignore_pad_token_for_loss = false is a setting of ChatGLM2; set it to true for ChatGLM3"
        )
    conversation = conversation_of(record)
    input_ids, labels = conversation_ids(tokenizer, conversation, max_source_length, max_target_length)
    length = row_length(max_source_length, max_target_length)
    return left_padded_row(input_ids, labels, length, tokenizer.pad_token_id)


def has_labels(
    tokenizer: ChatGLM3Tokenizer, record: Record, max_source_length: int, max_target_length: int
) -> bool:
    """Whether some answer is left in the row: source and target are cut together, so a long prompt can
    push every label out."""
    prompt = record.history[0][0] if record.history else record.prompt
    before = len(tokenizer.prefix_tokens) + len(tokenizer.build_single_message("user", "", prompt)) + 1
    return before < row_length(max_source_length, max_target_length)


def eval_row(
    tokenizer: ChatGLM3Tokenizer, record: Record, max_source_length: int, max_target_length: int
) -> tuple[list[int], list[int]] | None:
    """`conversation_eval_ids` of the last message of a record; None where the prompt is too long."""
    conversation = conversation_of(record)
    rows = conversation_eval_ids(tokenizer, conversation, max_source_length, max_target_length)
    return rows[-1] if len(rows) == len(record.history) + 1 else None


def _messages(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if conversation.get("tools") is not None:
        raise NotImplementedError("a conversation with 'tools' cannot be prepared; remove the field")
    messages = conversation["conversations"]
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            raise NotImplementedError(
                f"message {number} has role 'tool', which cannot be prepared; write the call as an assistant "
                "message and its result as an observation"
            )
    return messages
