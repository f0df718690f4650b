"""The state of a translation, see `translate`, and rules for keys of MindFormers' files that act together."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_ms.settings.errors import Problem, described
from glm_ms.settings.legacy.table import LEGACY_DEFAULTS, LEGACY_TOP_K, ZOO_NAMES
from glm_ms.settings.schema import TRAINING_MODES, default_of, leaf_keys, used_with
from glm_ms.settings.values import is_neutral
from glm_ms.storage.yaml_tree import Entry

_SECTIONS_WITH_TYPES = ("lr_schedule", "model.pet_config", "runner_wrapper.scale_sense")
_SAMPLING = ("generation.temperature", "generation.top_k", "generation.top_p")
_SCALE = "runner_wrapper.scale_sense"


@dataclass(frozen=True)
class Source:
    """A key as it was given."""

    name: str  # as it was written
    entry: Entry
    typed: bool  # on the command line
    key: str = ""  # its name in MindFormers' files, section aliases resolved
    rank: tuple[int, int] = (0, 0)  # of several sources of one key of ours, the lowest counts

    @property
    def value(self) -> Any:
        """The value, with MindFormers' text 'None' as null."""
        value = self.entry.value
        return None if isinstance(value, str) and value and is_neutral(value) else value

    def with_value(self, value: Any) -> Source:
        return dataclasses.replace(self, entry=dataclasses.replace(self.entry, value=value, text=None))


