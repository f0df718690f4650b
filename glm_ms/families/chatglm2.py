"""ChatGLM2-6B; CodeGeeX2-6B has the same network and tokenizer."""

from __future__ import annotations

from glm_ms.data.source_target import SourceTargetEncoder
from glm_ms.families.family import Family
from glm_ms.tokenizer import ChatGLM2Tokenizer

# The released MindSpore checkpoints have this name for the embedding, MindFormers 1.9 writes that of ALIASES.
EMBEDDING = "transformer.embedding.embedding_table"
PARAMETER_NAMES = {"transformer.embedding.word_embeddings.weight": EMBEDDING}
ALIASES = {"transformer.embedding.embedding_weight": EMBEDDING}

CHATGLM2 = Family(
    name="chatglm2",
    generation=2,
    tokenizer=ChatGLM2Tokenizer,
    encoder=SourceTargetEncoder,
    parameter_names=PARAMETER_NAMES,
    aliases=ALIASES,
    released=("chatglm2-6b", "chatglm2-6b-32k", "chatglm2-6b-int4", "codegeex2-6b"),
)
