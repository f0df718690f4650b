"""ChatGLM3-6B: the network of ChatGLM2 with role tokens."""

from __future__ import annotations

from glm_ms.data.messages import LastAnswerEncoder
from glm_ms.families.chatglm2 import ALIASES, PARAMETER_NAMES
from glm_ms.families.family import Family
from glm_ms.tokenizer import ChatGLM3Tokenizer

CHATGLM3 = Family(
    name="chatglm3",
    generation=3,
    tokenizer=ChatGLM3Tokenizer,
    encoder=LastAnswerEncoder,
    parameter_names=PARAMETER_NAMES,
    aliases=ALIASES,
    released=("chatglm3-6b", "chatglm3-6b-base", "chatglm3-6b-32k", "chatglm3-6b-128k"),
)
