"""Settings of text generation: `GenerationConfig`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from glm_ms.storage.suggest import did_you_mean

_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_BEAM_DEFAULTS = {"length_penalty": 1.0, "early_stopping": False}


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when a row ends. Names and meaning are those of transformers.

    Three ways of decoding: greedy (the default), sampling (`do_sample`), beam search (`num_beams` > 1).
    `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias` and `min_new_tokens` act in all three.

    Raises:
        ValueError: a value of the wrong type or range, or options that exclude each other; it names them.

    Warns:
        UserWarning: an option is set that has no effect in the chosen way of decoding.
    """

    max_new_tokens: int  # per row, the prompt not counted; at least 1
    do_sample: bool = False  # draw from the filtered distribution; otherwise the best score wins
    num_beams: int = 1  # running hypotheses per prompt; above 1 it is beam search, not combined with `do_sample`
    num_return_sequences: int = 1  # per prompt; above 1 only with `do_sample`, or up to `num_beams`
    # Beams are ranked by sum of log probabilities / generated length ** length_penalty; in [-20, 20], above 0 favours
    # long ones.
    length_penalty: float = 1.0
    # A prompt ends when `num_beams` hypotheses have met an end token; when false it continues until no running beam can
    # beat the worst of them.
    early_stopping: bool = False
    temperature: float = 1.0  # divides the scores before sampling; in [1e-6, 1e6]
    top_k: int = 0  # sample from the k best scores, 0 for all
    top_p: float = 1.0  # sample from the smallest set of best tokens whose probabilities reach top_p; in (0, 1]
    min_p: float = 0.0  # remove tokens less likely than min_p times the likeliest one (arXiv:2407.01082); in [0, 1]
    # Above 1 discourages tokens that occur in the prompt or were generated (arXiv:1909.05858); in [1e-6, 1e6].
    repetition_penalty: float = 1.0
    # Subtracted, as in OpenAI's API, from the scores of tokens that were generated, the prompt not counted: once, and
    # for each occurrence; in [-2, 2].
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None  # id -> value added to its score, in [-100, 100]
    min_new_tokens: int = 0  # no end token, and in a server no stop string, before so many new tokens
    eos_token_id: int | list[int] | None = None  # id, or ids, that end a row
    pad_token_id: int = 0  # fills the steps of a finished row in a stream; not part of any returned sequence
    seed: int | None = None  # starts the random streams of sampling; None: different at every call
    # Most tokens that a step verifies beside its own one: those that followed the last tokens where these occurred
    # before, in the prompt or in the answer; 0: none. What is generated does not depend on it, but text that repeats
    # itself comes sooner. It acts where several tokens of a row run at a time with equal bits (C++ kernels for the
    # CPU), not in beam search.
    prompt_lookup_num_tokens: int = 10
    # With nan or inf in the scores continue as the chat functions of the original model do, see
    # `sampling.replace_invalid_scores`, instead of raising an error.
    replace_invalid_scores: bool = False
    # A row also ends when it has so many tokens, its prompt counted. In transformers `max_new_tokens` overrules it,
    # here the lower limit counts.
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST_INT.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                _check_int(name, getattr(self, name), least if self._is_used(name) else None)
        for name in ("do_sample", "early_stopping", "replace_invalid_scores"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected True or False")
        for name, limits in _FLOAT_LIMITS.items():
            _check_float(name, getattr(self, name), limits if self._is_used(name) else None)
        if self.top_p == 0 and self.do_sample:
            raise ValueError("top_p = 0: must be in (0, 1]; for the best token alone set top_k = 1")
        eos = self.eos_token_id
        if not (eos is None or isinstance(eos, Integral) or (isinstance(eos, (list, tuple)) and eos)):
            raise ValueError(f"eos_token_id = {eos!r}: expected an id, a list of ids, or None")
        for token in self._given_eos():
            _check_int("eos_token_id", token, 0)
        _check_logit_bias(self.logit_bias)
        self._check_combination()
        self._warn_without_effect()

    def _is_used(self, name: str) -> bool:
        """Whether an option is used: `temperature: 0` beside `do_sample: False` is a common way to say greedy."""
        return self.do_sample is not False or name not in _SAMPLING_DEFAULTS

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The distinct ids that end a row, in the order given; empty if none does."""
        return tuple(dict.fromkeys(int(token) for token in self._given_eos()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "generation options") -> GenerationConfig:
        """Builds a config from named options; `source` is their name in errors.

        Raises:
            ValueError: an unknown or missing option, or an unusable value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known, f"; known: {', '.join(known)}")
                raise ValueError(f"{source}: unknown option {key!r}{hint}")
        if "max_new_tokens" not in values:
            raise ValueError(f"{source}: max_new_tokens is missing: say how many tokens to generate at most")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises ValueError if an id that an option names cannot exist in a vocabulary of `vocab_size` ids."""
        named = {
            "eos_token_id": self.eos_ids,
            "pad_token_id": (self.pad_token_id,),
            "logit_bias": self.logit_bias or (),
        }
        for name, ids in named.items():
            for token in ids:
                if token >= vocab_size:
                    raise ValueError(
                        f"{name} = {token}: the vocabulary of this network has ids 0..{vocab_size - 1}; "
                        "give the id of its own tokenizer"
                    )

    def _given_eos(self) -> Sequence[Any]:
        given: Any = self.eos_token_id
        if given is None:
            return ()
        return given if isinstance(given, (list, tuple)) else (given,)

    def _check_combination(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens = {self.min_new_tokens}: at most max_new_tokens = {self.max_new_tokens}; "
                "lower it, or raise max_new_tokens"
            )
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample = True with num_beams = {self.num_beams}: sampling among beams is not supported; "
                "set num_beams = 1 to sample, or do_sample = False for beam search"
            )
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences = {self.num_return_sequences}: at most num_beams = {self.num_beams}"
            )
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences = {self.num_return_sequences}: greedy decoding has one result; "
                "set do_sample = True or num_beams > 1"
            )

    def _warn_without_effect(self) -> None:
        # A warning and not an error: configs of the field often carry `do_sample: False` beside `top_k: 3`.
        for used, defaults, condition in (
            (self.do_sample, _SAMPLING_DEFAULTS, "do_sample = True"),
            (self.num_beams > 1, _BEAM_DEFAULTS, "num_beams > 1"),
        ):
            names = [name for name, default in defaults.items() if getattr(self, name) != default]
            if names and not used:
                # Frames between here and the caller: __post_init__ and the generated __init__.
                warnings.warn(f"{', '.join(names)}: no effect without {condition}", UserWarning, stacklevel=4)


_LEAST_INT = dict(
    max_new_tokens=1, min_new_tokens=0, num_beams=1, num_return_sequences=1, top_k=0, pad_token_id=0, seed=0,
    max_length=2, prompt_lookup_num_tokens=0,
)  # fmt: skip
_OPTIONAL = ("seed", "max_length")
# Wider than any use, narrow enough that neither float32 scores nor the power of a length overflow.
_FLOAT_LIMITS = {
    "temperature": (1e-6, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "length_penalty": (-20, 20),
}


def _check_int(name: str, value: Any, least: int | None) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected an int, found {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}")


def _check_logit_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias = {bias!r:.80}: expected a mapping of token ids to numbers")
    for token, value in bias.items():
        _check_int("logit_bias", token, 0)
        _check_float(f"logit_bias[{token}]", value, (-100, 100))


def _check_float(name: str, value: Any, limits: tuple[float, float] | None) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected a number, found {type(value).__name__}")
    if limits is not None and not limits[0] <= float(value) <= limits[1]:  # false for nan, too
        hint = "; for the best token every time set do_sample = False" if name == "temperature" else ""
        raise ValueError(f"{name} = {value}: must be in [{limits[0]:g}, {limits[1]:g}]{hint}")
