"""Arguments of MindFormers' `generate` -> those of `glm_ms.generation.GLMForCausalLM`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mindformers.generation import GenerationConfig as MindFormersGeneration

from glm_ms.generation.config import GenerationConfig

# Names of a whole length, prompt included; the first is ours too.
LENGTHS = ("max_length", "max_decode_length")
OPTIONS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
# Options with a single meaning here: what MindFormers' other values ask for does not exist.
_FIXED = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "encoder_repetition_penalty": (1.0,),
    "renormalize_logits": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "parallel_decoding": (False,),
    # Decoding always is incremental; pipelines and trainers pass the rest along with what they are given.
    "use_past": (True, False),
    "is_full_config": (True, False),
}
_OF_PIPELINES = ("batch_size", "bos_token_id", "model_name", "window_size", "level", "guess_set_size")


def default_generation(values: Mapping[str, Any], eos: int, pad: int) -> MindFormersGeneration:
    """What a model generates with when nothing else is said.

    Args:
        values: options by name, from a YAML; the rest is greedy decoding, as long as the network reaches.
        eos: id that ends a sequence.
        pad: id that fills one up.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    defaults.update({"max_length": None, "max_new_tokens": None, "eos_token_id": [eos], "pad_token_id": pad})
    generation = MindFormersGeneration()
    for name, value in {**defaults, **values}.items():
        # One by one: the constructor turns beam search off.
        setattr(generation, "max_length" if name in LENGTHS else name, value)
    return generation


def generation_arguments(
    input_ids: Any,
    base: MindFormersGeneration,
    given: Mapping[str, Any],
    seq_length: int,
) -> tuple[list[list[int]], dict[str, Any], bool]:
    """One call of `generate` in our terms.

    Args:
        input_ids: one prompt or several; padding as in `unpadded`.
        base: options where `given` says nothing.
        given: options by their names in MindFormers or here; `None` stands for not given.
        seq_length: of the network.

    Returns:
        prompts without padding; keyword arguments of `generate`; whether a dictionary is to be returned.

    Raises:
        ValueError: an unknown option, one that this project does not have, or a length that leaves no room.
    """
    given = {name: value for name, value in given.items() if value is not None}
    as_dictionary = bool(given.pop("return_dict_in_generate", base.return_dict_in_generate))
    mask = given.pop("attention_mask", None)
    prompts = unpadded(input_ids, given.get("pad_token_id", base.pad_token_id), mask)
    _drop_fixed(given)
    options = {name: getattr(base, name, None) for name in OPTIONS}
    for name in LENGTHS[1:]:
        if name in given:
            given.setdefault(LENGTHS[0], given.pop(name))
    _settle_length(given, options, seq_length)
    if not given.get("do_sample", options["do_sample"]):
        # Defaults of sampling are of no effect then, and not the caller's.
        options = {name: v for name, v in options.items() if name not in ("temperature", "top_k", "top_p")}
    if given.get("num_beams", options["num_beams"]) == 1:
        options = {name: v for name, v in options.items() if name not in ("length_penalty", "early_stopping")}
    options = {name: value for name, value in options.items() if value is not None}
    return prompts, {**options, **given}, as_dictionary


def unpadded(input_ids: Any, pad_token_id: int, attention_mask: Any = None) -> list[list[int]]:
    """Prompts without their padding.

    Without a mask, padding is what MindFormers takes for it: `pad_token_id` at the right end; and, as the tokenizers of
    ChatGLM pad, at the left end. No prompt of these models begins with that id, so a row that does is padded there
    and taken to its end.

    Args:
        input_ids: ids of one prompt, or of several, as lists, arrays or tensors.
        attention_mask: 0 on padding, same shape.

    Raises:
        ValueError: not integers, or nothing but padding.
    """
    rows, masks = _rows(input_ids, "input_ids"), None
    if attention_mask is not None:
        masks = _rows(attention_mask, "attention_mask")
        if [len(row) for row in masks] != [len(row) for row in rows]:
            raise ValueError("attention_mask: its shape differs from that of input_ids")
    prompts = []
    for index, row in enumerate(rows):
        if masks is not None:
            prompt = [token for token, kept in zip(row, masks[index]) if kept]
        else:
            prompt = _without_ends(row, pad_token_id)
        if not prompt:
            raise ValueError(f"input_ids: row {index} holds no token besides padding")
        prompts.append(prompt)
    return prompts


def _without_ends(row: list[int], pad_token_id: int) -> list[int]:
    start, end = 0, len(row)
    while start < end and row[start] == pad_token_id:
        start += 1
    if start == 0:
        while end > 0 and row[end - 1] == pad_token_id:
            end -= 1
    return row[start:end]


def _rows(values: Any, name: str) -> list[list[int]]:
    values = _plain(values)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: expected token ids, one prompt or several, found {values!r}")
    rows = values if isinstance(values[0], list) else [values]
    for row in rows:
        if not isinstance(row, list) or not all(type(token) in (int, bool) for token in row):
            raise ValueError(f"{name}: expected integers, one prompt or several of them")
    return rows


def _plain(values: Any) -> Any:
    if hasattr(values, "asnumpy"):
        values = values.asnumpy()
    if isinstance(values, (np.ndarray, np.generic)):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, Sequence) else values


def _drop_fixed(given: dict[str, Any]) -> None:
    for name, allowed in _FIXED.items():
        if name in given and given.pop(name) not in allowed:
            raise ValueError(f"{name}: generation of this project has no such option; leave it out")
    for name in _OF_PIPELINES:
        given.pop(name, None)


def _settle_length(given: dict[str, Any], options: dict[str, Any], seq_length: int) -> None:
    """`max_new_tokens` of a call overrules `max_length`, as MindFormers has it; here both are limits."""
    if "max_new_tokens" in given:
        given["max_length"] = options["max_length"] = None
    elif "max_length" in given:
        given["max_new_tokens"] = given["max_length"]
    elif options.get("max_new_tokens") is None:
        longest = seq_length if options["max_length"] is None else min(options["max_length"], seq_length)
        given["max_new_tokens"] = given["max_length"] = longest
