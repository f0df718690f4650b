"""Tokenizers of ChatGLM2 and ChatGLM3 on SentencePiece alone, and text that is streamed token by token."""

from __future__ import annotations

from glm_ms.tokenizer.answers import AnswerParser, Text, ToolCall, ToolCallError
from glm_ms.tokenizer.base import IncrementalDecoder, SentencePieceTokenizer, VocabularyError
from glm_ms.tokenizer.chatglm2 import ChatGLM2Tokenizer
from glm_ms.tokenizer.chatglm3 import ChatGLM3Tokenizer

__all__ = [
    "AnswerParser",
    "ChatGLM2Tokenizer",
    "ChatGLM3Tokenizer",
    "IncrementalDecoder",
    "SentencePieceTokenizer",
    "Text",
    "ToolCall",
    "ToolCallError",
    "VocabularyError",
]
