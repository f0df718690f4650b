"""The request of /v1/chat/completions."""

# Without `from __future__ import annotations`: see options.py.
from typing import Any, ClassVar, Literal, Optional, Union

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from glm_ms.serve.options import Body, Sampling

MAX_ALTERNATIVES = 20
_INSTEAD = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use response_format or structured_outputs",
    "guided_regex": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
}


class StructuredOutputs(Body):
    """`structured_outputs` of vLLM: the text of the answer follows a grammar. One field is given."""

    # `json` is an attribute of Pydantic's models.
    json_: Union[dict[str, Any], str, None] = Field(None, alias="json", description="A JSON schema.")
    regex: Optional[str] = Field(None, min_length=1, max_length=4096)
    choice: Optional[list[str]] = Field(None, min_length=1, max_length=1024)
    grammar: Optional[str] = Field(None, min_length=1, max_length=65536, description="Lark, as llguidance reads it.")
    json_object: Optional[bool] = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        given = [name for name in type(self).model_fields if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            text = "give one of json, regex, choice, grammar, json_object"
            raise PydanticCustomError("not_one", "{text}", {"text": text})
        return self


class ChatSampling(Sampling):
    """Sampling with the defaults of the models' chat functions."""

    temperature_default: ClassVar[float] = 0.8
    top_p_default: ClassVar[float] = 0.8


class ChatRequest(ChatSampling):
    """The fields of /v1/chat/completions."""

    ignored = ChatSampling.ignored | {"prediction"}  # it makes answers of others come sooner

    model: Optional[str] = Field(None, description="The model, or one of its adapters.")
    messages: list[dict[str, Any]] = Field(min_length=1, description="Messages with role and content.")
    tools: Optional[list[dict[str, Any]]] = Field(None, description="Functions that the model may call.")
    tool_choice: Union[str, dict[str, Any], None] = Field(
        None, description="none, auto, required, or the function to call."
    )
    parallel_tool_calls: Optional[bool] = Field(None, description="An answer may have several calls; true by default.")
    response_format: Optional[dict[str, Any]] = Field(None, description="text, json_object or json_schema.")
    structured_outputs: Optional[StructuredOutputs] = None
    max_tokens: Optional[int] = Field(None, ge=1)
    max_completion_tokens: Optional[int] = Field(None, ge=1, description="All that there is room for, by default.")
    logprobs: Optional[bool] = None
    top_logprobs: Optional[int] = Field(None, ge=0, le=MAX_ALTERNATIVES)
    modalities: Optional[list[Literal["text"]]] = None

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, value: Any) -> Any:
        for name, instead in _INSTEAD.items():
            if isinstance(value, dict) and value.get(name) is not None:
                raise PydanticCustomError("moved", "not supported; {instead}", {"field": name, "instead": instead})
        return value

    @model_validator(mode="after")
    def _possible(self) -> "ChatRequest":
        for name, wrong, text in (
            ("top_logprobs", self.top_logprobs is not None and not self.logprobs, "needs logprobs: true"),
            (
                "structured_outputs",
                bool(self.structured_outputs and self.response_format),
                "give it or response_format",
            ),
            (
                "max_tokens",
                self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens),
                "differs from max_completion_tokens; give one of the two",
            ),
        ):
            if wrong:
                raise PydanticCustomError("not_possible", "{text}", {"field": name, "text": text})
        return self