@dataclass
class Draft:
    """The state of a translation."""

    source: str  # path of the file
    typed: Collection[str]  # places of what comes from the command line
    found: dict[str, Source] = field(default_factory=dict)  # key of MindFormers, aliases resolved -> its source
    foreign: list[Source] = field(default_factory=list)  # of one of our files: keys that only MindFormers has
    targets: defaultdict[str, list[Source]] = field(default_factory=lambda: defaultdict(list))  # our key -> candidates
    chosen: dict[str, Source] = field(default_factory=dict)  # our key -> the source that became it
    renamed: list[str] = field(default_factory=list)  # lines for the user about class names
    remarks: list[str] = field(default_factory=list)  # lines about everything else
    problems: list[Problem] = field(default_factory=list)
    unused: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> keys

    def take(self, key: str, name: str) -> Source | None:
        """Removes the source of our `key` that is MindFormers' key `name`; returns it, if there is one."""
        taken = [source for source in self.targets[key] if source.key == name]
        self.targets[key] = [source for source in self.targets[key] if source.key != name]
        return taken[0] if taken else None

    def given(self, name: str) -> Any:
        """The value of a key in MindFormers' files; None if it is absent."""
        return self.found[name].value if name in self.found else None

    def value(self, key: str, default: Any = None) -> Any:
        """The value of one of our keys, once all are chosen."""
        return self.chosen[key].value if key in self.chosen else default

    def put(self, key: str, value: Any, cause: Source | None = None) -> None:
        """Sets one of our keys to a derived value, whose place is that of `cause`."""
        where = cause.entry.where if cause else self.source
        self.chosen[key] = Source(key, Entry(value, where, where), bool(cause and cause.typed))

    def without_effect(self, source: Source, reason: str) -> None:
        self.unused[reason].append(source.name)

    def remark(self, source: Source, text: str) -> None:
        self.remarks.append(f"{source.entry.where}: {source.name}: {shown(source)}{text}")

    def refuse(self, source: Source, text: str) -> None:
        self.problems.append(Problem(source.name, f"{shown(source)}: {text}", where=source.entry.where))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; True is not 1, and lists of entries are compared by their values."""
    if isinstance(one, list) and isinstance(other, list):
        return [item.value for item in one] == [item.value for item in other]
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def shown(source: Source) -> str:
    """The value of a key, for a line to the user."""
    value = source.value
    if value is None or isinstance(value, (list, dict)):
        return described(value)
    return str(value) if value != "" else '""'


def _default(key: str) -> Any:
    return default_of(leaf_keys()[key])


def _betas(draft: Draft) -> None:
    """`beta1` and `beta2` make one list; a missing one has the default of both projects."""
    given = [draft.take("optimizer.betas", f"optimizer.{name}") for name in ("beta1", "beta2")]
    present = [source for source in given if source is not None]
    if not present:
        return
    first = min(present, key=lambda source: not source.typed)
    where, usual = first.entry.where, _default("optimizer.betas")
    entries = [Entry(beta, where) if source is None else source.entry for source, beta in zip(given, usual)]
    names = " and ".join(source.name.rpartition(".")[2] for source in present)
    both = Source(f"optimizer.{names}", Entry(entries, where, where), first.typed, rank=(1, 0))
    draft.targets["optimizer.betas"].append(both)


def _loss_scale(draft: Draft) -> None:
    """`scale_sense` may be a number: a fixed scale, of which 1 changes nothing."""
    source = draft.take(f"{_SCALE}.loss_scale_value", _SCALE)
    if source is None or is_neutral(source.value):
        return
    fixed = source.value != 1
    kind = source.with_value("FixedLossScaleUpdateCell" if fixed else None)
    draft.targets[f"{_SCALE}.type"].append(dataclasses.replace(kind, name=f"{_SCALE}.type"))
    if fixed:
        value = dataclasses.replace(source, name=f"{_SCALE}.loss_scale_value")
        draft.targets[value.name].append(value)
        draft.remark(source, " is the loss_scale_value of a FixedLossScaleUpdateCell here")
    else:
        draft.without_effect(source, "gradients are scaled by 1")


def _prefix(draft: Draft) -> None:
    """`pet_config` has the prefix; the keys of `model_config` that repeat it have an effect with it only."""
    outer, inner = "model.pet_config.pet_type", "model.model_config.pet_config.pet_type"
    kind = draft.given(outer if outer in draft.found else inner)
    if draft.given("model.arch.type") == "ChatGLM2WithPtuning2" and is_neutral(kind):
        message = "needs model.model_config.pet_config with pet_type: ptuning2"
        draft.refuse(draft.found["model.arch.type"], message)
    used = kind == "ptuning2"
    for name in ("pre_seq_len", "prefix_projection"):
        if used and (name != "pre_seq_len" or not is_neutral(draft.given("model.model_config.pre_seq_len"))):
            continue
        source = draft.take(f"model.pet_config.{name}", f"model.model_config.{name}")
        if source is None:
            continue
        if name == "pre_seq_len" and not is_neutral(source.value):
            draft.refuse(source, "a prefix needs model.pet_config.pet_type=ptuning2; or set it to null")
        else:
            draft.without_effect(source, "model.pet_config has it" if used else "there is no prefix")


def _tokenizer(draft: Draft) -> None:
    """Each run mode of MindFormers reads the tokenizer of another section; they usually agree."""
    part = {"eval": "eval_dataset", "predict": "processor"}.get(str(draft.given("run_mode")), "train_dataset")
    for name in ("type", "vocab_file"):
        sources = draft.targets[f"processor.tokenizer.{name}"]
        for index, source in enumerate(sources):
            section = source.key.partition(".")[0]
            rank = 0 if section == part else 1 + (section != "processor")
            sources[index] = dataclasses.replace(source, rank=(rank, source.rank[1]))


def _weights(draft: Draft) -> None:
    """Names of MindFormers' online zoo are not paths; with an empty `load_checkpoint` the model's key counts."""
    sources = sorted(draft.targets["load_checkpoint"], key=lambda source: source.rank)
    zoo = [one for one in sources if re.fullmatch(ZOO_NAMES, str(one.value)) and not Path(one.value).exists()]
    paths = [one for one in sources if one not in zoo and (one.typed or not is_neutral(one.value))]
    draft.targets["load_checkpoint"] = paths
    if not zoo or paths:
        return
    text = " is a model of MindFormers' online zoo, not supported here; name a path (--load_checkpoint PATH)"
    if draft.given("run_mode") == "train":
        # In our run mode train an empty load_checkpoint means random weights, which the file does not ask for.
        draft.targets["run_mode"] = [draft.found["run_mode"].with_value("finetune")]
        text += "; run_mode: train begins with it, so it is finetune here"
    draft.remark(zoo[0], text)
    # If a path is needed, the error says why there is none.
    where = f"{zoo[0].entry.where} ({zoo[0].value} of MindFormers' online zoo)"
    draft.targets["load_checkpoint"].append(Source("load_checkpoint", Entry("", where, where), zoo[0].typed))


def _data_parallel(draft: Draft) -> None:
    """With `parallel_mode: 0` MindFormers resets `full_batch`, and may sum the gradients of the cards."""
    if draft.given("parallel.parallel_mode") != 0:
        return
    reasons = {
        "parallel.full_batch": "each card reads its share with parallel_mode: 0",
        "parallel.enable_parallel_optimizer": "every card keeps the whole optimizer with parallel_mode: 0",
    }
    for key, reason in reasons.items():
        if draft.given(key) is True and not draft.found[key].typed:
            draft.take(key, key)
            draft.without_effect(draft.found[key], reason)
    if draft.given("parallel.gradients_mean") is False and draft.given("use_parallel") is True:
        text = " sums the gradients of the cards there; here they are averaged"
        draft.remark(draft.found["parallel.gradients_mean"], text)


def _resume(draft: Draft) -> None:
    """There `resume_training: True` means the checkpoint that `load_checkpoint` names."""
    resume, path = draft.chosen.get("resume_training"), draft.value("load_checkpoint")
    if resume is not None and resume.value is True and not resume.typed and path:
        draft.put("resume_training", path, resume)
        draft.remark(resume, f" continues from load_checkpoint, so it is {path} here")


def _sampling(draft: Draft) -> None:
    """`do_sample: True` beside `top_k: 1` is greedy decoding."""
    sampling, top_k = draft.chosen.get("generation.do_sample"), draft.chosen.get("generation.top_k")
    if sampling is None or sampling.value is not True:
        return
    if top_k is None:
        draft.put("generation.top_k", LEGACY_TOP_K, sampling)
        draft.remark(sampling, f" with MindFormers' default top_k: {LEGACY_TOP_K}")
        return
    if top_k.value == 1 and sampling.typed and not top_k.typed:
        draft.remark(top_k, " keeps one token, so answers stay the same; give generation.top_k as well")
    if top_k.value != 1 or sampling.typed:
        return
    draft.remark(top_k, f" keeps one token, so {sampling.name}: True is greedy decoding here")
    draft.put("generation.do_sample", False, sampling)
    if top_k.name != "generation.top_k":
        del draft.chosen["generation.top_k"]


def _greedy(draft: Draft) -> None:
    """Keys of sampling have no effect without it."""
    if draft.value("generation.do_sample") is True:
        return
    for key in _SAMPLING:
        source = draft.chosen.get(key)
        if source is not None and source.name != key:
            del draft.chosen[key]
            draft.without_effect(source, "decoding is greedy")


def _lengths(draft: Draft) -> None:
    """`max_length` counts the prompt; `seq_length` bounds it, and it is the only limit."""
    longest = draft.chosen.get("generation.max_length")
    if longest is None or longest.name == "generation.max_length" or not isinstance(longest.value, int):
        return
    seq_length = draft.value("model.model_config.seq_length", _default("model.model_config.seq_length"))
    number = longest.value
    if isinstance(seq_length, int) and seq_length < number:
        number = seq_length
        draft.chosen["generation.max_length"] = longest.with_value(number)
        if draft.value("run_mode") not in TRAINING_MODES or draft.value("do_eval") is True:
            draft.remark(longest, f" is more than model.model_config.seq_length: {seq_length}, which counts")
    if "generation.max_new_tokens" not in draft.chosen:
        draft.put("generation.max_new_tokens", number, longest)


def _schedule(draft: Draft) -> None:
    """Without `lr_schedule` the rate is constant."""
    rate = draft.chosen.get("lr_schedule.learning_rate")
    if rate is not None and rate.name == "optimizer.learning_rate" and "lr_schedule.type" not in draft.chosen:
        draft.put("lr_schedule.type", "ConstantWarmUpLR", rate)
        draft.remark(rate, " without lr_schedule is a constant rate: lr_schedule.type is ConstantWarmUpLR here")
    steps = draft.chosen.get("lr_schedule.total_steps")
    if steps is not None and steps.value is None:
        draft.put("lr_schedule.total_steps", -1, steps)


def _warmup(draft: Draft) -> None:
    """`warmup_ratio` takes the place of `warmup_steps`."""
    warmup = draft.chosen.get("lr_schedule.warmup_steps")
    if draft.value("lr_schedule.warmup_ratio") is not None and warmup is not None and not warmup.typed:
        draft.without_effect(draft.chosen.pop("lr_schedule.warmup_steps"), "warmup_ratio takes its place")


def _other_types(draft: Draft) -> None:
    """Drops what the file has for another type than the chosen one; keys of the command line stay, and are checked."""
    for key, item in leaf_keys().items():
        section = key.rpartition(".")[0]
        source = draft.chosen.get(key)
        if source is None or source.typed or "used_with" not in item.metadata:
            continue
        other, values = used_with(item)
        kind = draft.value(f"{section}.{other}", _default(f"{section}.{other}"))
        if section in _SECTIONS_WITH_TYPES and kind not in values:
            del draft.chosen[key]
            draft.without_effect(source, f"{section} has {f'type {kind}' if kind else 'no type'}")


def _defaults(draft: Draft) -> None:
    filled = []
    for key, value in LEGACY_DEFAULTS.items():
        section = key.rpartition(".")[0]
        if key not in draft.chosen and any(name.startswith(f"{section}.") for name in draft.found):
            draft.put(key, value)
            filled.append(f"{key}: {value}")
    if filled:
        draft.remarks.append(f"{draft.source}: not in the file, so MindFormers' defaults count: {', '.join(filled)}")


# In this order, before and after one source is chosen for each of our keys.
BEFORE_CHOICE = (_betas, _loss_scale, _prefix, _tokenizer, _weights, _data_parallel)
AFTER_CHOICE = (_resume, _sampling, _greedy, _lengths, _schedule, _warmup, _other_types, _defaults)
# The same for single keys of MindFormers in our files, whose other keys have our meaning.
BEFORE_CHOICE_OF_KEYS = (_betas, _loss_scale, _prefix, _weights)
AFTER_CHOICE_OF_KEYS = (_greedy, _lengths, _schedule)
