"""ChatGLM2-6B, and ChatGLM3-6B: the same network with role tokens. CodeGeeX2-6B is ChatGLM2 with other weights."""

from __future__ import annotations

from glm_ms.data.messages import LastAnswerEncoder
from glm_ms.data.source_target import SourceTargetEncoder
from glm_ms.families.family import Family
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer

# The released MindSpore checkpoints have this name for the embedding, MindFormers 1.9 writes that of the aliases.
_EMBEDDING = "transformer.embedding.embedding_table"
_PARAMETER_NAMES = {"transformer.embedding.word_embeddings.weight": _EMBEDDING}
_ALIASES = {"transformer.embedding.embedding_weight": _EMBEDDING}

CHATGLM2 = Family(
    name="chatglm2",
    generation=2,
    tokenizer=ChatGLM2Tokenizer,
    encoder=SourceTargetEncoder,
    parameter_names=_PARAMETER_NAMES,
    aliases=_ALIASES,
    released=("chatglm2-6b", "chatglm2-6b-32k", "chatglm2-6b-int4", "codegeex2-6b"),
)
CHATGLM3 = Family(
    name="chatglm3",
    generation=3,
    tokenizer=ChatGLM3Tokenizer,
    encoder=LastAnswerEncoder,
    parameter_names=_PARAMETER_NAMES,
    aliases=_ALIASES,
    released=("chatglm3-6b", "chatglm3-6b-base", "chatglm3-6b-32k", "chatglm3-6b-128k"),
)
