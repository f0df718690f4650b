"""Reading a SentencePiece vocabulary with errors a user can act on."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glm_ms.storage.errors import FileError


class VocabularyError(FileError):
    """A vocabulary file cannot be used; the message names the file and the remedy."""


def load_vocabulary(vocab_file: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Reads a `tokenizer.model`.

    Args:
        vocab_file: a SentencePiece model of any size; it must define <unk> and </s>.

    Raises:
        VocabularyError: the file is missing, a folder, unreadable, not a SentencePiece model, or lacks </s>.
    """
    path = Path(vocab_file)
    if path.is_dir():
        raise VocabularyError(f"{path}: is a folder; give the SentencePiece file in it (tokenizer.model)")
    try:
        serialized = path.read_bytes()
    except FileNotFoundError:
        raise VocabularyError(
            f"{path}: no such file; give the SentencePiece vocabulary (tokenizer.model)"
        ) from None
    except OSError as error:
        raise VocabularyError(f"{path}: cannot be read: {error.strerror}") from None
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.LoadFromSerializedProto(serialized)
    except (RuntimeError, OSError):
        hint = "it is a Git LFS pointer, " if serialized.startswith(b"version https://git-lfs") else ""
        raise VocabularyError(
            f"{path}: {hint}not a whole SentencePiece model ({len(serialized)} bytes); fetch it again"
        ) from None
    if vocabulary.eos_id() < 0:
        raise VocabularyError(f"{path}: defines no </s>; train the vocabulary with eos_id >= 0")
    return vocabulary
