"""Trains a SentencePiece vocabulary with the conventions of the one of ChatGLM.

    python tools/train_vocab.py --input configs/tiny/sample/train.json --columns content summary \
        --vocab_size 1000 --output output/tokenizer.model

Input is UTF-8: JSON lines when --columns names the fields to read, plain text otherwise. The model is BPE
with byte fallback and without normalization: ids 0, 1, 2 are <unk>, <s>, </s>, ids 3 to 258 the 256 bytes.
Line ends and tabs are never part of a piece; they are written as bytes. The special tokens of ChatGLM2 and
ChatGLM3 are not pieces: the tokenizers number them after the vocabulary.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs where nothing is installed

from glm_ms.program import command_name, program
from glm_ms.spelling import given
from glm_ms.storage.arguments import Parser
from glm_ms.storage.atomic import replace_bytes
from glm_ms.storage.errors import FileError, WriteError
from glm_ms.storage.readers import parse_json, read_text
from glm_ms.storage.suggest import did_you_mean

# As in the trainer and normalizer settings stored in the genuine tokenizer.model.
CONVENTIONS = {
    "model_type": "bpe",
    "character_coverage": 0.9999,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "max_sentencepiece_length": 16,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
# The prompt template of ChatGLM2 consists of these; as bytes it would be half of a short prompt.
PROMPT_CHARACTERS = "[Round0123456789]问答："
# Not for sentencepiece: line ends and tabs would become pieces, NUL ends a string in its C++ part, and it skips
# lines with U+2585, its private boundary mark.
_SEPARATORS = re.compile("[\n\r\t\0\u2585]+")
_NUM_FIXED_PIECES = 3 + 256
# Blanks in a row, a line end, a tab, digits, and characters that no training text is likely to hold.
_ROUND_TRIP = "  裙  dress 0.25\n\t问：𠮷\u2585 "
_NUM_SAMPLES = 3


class VocabularyError(FileError):
    """The vocabulary cannot be trained; the message says what to change."""


def read_texts(path: Path, columns: Sequence[str]) -> list[str]:
    """Reads the texts of one file.

    Args:
        path: UTF-8 file of JSON objects, one a line, or of plain text.
        columns: fields of the JSON objects to read; none for plain text.

    Returns:
        One text per record and column, or one per line of plain text; blank lines are left out.

    Raises:
        VocabularyError: the file is missing, is not UTF-8 or not what `columns` says it is, or has no text.
    """
    lines = read_text(path, VocabularyError).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if columns:
        texts = [text for number, line in numbered for text in _fields(line, columns, path, number)]
    else:
        if numbered:
            _reject_json(path, numbered[0][1])
        texts = [line for _, line in numbered]
    if not any(text.strip() for text in texts):
        raise VocabularyError(f"{path}: has no text")
    return texts


def _fields(line: str, columns: Sequence[str], path: Path, number: int) -> list[str]:
    where = f"{path}:{number}"
    record = parse_json(line, path, VocabularyError, number, "; leave --columns out for plain text")
    if not isinstance(record, dict):
        raise VocabularyError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for column in columns:
        if column not in record:
            hint = did_you_mean(column, record, f"; it has {', '.join(map(repr, record))}")
            raise VocabularyError(f"{where}: no column {column!r}{hint}")
        text = record[column]
        if not isinstance(text, str):
            raise VocabularyError(f"{where}: column {column!r} is {type(text).__name__}, expected a string")
        if re.search("[\ud800-\udfff]", text):  # JSON can spell them, UTF-8 cannot
            raise VocabularyError(f"{where}: column {column!r} has half of a surrogate pair")
    return [record[column] for column in columns]


def _reject_json(path: Path, line: str) -> None:
    """Refuses JSON lines without --columns: quotes and key names would silently become pieces."""
    try:
        record = json.loads(line)
    except ValueError:
        return
    if isinstance(record, dict):
        raise VocabularyError(
            f"{path}: has JSON lines; name the columns to read, as --columns {' '.join(map(str, record))}"
        )


def train_vocabulary(
    texts: Sequence[str],
    vocab_size: int,
    character_coverage: float = CONVENTIONS["character_coverage"],
    verbose: bool = False,
) -> bytes:
    """Trains a vocabulary. Equal input gives equal bytes.

    Args:
        texts: training text; line ends and tabs separate sentences.
        vocab_size: pieces, with the 3 control pieces and the 256 bytes.
        character_coverage: share of all characters, by count, that get a piece of their own; the rarest
            beyond it are written as bytes.
        verbose: let sentencepiece log to stderr.

    Returns:
        A serialized SentencePiece model.

    Raises:
        VocabularyError: no text, or `vocab_size` is too small or too large for it; the message gives the
            limit.
    """
    if not 0 < character_coverage <= 1:
        raise VocabularyError(f"character_coverage = {character_coverage}: must be above 0 and at most 1")
    sentences = [part for text in texts for part in _SEPARATORS.split(text) if part.strip()]
    if not sentences:
        raise VocabularyError("no text to train on")
    if vocab_size <= _NUM_FIXED_PIECES:
        raise VocabularyError(
            f"{given('vocab_size', vocab_size)}: must be above {_NUM_FIXED_PIECES}, the control pieces and the bytes"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Older releases of sentencepiece abort on required characters that no sentence has.
            sentence_iterator=iter([*sentences, *PROMPT_CHARACTERS]),
            model_writer=model,
            vocab_size=vocab_size,
            required_chars=PROMPT_CHARACTERS,
            max_sentence_length=1 << 30,  # bytes; sentencepiece silently skips longer lines
            num_threads=1,  # is stored in the model
            minloglevel=0 if verbose else 2,
            **{**CONVENTIONS, "character_coverage": character_coverage},
        )
    except RuntimeError as error:
        raise VocabularyError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """The two size errors of sentencepiece in terms of the options of this tool."""
    too_large = re.search(r"value <= (\d+)", message)
    if too_large:
        return (
            f"{given('vocab_size', vocab_size)}: too large for this text; the largest possible is {too_large[1]} "
            "(or give more text)"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return (
            f"{given('vocab_size', vocab_size)}: too small; bytes, chat prompt and the characters of this text "
            f"take {too_small[1]}; give at least that, or a smaller --character_coverage, which writes the "
            "rarest characters as bytes"
        )
    return f"sentencepiece: {message}"


def check_vocabulary(model: bytes, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Loads a model and checks it against the conventions.

    Args:
        model: serialized SentencePiece model.
        vocab_size: the size it must have.

    Returns:
        The loaded model.

    Raises:
        VocabularyError: size, special ids, bytes or a round trip are not as they must be.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    if processor.vocab_size() != vocab_size or ids != (0, 1, 2, -1):
        raise VocabularyError(f"trained model has {processor.vocab_size()} pieces and special ids {ids}")
    if not all(processor.is_byte(byte + 3) for byte in range(256)):
        raise VocabularyError("trained model does not have the 256 bytes at ids 3 to 258")
    decoded = processor.decode(processor.encode(_ROUND_TRIP))
    if decoded != _ROUND_TRIP:
        raise VocabularyError(f"trained model turns {_ROUND_TRIP!r} into {decoded!r}")
    return processor


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is always complete or absent.

    Raises:
        VocabularyError: the place cannot be written to.
    """
    try:
        replace_bytes(path, content, parents=True)
    except WriteError as error:
        raise VocabularyError(str(error)) from None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(description="Train a SentencePiece BPE vocabulary with the conventions of the ChatGLM one.")
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME",
                        help="fields to read; the files are JSON lines")  # fmt: skip
    parser.add_argument("--vocab_size", type=int, required=True, metavar="N",
                        help="pieces, with 3 control pieces and 256 bytes")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="tokenizer.model to write")
    parser.add_argument("--character_coverage", type=float, default=CONVENTIONS["character_coverage"],
                        metavar="SHARE", help="of all characters in the text; rarer ones are written as "
                        "bytes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="show sentencepiece's own log")
    return parser.parse_args(arguments)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    start = time.perf_counter()
    try:
        if options.output.is_dir():
            raise VocabularyError(f"{options.output}: is a folder; give the file to write")
        texts = [text for path in options.input for text in read_texts(path, options.columns)]
        model = train_vocabulary(texts, options.vocab_size, options.character_coverage, options.verbose)
        processor = check_vocabulary(model, options.vocab_size)
        write_whole(options.output, model)
    except VocabularyError as error:
        print(f"{command_name('train_vocab')}: error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"{options.vocab_size} pieces from {len(texts)} texts in {seconds:.1f} s")
    for text in list(dict.fromkeys(text.strip()[:60] for text in texts if text.strip()))[:_NUM_SAMPLES]:
        pieces = processor.encode(text, out_type=str)
        print(f"{len(text)} characters, {len(pieces)} pieces: {' '.join(pieces)}")
    print(f"written to {options.output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
