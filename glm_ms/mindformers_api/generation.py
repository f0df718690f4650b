"""Options of MindFormers' `generate` and `predict` -> those of `glm_ms.generation`, and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mindformers.generation import GenerationConfig as MindFormersGeneration

from glm_ms.generation.config import GenerationConfig
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.schema import bias_pairs
from glm_ms.storage.suggest import did_you_mean

# Names for the length of the whole sequence, prompt included. glm_ms uses the first.
LENGTHS = ("max_length", "max_decode_length")
OPTIONS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
# MindFormers options that glm_ms does not have, with the values that change nothing. `use_past`: decoding is always
# incremental. Pipelines and trainers pass `use_past` and `is_full_config` to every model.
_NEUTRAL_VALUES = {
    "min_length": (0,),
    **dict.fromkeys(("renormalize_logits", "output_scores", "output_logits", "parallel_decoding"), (False,)),
    **dict.fromkeys(("use_past", "is_full_config"), (True, False)),
    "encoder_repetition_penalty": (1.0,),
}
_IGNORED = ("batch_size", "bos_token_id", "model_name", "window_size", "level", "guess_set_size")
# The Trainer and MindFormers' run scripts pass these with every prediction.
_IGNORED_BY_PREDICT = ("image_processor", "audio_processor", "is_full_config", "adapter_id", "save_file", "task")
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
_BEAM_OPTIONS = ("length_penalty", "early_stopping")


def default_generation(values: Mapping[str, Any], pad: int) -> MindFormersGeneration:
    """The default options of a model: `values`, or else greedy decoding up to the length of the network."""
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    defaults.update(max_length=None, max_new_tokens=None, pad_token_id=pad)
    generation = MindFormersGeneration()
    for name, value in {**defaults, **values}.items():
        # Set as attributes, because the constructor turns beam search off.
        setattr(generation, "max_length" if name in LENGTHS else name, value)
    return generation


def generation_arguments(
    input_ids: Any, base: MindFormersGeneration, given: Mapping[str, Any], seq_length: int
) -> tuple[list[list[int]], dict[str, Any], bool]:
    """Converts one call of `generate`; ValueError for an unsupported option, or prompts that are not rows of integers.

    Args:
        input_ids: one or several prompts, padded as described in `_remove_padding`.
        base: options that `given` does not set.
        given: options by their MindFormers or glm_ms names; None means not set.
        seq_length: maximum length of the network.

    Returns:
        prompts without padding; keyword arguments of `generate`; whether to return a dictionary.
    """
    given = {name: value for name, value in given.items() if value is not None and name not in _IGNORED}
    as_dictionary = bool(given.pop("return_dict_in_generate", base.return_dict_in_generate))
    mask = given.pop("attention_mask", None)
    prompts = _remove_padding(input_ids, given.get("pad_token_id", base.pad_token_id), mask)
    for name, neutral in _NEUTRAL_VALUES.items():
        if name in given and given.pop(name) not in neutral:
            raise ValueError(f"{name}: glm_ms does not support this option; remove it")
    if LENGTHS[1] in given:
        given.setdefault(LENGTHS[0], given.pop(LENGTHS[1]))
    options = {name: getattr(base, name, None) for name in OPTIONS}
    _set_length(given, options, seq_length)
    unused = set() if given.get("do_sample", options["do_sample"]) else set(_SAMPLING_OPTIONS)
    if given.get("num_beams", options["num_beams"]) == 1:
        unused.update(_BEAM_OPTIONS)
    # Defaults that have no effect are removed: glm_ms refuses them when a caller sets them.
    options = {name: value for name, value in options.items() if value is not None and name not in unused}
    return prompts, {**options, **given}, as_dictionary


def _remove_padding(input_ids: Any, pad_token_id: int, attention_mask: Any) -> list[list[int]]:
    """Prompts without padding, which `attention_mask` marks with 0.

    Without a mask, `pad_token_id` at the right end is padding, as in MindFormers, and at the left end too, because the
    ChatGLM tokenizers pad there. No ChatGLM prompt begins with this id. So a row that begins with it is padded on the
    left only, and its right end is kept.
    """
    rows = _rows(input_ids, "input_ids")
    if attention_mask is None:
        prompts = [_without_ends(row, pad_token_id) for row in rows]
    else:
        masks = _rows(attention_mask, "attention_mask")
        if [len(row) for row in masks] != [len(row) for row in rows]:
            raise ValueError("attention_mask: its shape differs from that of input_ids")
        prompts = [[token for token, kept in zip(*pair) if kept] for pair in zip(rows, masks)]
    if [] in prompts:
        raise ValueError(f"input_ids: row {prompts.index([])} has only padding")
    return prompts


def _without_ends(row: list[int], pad_token_id: int) -> list[int]:
    places = [place for place, token in enumerate(row) if token != pad_token_id]
    if not places:
        return []
    return row[places[0] :] if places[0] > 0 else row[: places[-1] + 1]


def _rows(values: Any, name: str) -> list[list[int]]:
    values = _to_lists(values)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: expected the token ids of one or several prompts, found {values!r}")
    rows = values if isinstance(values[0], list) else [values]
    for row in rows:
        if not isinstance(row, list) or not all(type(token) in (int, bool) for token in row):
            raise ValueError(f"{name}: expected integers, for one or several prompts")
    return rows


def _to_lists(values: Any) -> Any:
    """Tensors, arrays and sequences of them -> lists."""
    if hasattr(values, "asnumpy"):
        values = values.asnumpy()
    if isinstance(values, (np.ndarray, np.generic)):
        return values.tolist()
    if isinstance(values, Sequence) and not isinstance(values, str):
        return [_to_lists(value) for value in values]
    return values


def _set_length(given: dict[str, Any], options: dict[str, Any], seq_length: int) -> None:
    """In MindFormers `max_new_tokens` overrides `max_length`; in glm_ms both are limits."""
    if "max_new_tokens" in given:
        given["max_length"] = options["max_length"] = None
    elif "max_length" in given:
        given["max_new_tokens"] = given["max_length"]
    elif options.get("max_new_tokens") is None:
        longest = seq_length if options["max_length"] is None else min(options["max_length"], seq_length)
        given["max_new_tokens"] = given["max_length"] = longest


def set_generation(settings: Settings, options: dict[str, Any]) -> None:
    """Overwrites settings with the options of a call of `predict`; SettingsError for an unknown one.

    Options are the keys of `generation` in a YAML, `batch_size`, `seed`; None means not set. `max_new_tokens` overrides
    `max_length`, as in MindFormers, and either overrides both of the YAML.
    """
    generation = settings.generation
    known = [item.name for item in dataclasses.fields(generation)]
    for name, value in options.items():
        name = LENGTHS[0] if name in LENGTHS else name
        if value is None or name in _IGNORED_BY_PREDICT:
            continue
        if name == "batch_size":
            settings.predict_batch_size = value
        elif name == "seed":
            settings.seed = value
        elif name == "logit_bias":
            generation.logit_bias = _bias_texts(value)
        elif name in known:
            setattr(generation, name, value)
        else:
            hint = did_you_mean(name, [*known, "batch_size", "seed"], f"; known: {', '.join(known)}")
            raise SettingsError(f"predict({name}=...): unknown option{hint}")
    lengths = [options[name] for name in LENGTHS if options.get(name) is not None]
    if options.get("max_new_tokens") is not None:
        generation.max_length = None
    elif lengths:
        generation.max_new_tokens = lengths[-1]


def _bias_texts(value: Any) -> list[str]:
    """`logit_bias` as the settings have it, from a mapping or from such texts."""
    try:
        bias = value if isinstance(value, Mapping) else dict(bias_pairs(value))
        GenerationConfig(max_new_tokens=1, logit_bias=bias)
    except (AttributeError, TypeError, ValueError) as error:
        message = f"predict(logit_bias={value!r:.80}): expected a mapping of token ids to numbers; {error}"
        raise SettingsError(message) from None
    return [f"{token}:{bias}" for token, bias in bias.items()]
