"""The request of /v1/completions."""

# Without `from __future__ import annotations`: see options.py.
from typing import Annotated, Optional, Union

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from glm_ms.serve.options import Sampling, TokenId

MAX_PROMPTS, MAX_LOGPROBS = 64, 20
_DEFAULT_TOKENS = 16  # of OpenAI

Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Sampling):
    """The fields of /v1/completions."""

    model: Optional[str] = Field(None, description="The model, or one of its adapters.")
    prompt: Union[
        str,
        Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)],
        Ids,
        Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)],
    ] = Field(description="A text, several texts, the token ids of one, or those of several.")
    add_special_tokens: Optional[bool] = Field(None, description="[gMASK] sop before a text; true by default.")
    max_tokens: Optional[int] = Field(None, ge=0, description="16 by default; 0 with echo: the prompt alone.")
    echo: Optional[bool] = Field(None, description="The answer begins with the prompt.")
    logprobs: Optional[int] = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Optional[str] = None
    best_of: Optional[int] = None

    @model_validator(mode="after")
    def _possible(self) -> "CompletionRequest":
        for name, wrong, text in (
            ("suffix", bool(self.suffix), "not supported; remove it"),
            ("best_of", self.best_of not in (None, self.n or 1), "not supported; remove it, or give the value of n"),
            ("max_tokens", self.max_tokens == 0 and not self.echo, "0 needs echo: true"),
        ):
            if wrong:
                raise PydanticCustomError("not_possible", "{text}", {"field": name, "text": text})
        return self

    @property
    def prompts(self) -> list[Union[str, list[int]]]:
        """The prompts, each a text or ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [[int(token) for token in given]]
        return [*given]

    @property
    def new_tokens(self) -> int:
        """Most tokens of an answer; 0: none, the prompt alone is wanted."""
        return _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
