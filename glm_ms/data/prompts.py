"""Prompts to answer: from a text, a file or standard input to ids."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from glm_ms.data.encoder import Message, Messages
from glm_ms.data.records import PROMPT_FORMS, checked_text, parse_prompt
from glm_ms.storage.errors import DataError, capped
from glm_ms.storage.paths import exists
from glm_ms.storage.readers import decode_text, parse_json, read_text
from glm_ms.tokenizer import SentencePieceTokenizer

PROMPT_FILES = (".txt", ".jsonl")
ONLY_PROMPT_FILES = (
    "prompts are read from .txt and .jsonl files only; to ask this text itself, put it on a line of a .txt file"
)
_DATA_FILE = re.compile(r"[!-~]+\.(json|csv|tsv|ya?ml|xml|xlsx?|parquet|arrow|md|docx?|pdf|gz|zip)", re.IGNORECASE)


def looks_like_data_file(text: str) -> bool:
    """Whether a prompt is probably the path of a file that is not one of prompts: no spaces, and such an ending."""
    return _DATA_FILE.fullmatch(text) is not None


class Question(NamedTuple):
    """Messages to answer the last of; a plain text is one message of the user."""

    messages: Messages
    place: str = "prompt"  # `file:line`, for errors

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1].content

    def ids(self, tokenizer: SentencePieceTokenizer) -> list[int]:
        """Ids in the prompt template of a tokenizer. A text that has the template already stays as it is.

        Raises:
            DataError: the template has no place for the messages, or the text breaks the template.
        """
        *earlier, last = self.messages
        try:
            if not tokenizer.is_template(last.content.lstrip()):
                history = [{key: getattr(item, key) for key in ("role", "content", "metadata")} for item in earlier]
                return tokenizer.build_chat_input(last.content, history, last.role)["input_ids"]
            if earlier:
                raise ValueError("a text in the prompt template cannot have a history, a system message or tools")
            return tokenizer.encode_template(last.content.lstrip())
        except ValueError as error:
            raise DataError(f"{self.place}: {error}") from None


def read_prompts(predict_data: str, say: Callable[[str], None]) -> list[Question]:
    """Prompts of `--predict_data`.

    It is `-` for standard input (a prompt a line), a path ending in .txt (a prompt a line) or .jsonl (an object of
    `parse_prompt` or a string a line), else the prompt itself. `say` takes a line about prompts with earlier messages,
    and one that names keys without effect.

    Raises:
        DataError: a file is missing, empty or broken; the message names file and line.
    """
    suffix = Path(predict_data).suffix.lower() if "\n" not in predict_data else ""
    source, lines = predict_data, [predict_data]
    if predict_data == "-":
        source = "standard input"
        lines = decode_text(sys.stdin.buffer.read(), source, DataError).replace("\r\n", "\n").split("\n")
    elif suffix in PROMPT_FILES:
        missing = f"no such file; give an existing {suffix} file, or a prompt"
        lines = read_text(Path(predict_data), DataError, missing).split("\n")
    elif exists(predict_data) or looks_like_data_file(predict_data):
        raise DataError(f"{source}: {ONLY_PROMPT_FILES}")
    else:
        source = "predict_data"
    numbered = [(f"{source}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{source}: no prompt; give a text, a .txt or .jsonl file, or - for standard input")
    if suffix != ".jsonl":
        return [_plain(line, source if len(lines) == 1 else place) for place, line in numbered]
    left_out: set[str] = set()
    prompts = [_of_line(line, place, left_out) for place, line in numbered]
    number = sum(len(prompt.messages) > 1 for prompt in prompts)
    if number:
        say(f"{source}: {number} of {len(prompts)} prompts have a history, a system message or tools")
    if left_out:
        say(f"{source}: not used: {capped(sorted(left_out))}")
    return prompts


def _of_line(line: str, place: str, left_out: set[str]) -> Question:
    source, _, number = place.rpartition(":")
    value = parse_json(line, source, DataError, int(number))
    if isinstance(value, dict):
        return Question(parse_prompt(value, place, left_out), place)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {PROMPT_FORMS}")
    return _plain(value, place)


def _plain(text: str, place: str) -> Question:
    return Question((Message("user", checked_text(text, f"{place}: the text")),), place)
