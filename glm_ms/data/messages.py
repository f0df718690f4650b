"""Messages with roles as the scripts of ChatGLM3-6B prepare them: `finetune_hf.py`, earlier `MultiTurnDataset`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glm_ms.data.encoder import SHORTEST_PROMPT, Encoder, EvalRow, Lengths, Message, Messages
from glm_ms.data.rows import IGNORED, left_padded_row, right_padded_row

if TYPE_CHECKING:
    from glm_ms.tokenizer import ChatGLM3Tokenizer


class MessageEncoder(Encoder):
    """Messages one after the other, cut together on the right to the length of a row, padded on the left.

    Prompts to generate from are the ids before an answer and `<|assistant|>`, one for every message of the assistant
    with loss; the reference is the message and </s>. An answer with `max_source_length` ids or more before it has no
    prompt.
    """

    needs_roles = True
    layout = staticmethod(left_padded_row)
    tokenizer: ChatGLM3Tokenizer

    def has_labels(self, record: Messages) -> bool:  # a long prompt can push every label out of the row
        begin = len(self.tokenizer.prefix_tokens)
        for message in record:
            if message.loss or begin + 1 >= self.seq_length:
                return begin + 1 < self.seq_length
            begin += len(_message(self.tokenizer, message))
        return False

    def train_ids(self, record: Messages) -> tuple[list[int], list[int]]:
        input_ids, labels = message_ids(self.tokenizer, record)
        return input_ids[: self.seq_length], labels[: self.seq_length]

    def lengths(self, record: Messages) -> Lengths:
        labels = message_ids(self.tokenizer, record)[1]
        kept = labels[: self.seq_length]
        answer, kept_answer = (sum(label != IGNORED for label in part) for part in (labels, kept))
        return Lengths(len(labels) - answer, answer, len(kept) - kept_answer, kept_answer)

    def limits(self) -> dict[str, tuple[str, int]]:
        return {"whole": ("max_source_length + max_target_length + 1", self.seq_length)}

    def eval_rows(self, record: Messages) -> list[EvalRow | None]:
        rows: list[EvalRow | None] = []
        input_ids = list(self.tokenizer.prefix_tokens)
        for message in record:
            wanted = message.role == "assistant" and message.loss
            if len(input_ids) >= self._max_source_length:
                rows += [None] * wanted
                continue
            ids = _message(self.tokenizer, message)
            if wanted:
                prompt = input_ids + ids[:1]
                longest = min(self._max_target_length, self.seq_length - len(prompt))
                answer = [*ids[1:], self.tokenizer.eos_token_id][:longest]
                # All that the model reads: the last question alone would not explain an answer.
                rows.append(EvalRow(self.tokenizer.decode(prompt), prompt, answer))
            input_ids += ids
        return rows


class LastAnswerEncoder(MessageEncoder):
    """Prompt and answer for ChatGLM3; of a record with a history, evaluation takes the last answer."""

    def eval_rows(self, record: Messages) -> list[EvalRow | None]:
        row = super().eval_rows(record)[-1]
        return [None if row is None else row._replace(prompt=record[-2].content)]


class ConversationEncoder(MessageEncoder):
    """Conversations as `finetune_hf.py` of ChatGLM3 prepares them."""

    stop_tokens = ("<|assistant|>",)
    no_labels = "with no answer within max_source_length + max_target_length + 1 tokens; raise one of them"
    too_long = "with more before the answer than max_source_length allows for; raise it"

    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        # Training uses the sum only; the length of the answer stays as it is, if it fits.
        answer = min(self._max_target_length, seq_length - SHORTEST_PROMPT - 1)
        return {"max_source_length": seq_length - answer - 1, "max_target_length": answer}

    def identity(self) -> dict[str, Any]:
        return {"data_loader": self.data_loader, "seq_length": self.seq_length}


class ToolAlpacaEncoder(MessageEncoder):
    """Conversations with tools and loss flags as `MultiTurnDataset` (finetune_chatmodel_demo) prepares them.

    Rows have `max_seq_length` ids and are padded on the right. `max_prompt_length`, one less than a row by default,
    limits the ids before an answer, `<|assistant|>` included.
    """

    uses_max_seq_length = True
    # A thought before a tool call is one message, and the call the next: both are the assistant's.
    stop_tokens = ("<|assistant|>",)
    layout = staticmethod(right_padded_row)
    no_labels = "with nothing to learn within max_seq_length tokens (raise it), or with loss: false throughout"
    too_long = (
        "with so much before the answer that max_seq_length leaves no room for generation.max_new_tokens; "
        "raise the former or lower the latter"
    )

    def limits(self) -> dict[str, tuple[str, int]]:
        return {"whole": ("max_seq_length", self.seq_length)}

    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        return {"max_seq_length": seq_length}

    def identity(self) -> dict[str, Any]:
        return {"data_loader": self.data_loader, "max_seq_length": self.seq_length}


def message_ids(tokenizer: ChatGLM3Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and labels of messages, unpadded and uncut.

    A message with loss has it from the token after its role token to the token that follows the message (the next
    role token, or </s>), because the model predicts the next role token, too. Labels are not shifted.
    """
    input_ids, in_loss = list(tokenizer.prefix_tokens), [False] * len(tokenizer.prefix_tokens)
    for message in messages:
        ids = _message(tokenizer, message)
        input_ids += ids
        in_loss += [message.loss] * len(ids)
    input_ids.append(tokenizer.eos_token_id)
    in_loss.insert(0, False)
    return input_ids, [index if counts else IGNORED for index, counts in zip(input_ids, in_loss)]


def _message(tokenizer: ChatGLM3Tokenizer, message: Message) -> list[int]:
    return tokenizer.build_single_message(message.role, message.metadata, message.content)
