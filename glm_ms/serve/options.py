"""The fields of requests that say how tokens are chosen, for every door: `Body`, `Sampling`."""

# No `from __future__ import annotations`: Pydantic evaluates annotations, which Python 3.9 cannot do with `int | None`.
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from glm_ms.generation.config import GenerationConfig
from glm_ms.serve.engine import Engine
from glm_ms.serve.errors import APIError
from glm_ms.storage.suggest import did_you_mean

MAX_STOPS, MAX_BIASES = 16, 1024
_SEEDS = 1 << 63

Text = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """A JSON object of a request: exact types, finite numbers, no unknown field.

    Attributes:
        ignored: fields of OpenAI's interface that have no meaning here and change no answer. Clients may send them.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Leaves out `ignored`, and names a field that nobody knows before all other problems."""
        if not isinstance(value, Mapping):
            return value
        known = {field.alias or name: name for name, field in cls.model_fields.items()}
        value = {key: item for key, item in value.items() if key not in cls.ignored or key in known}
        for key in value:
            if key not in known:
                hint = did_you_mean(key, [*known, *cls.ignored], "; remove it")
                raise PydanticCustomError(
                    "unknown_field", "unknown field{hint}", {"field": str(key)[:100], "hint": hint}
                )
        return value


class StreamOptions(Body):
    """`stream_options` of OpenAI."""

    ignored = frozenset({"include_obfuscation", "continuous_usage_stats"})

    include_usage: bool = Field(False, description="A last event has the number of tokens.")


class Sampling(Body):
    """How tokens are chosen and what ends an answer. Null, as a value, means the default.

    A subclass sets the defaults of its door in `temperature_default` and `top_p_default`.
    """

    temperature_default: ClassVar[float] = 1.0
    top_p_default: ClassVar[float] = 1.0
    ignored = frozenset(
        {"user", "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
    )

    temperature: Optional[float] = Field(None, ge=0, le=100, description="0: the best token every time.")
    top_p: Optional[float] = Field(None, gt=0, le=1)
    top_k: Optional[int] = Field(None, ge=-1, description="0 or -1: all tokens.")
    min_p: Optional[float] = Field(None, ge=0, le=1)
    n: Optional[int] = Field(None, ge=1, description="Answers to each prompt.")
    seed: Optional[int] = Field(None, ge=-_SEEDS, lt=2 * _SEEDS, description="The same seed gives the same answer.")
    stop: Union[Text, Annotated[list[Text], Field(max_length=MAX_STOPS)], None] = Field(
        None, description="Texts that end an answer, which stops before them."
    )
    include_stop_str_in_output: Optional[bool] = None
    stop_token_ids: Optional[Annotated[list[TokenId], Field(max_length=MAX_STOPS)]] = None
    ignore_eos: Optional[bool] = Field(None, description="The stop tokens of the model do not end an answer.")
    min_tokens: Optional[int] = Field(None, ge=0)
    presence_penalty: Optional[float] = Field(None, ge=-2, le=2)
    frequency_penalty: Optional[float] = Field(None, ge=-2, le=2)
    repetition_penalty: Optional[float] = Field(None, gt=0, le=100)
    logit_bias: Optional[dict[str, Annotated[float, Field(ge=-100, le=100)]]] = Field(
        None, max_length=MAX_BIASES, description="Token id -> number that is added to its score."
    )
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "has no effect without stream: true", {"field": "stream_options"})
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with an event that has the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def config(self, engine: Engine, max_new_tokens: int) -> GenerationConfig:
        """The same options for the decoding loop.

        Raises:
            APIError: 400, token ids outside the vocabulary, or numbers that exclude each other.
        """
        choices = self.n or 1
        if choices > engine.choices:
            raise APIError(400, f"n: {choices} answers; this server gives at most {engine.choices} to a prompt", "n")
        if self.min_tokens is not None and self.min_tokens > max_new_tokens:
            raise APIError(400, f"min_tokens: more than the answer may have, {max_new_tokens} tokens", "min_tokens")
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "num_return_sequences": choices,
            "eos_token_id": self._ends(engine) or None,
            "prompt_lookup_num_tokens": engine.prompt_lookup_num_tokens,
            **self._drawing(choices),
        }
        # Only what differs from the default: options without effect would be reported.
        for name, value, default in (
            ("repetition_penalty", self.repetition_penalty, 1.0),
            ("presence_penalty", self.presence_penalty, 0.0),
            ("frequency_penalty", self.frequency_penalty, 0.0),
            ("min_new_tokens", self.min_tokens, 0),
            ("logit_bias", self._biases(engine.vocab_size), {}),
        ):
            if value is not None and value != default:
                options[name] = value
        try:
            return GenerationConfig(**options)
        except ValueError as error:
            raise APIError(400, str(error)) from None

    def _drawing(self, choices: int) -> dict[str, Any]:
        """Greedy, or the options of sampling."""
        temperature = self.temperature_default if self.temperature is None else self.temperature
        if temperature == 0:  # several answers are as many copies of the best one
            return {} if choices == 1 else {"do_sample": True, "top_k": 1}
        return {
            "do_sample": True,
            "temperature": float(max(temperature, 1e-6)),
            "top_p": float(self.top_p_default if self.top_p is None else self.top_p),
            "top_k": max(self.top_k or 0, 0),
            "seed": None if self.seed is None else self.seed % _SEEDS,
            **({"min_p": float(self.min_p)} if self.min_p else {}),
        }

    def _ends(self, engine: Engine) -> list[int]:
        own = [] if self.ignore_eos else engine.tokenizer.stop_token_ids
        given = self.stop_token_ids or []
        for token in given:
            if token >= engine.vocab_size:
                message = f"stop_token_ids: {token}: the vocabulary has ids 0..{engine.vocab_size - 1}"
                raise APIError(400, message, "stop_token_ids")
        return list(dict.fromkeys([*(token for token in own if token < engine.vocab_size), *given]))

    def _biases(self, vocab_size: int) -> dict[int, float]:
        biases = {}
        for text, value in (self.logit_bias or {}).items():
            if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) >= vocab_size:
                message = f"logit_bias: {text[:20]!r}: must be a token id, 0..{vocab_size - 1}"
                raise APIError(400, message, "logit_bias")
            biases[int(text)] = float(value)
        return biases
