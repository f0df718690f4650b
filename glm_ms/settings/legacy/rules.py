"""What single rows of `legacy_table` cannot say about MindFormers' configurations: keys that act together."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from glm_ms.settings.document import Entry
from glm_ms.settings.legacy.draft import Draft, Source
from glm_ms.settings.legacy.table import LEGACY_DEFAULTS, LEGACY_TOP_K, ZOO_NAMES
from glm_ms.settings.schema import TRAINING_MODES, leaf_keys
from glm_ms.settings.sections import used_with

_TYPED_SECTIONS = ("lr_schedule", "model.pet_config", "runner_wrapper.scale_sense")
_SAMPLING = ("generation.temperature", "generation.top_k", "generation.top_p")


def _default(key: str) -> Any:
    return leaf_keys()[key].default


def _betas(draft: Draft) -> None:
    """`beta1` and `beta2` make one list; the one that is missing has the default of both projects."""
    given = [draft.found.pop(f"optimizer.{name}", None) for name in ("beta1", "beta2")]
    present = [source for source in given if source is not None]
    if not present:
        return
    first = min(present, key=lambda source: not source.typed)
    where = first.entry.where
    defaults = leaf_keys()["optimizer.betas"].default_factory()
    entries = [Entry(usual, where) if one is None else one.entry for one, usual in zip(given, defaults)]
    names = " and ".join(source.name.rpartition(".")[2] for source in present)
    draft.offer("optimizer.betas", Source(f"optimizer.{names}", Entry(entries, where, where), first.typed, 1))


def _loss_scale(draft: Draft) -> None:
    """`scale_sense` may be a number: a fixed scale, of which 1 changes nothing."""
    key = "runner_wrapper.scale_sense"
    source = draft.found.pop(key, None)
    if source is None or source.value is None:
        return
    fixed = source.value != 1
    kind = dataclasses.replace(source.entry, value="FixedLossScaleUpdateCell" if fixed else None, text=None)
    draft.offer(f"{key}.type", Source(f"{key}.type", kind, source.typed, 1))
    if fixed:
        draft.offer(f"{key}.loss_scale_value", dataclasses.replace(source, name=f"{key}.loss_scale_value"))
        draft.remark(source, " is the loss_scale_value of a FixedLossScaleUpdateCell here")
    else:
        draft.without_effect(source, "gradients are scaled by 1")


def _prefix(draft: Draft) -> None:
    """The prefix stands in `pet_config`; what `model_config` repeats counts with it only."""
    found = draft.found
    pet = found.get("model.pet_config.pet_type") or found.get("model.model_config.pet_config.pet_type")
    arch = found.get("model.arch.type")
    if arch is not None and arch.value == "ChatGLM2WithPtuning2" and (pet is None or pet.value is None):
        draft.refuse(arch, "needs model.model_config.pet_config with pet_type: ptuning2")
    length = found.get("model.model_config.pre_seq_len")
    if pet is not None and pet.value == "ptuning2":
        if length is not None and length.value is None:
            draft.without_effect(found.pop("model.model_config.pre_seq_len"), "model.pet_config says it")
        return
    for name in ("pre_seq_len", "prefix_projection"):
        source = found.pop(f"model.model_config.{name}", None)
        if source is None:
            continue
        if name == "pre_seq_len" and source.value is not None:
            draft.refuse(source, "a prefix needs model.pet_config.pet_type=ptuning2; or set it to null")
        else:
            draft.without_effect(source, "there is no prefix")


def _tokenizer(draft: Draft) -> None:
    """Each run mode of MindFormers reads a section of its own; they usually agree."""
    run_mode = draft.found.get("run_mode")
    part = {"eval": "eval_dataset", "predict": "processor"}.get(
        run_mode.value if run_mode else "", "train_dataset"
    )
    for name in ("type", "vocab_file"):
        for section in ("train_dataset", "eval_dataset", "processor"):
            source = draft.found.pop(f"{section}.tokenizer.{name}", None)
            if source is not None:
                rank = 0 if section == part else 1 + (section != "processor")
                draft.offer(f"processor.tokenizer.{name}", dataclasses.replace(source, rank=rank))


def _weights(draft: Draft) -> None:
    """Names of MindFormers' online zoo are no paths; an empty `load_checkpoint` leaves it to the model."""
    found = draft.found
    keys = [key for key in ("load_checkpoint", "model.model_config.checkpoint_name_or_path") if key in found]
    zoo = [found[key] for key in keys if _is_zoo_name(found[key])]
    decided = any(found[key].typed and not _is_zoo_name(found[key]) for key in keys)
    for key in keys:
        if _is_zoo_name(found[key]) or (found[key].value in ("", None) and not found[key].typed):
            del found[key]
    if not zoo or decided or any(key in found for key in keys):
        return
    text = " is a model of MindFormers' online zoo, which is not asked; name a path (--load_checkpoint PATH)"
    run_mode = found.get("run_mode")
    if run_mode is not None and run_mode.value == "train":
        # In our run mode train an empty load_checkpoint means random weights, which nobody asked for here.
        entry = dataclasses.replace(run_mode.entry, value="finetune", text=None)
        found["run_mode"] = dataclasses.replace(run_mode, entry=entry)
        text += "; run_mode: train begins with it, so it is finetune here"
    draft.remark(zoo[0], text)
    # Should a path be needed, the error says why there is none.
    where = f"{zoo[0].entry.where} ({zoo[0].value} of MindFormers' online zoo)"
    found["load_checkpoint"] = Source("load_checkpoint", Entry("", where, where), zoo[0].typed)


def _is_zoo_name(source: Source) -> bool:
    value = source.value
    return isinstance(value, str) and bool(re.fullmatch(ZOO_NAMES, value)) and not Path(value).exists()


def _without_use(draft: Draft) -> None:
    """Drops what the file has for another type than the chosen one; keys of the command line stay, and are checked."""
    for key, item in leaf_keys().items():
        section, _, _ = key.rpartition(".")
        source = draft.chosen.get(key)
        if (
            source is None
            or source.typed
            or section not in _TYPED_SECTIONS
            or "used_with" not in item.metadata
        ):
            continue
        other, values = used_with(item)
        kind = draft.value(f"{section}.{other}", _default(f"{section}.{other}"))
        if kind not in values:
            del draft.chosen[key]
            draft.without_effect(source, f"{section} has {f'type {kind}' if kind else 'no type'}")


def _data_parallel(draft: Draft) -> None:
    """With `parallel_mode: 0` MindFormers sets `full_batch` back, and may sum the gradients of the cards."""
    found = draft.found
    mode, parallel = found.get("parallel.parallel_mode"), found.get("use_parallel")
    if mode is None or mode.value != 0:
        return
    whole, mean = found.get("parallel.full_batch"), found.get("parallel.gradients_mean")
    if whole is not None and whole.value is True and not whole.typed:
        draft.without_effect(
            found.pop("parallel.full_batch"), "each card reads its share with parallel_mode: 0"
        )
    sharded = found.get("parallel.enable_parallel_optimizer")
    if sharded is not None and sharded.value is True and not sharded.typed:
        draft.without_effect(
            found.pop("parallel.enable_parallel_optimizer"),
            "every card keeps the whole optimizer state with parallel_mode: 0",
        )
    if mean is not None and mean.value is False and parallel is not None and parallel.value is True:
        text = " sums the gradients of the cards there; here they are averaged"
        draft.remark(found.pop("parallel.gradients_mean"), text)


def _resume(draft: Draft) -> None:
    """There `resume_training: True` means the checkpoint that `load_checkpoint` names."""
    resume, path = draft.chosen.get("resume_training"), draft.value("load_checkpoint")
    if resume is not None and resume.value is True and not resume.typed and path:
        draft.put("resume_training", path, resume)
        draft.remark(resume, f" goes on from load_checkpoint, so it is {path} here")


def _sampling(draft: Draft) -> None:
    """`do_sample: True` beside `top_k: 1` is greedy decoding, and `top_k` without it is nothing."""
    sampling, top_k = draft.chosen.get("generation.do_sample"), draft.chosen.get("generation.top_k")
    on = sampling is not None and sampling.value is True
    if on and top_k is None:
        draft.put("generation.top_k", LEGACY_TOP_K, sampling)
        draft.remark(sampling, f" with MindFormers' default top_k: {LEGACY_TOP_K}")
    if on and (top_k is None or top_k.value != 1):
        return
    if on and sampling.typed:
        if not top_k.typed:
            draft.remark(top_k, " keeps one token, so answers stay the same; give generation.top_k as well")
        return
    if on:
        draft.remark(top_k, f" keeps one token, so {sampling.name}: True is greedy decoding here")
        draft.put("generation.do_sample", False, sampling)
    for key in _SAMPLING:
        source = draft.chosen.get(key)
        if source is not None and source.name != key:
            del draft.chosen[key]
            if source is not top_k or not on:
                draft.without_effect(source, "decoding is greedy")


def _lengths(draft: Draft) -> None:
    """`max_length` counts the prompt; `seq_length` bounds it, and no other limit is meant beside it."""
    longest = draft.chosen.get("generation.max_length")
    if longest is None or longest.name == "generation.max_length" or not isinstance(longest.value, int):
        return
    seq_length = draft.value("model.model_config.seq_length", _default("model.model_config.seq_length"))
    number = longest.value
    if isinstance(seq_length, int) and seq_length < number:
        number = seq_length
        entry = dataclasses.replace(longest.entry, value=number, text=None)
        draft.chosen["generation.max_length"] = dataclasses.replace(longest, entry=entry)
        if draft.value("run_mode") not in TRAINING_MODES or draft.value("do_eval") is True:
            draft.remark(longest, f" is more than model.model_config.seq_length: {seq_length}, which counts")
    if "generation.max_new_tokens" not in draft.chosen:
        draft.put("generation.max_new_tokens", number, longest)


def _schedule(draft: Draft) -> None:
    """Keys that a schedule has no use for are ignored there; without `lr_schedule` the rate is constant."""
    rate = draft.chosen.get("lr_schedule.learning_rate")
    if rate is not None and rate.name == "optimizer.learning_rate" and "lr_schedule.type" not in draft.chosen:
        draft.put("lr_schedule.type", "ConstantWarmUpLR", rate)
        draft.remark(
            rate, " without lr_schedule is a constant rate: lr_schedule.type is ConstantWarmUpLR here"
        )
    if draft.value("lr_schedule.warmup_ratio") is not None:
        warmup = draft.chosen.get("lr_schedule.warmup_steps")
        if warmup is not None and not warmup.typed:
            draft.without_effect(draft.chosen.pop("lr_schedule.warmup_steps"), "warmup_ratio says it")
    steps = draft.chosen.get("lr_schedule.total_steps")
    if steps is not None and steps.value is None:
        draft.put("lr_schedule.total_steps", -1, steps)


def _defaults(draft: Draft) -> None:
    filled = []
    for key, value in LEGACY_DEFAULTS.items():
        section = key.rpartition(".")[0]
        if key not in draft.chosen and any(name.startswith(f"{section}.") for name in draft.found):
            draft.put(key, value)
            filled.append(f"{key}: {value}")
    if filled:
        draft.remarks.append(
            f"{draft.source}: not in the file, so MindFormers' defaults count: {', '.join(filled)}"
        )


# In this order, before and after one source is chosen for each of our keys.
BEFORE_CHOICE = (_betas, _loss_scale, _prefix, _tokenizer, _weights, _data_parallel)
AFTER_CHOICE = (_resume, _sampling, _lengths, _schedule, _without_use, _defaults)
