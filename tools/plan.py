"""Plans the memory, work and traffic of a run on its cards.

    python tools/plan.py --config configs/glm3/run_glm3_6b_finetune_800_32G.yaml --cards 8 --memory 32GB
    python tools/plan.py --config configs/glm3/run_glm3_6b_lora_800_32G.yaml --memory 32GB runner_config.batch_size=16
    python tools/plan.py --model configs/glm3/predict_glm3_6b.yaml --slots 16 --context 4096 --memory 64GB

Prints the memory of the card with the largest need, the work and traffic of an update, whether the run fits, and if not
the nearest setting that does. Needs no weights, records or card. `key.sub=value` changes any key of the file. With
--model it plans a server (glm-ms serve). Exit status: 0 it fits, or --memory was not given; 3 it does not fit; 2 the
settings cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(REPOSITORY))

from glm_ms.families import build_tokenizer, read_config  # noqa: E402
from glm_ms.ops.cpu import library  # noqa: E402
from glm_ms.ops.cpu.storage import STORAGE  # noqa: E402
from glm_ms.peft.adapter import AdapterError  # noqa: E402
from glm_ms.peft.rows import bounds_for  # noqa: E402
from glm_ms.plan import GIB, RunPlan, describe, nearest_fit, plan_run  # noqa: E402
from glm_ms.plan.serving import describe_serving, plan_serving  # noqa: E402
from glm_ms.program import program  # noqa: E402
from glm_ms.quant import BITS, GROUPS, from_flags  # noqa: E402
from glm_ms.quant.checkpoint import described_quantization  # noqa: E402
from glm_ms.settings import Settings, SettingsError, load_settings, resolve_vocab_size  # noqa: E402
from glm_ms.settings.loader import repeated  # noqa: E402
from glm_ms.settings.schema import AUTO, is_sharded  # noqa: E402
from glm_ms.storage.arguments import Parser, whole_number  # noqa: E402
from glm_ms.storage.errors import FileError  # noqa: E402
from glm_ms.storage.yaml_tree import parse_yaml  # noqa: E402
from glm_ms.tokenizer import VocabularyError  # noqa: E402

# Memory of a card for system, drivers and communication buffers.
RESERVED = 2 * GIB
FITS, UNUSABLE, DOES_NOT_FIT = 0, 2, 3
# Options of a server.
SERVING = ("slots", "context", "kv_cache", "quantize", "quantize_group", "max_adapters", "max_lora_rank", "max_prefix")
SLOTS = 8
_COUNT = whole_number(1, 10**9)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan; returns the exit status."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.model is not None:
        return _plan_server(parser, options)
    if given := [name for name in SERVING if getattr(options, name) is not None]:
        parser.error(f"--{given[0].replace('_', '-')}: is of a server, and needs --model")
    try:
        if twice := repeated(options.overrides):
            raise SettingsError(twice)
        settings, cards = settings_for(options.config, options.overrides, options.cards)
        plan = plan_run(settings, cards)
    except (SettingsError, AdapterError, VocabularyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    memory = None if options.memory is None else usable(settings, options.memory)
    print(f"{options.config}, {settings.run_mode}")
    added = _changed(options, _for_cards(_given(options), options.config, options.cards)[0])
    if added:
        print(f"on {cards} card{'' if cards == 1 else 's'} with {' '.join(added)}")
    for line in describe(plan, memory):
        print(line)
    print(
        "not counted: gaps between tensors, and the memory of MindSpore itself, its kernels and HCCL"
        + ("" if memory is None else f"; {memory_note(settings, options.memory)}")
    )
    if memory is None or plan.card.total <= memory:
        return FITS
    _print_nearest(options, settings, plan, memory)
    return DOES_NOT_FIT


def _plan_server(parser: Parser, options: argparse.Namespace) -> int:
    """Prints the plan of a server; returns the exit status."""
    if options.overrides or options.cards is not None:
        parser.error("--model: takes no key=value and no --cards; a server runs on one card")
    given = {name: getattr(options, name) for name in SERVING if getattr(options, name) is not None}
    try:
        config = read_config(options.model)
        stored = described_quantization(options.model)
        chosen = from_flags(options.quantize, options.quantize_group) or stored
        context = given.setdefault("context", config.seq_length)
        if context > config.seq_length:
            raise SettingsError(f"--context {context}: {options.model} has seq_length {config.seq_length}")
        if options.kv_cache and options.device_target != "CPU":
            raise SettingsError(
                f"--kv-cache {options.kv_cache}: only the C++ kernels of a CPU have types of their own; add "
                "--device_target CPU, or leave it out"
            )
    except (FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    on_cpu = options.device_target == "CPU"
    kept = options.kv_cache or ("float32" if on_cpu and library.reason() is None else None)
    if on_cpu:
        config = dataclasses.replace(config, compute_dtype="float32")
    if on_cpu and (kept is None or stored is not None):  # else the kernels read weights of 16 bits
        config = dataclasses.replace(config, param_init_type="float32")
    bounds = bounds_for([], *(given.get(name) for name in ("max_adapters", "max_lora_rank", "max_prefix")))
    fused = not on_cpu and config.compute_dtype != "float32"
    plan = plan_serving(config, given.get("slots", SLOTS), context, bounds, fused, kv_cache=kept, quantization=chosen)
    memory = options.memory and max(0, options.memory - RESERVED)
    print(f"{options.model}, a server on {options.device_target}")
    for line in describe_serving(plan, memory):
        print(line)
    note = "" if memory is None else f"; {RESERVED // GIB} GiB are left to the system"
    print(f"not counted: gaps between tensors, and the memory of MindSpore itself and its kernels{note}")
    return FITS if memory is None or plan.total <= memory else DOES_NOT_FIT


def settings_for(config: str, overrides: Sequence[str], cards: int | None) -> tuple[Settings, int]:
    """The settings of a run on a number of cards, and that number.

    Args:
        config: YAML file.
        overrides: `key.sub=value` texts.
        cards: None: the number in the file.

    Raises:
        SettingsError: settings that cannot be used, or that do not fit the number of cards.
    """
    settings = load_settings(config, overrides, check_files=False)
    more, cards = _for_cards(settings, config, cards)
    if more:
        settings = load_settings(config, [*overrides, *more], check_files=False)
    if settings.model.model_config.padded_vocab_size == AUTO:
        chosen = settings.processor.tokenizer
        if not Path(chosen.vocab_file).is_file():
            raise SettingsError(
                f"{settings.where('model.model_config.padded_vocab_size')}: auto needs the tokenizer, and "
                f"{chosen.vocab_file or 'processor.tokenizer.vocab_file'} does not exist; add "
                "model.model_config.padded_vocab_size=65024"
            )
        resolve_vocab_size(settings, build_tokenizer(chosen).vocab_size)
    return settings, cards


def _for_cards(settings: Settings, config: str, cards: int | None) -> tuple[list[str], int]:
    """Overrides for a number of cards, and the number; see `settings_for`."""
    split = settings.parallel_config
    fixed = split.model_parallel * split.pipeline_stage if is_sharded(settings) else 1
    own = split.data_parallel * fixed if settings.use_parallel else 1
    if cards is None or cards == own:
        return [], own
    if cards % fixed:
        raise SettingsError(
            f"--cards {cards}: is not divisible by model_parallel x pipeline_stage = {fixed} of {config}"
        )
    if not settings.use_parallel:
        raise SettingsError(f"--cards {cards}: {config} has use_parallel: False; add use_parallel=True, or --cards 1")
    more = [f"parallel_config.data_parallel={cards // fixed}"]
    if cards == 1 and not is_sharded(settings):
        more.append("use_parallel=False")
    return more, cards


def usable(settings: Settings, memory: int) -> int:
    """Bytes of a card for MindSpore."""
    limit = _limit(settings)
    return max(0, memory - RESERVED) if limit is None or limit > memory else limit


def memory_note(settings: Settings, memory: int) -> str:
    """The reason of the limit."""
    limit, text = _limit(settings), settings.context.max_device_memory
    if limit is not None and limit <= memory:
        return f"the limit is context.max_device_memory: {text}"
    reserved = f"{RESERVED // GIB} GiB of the card are left to the system"
    if limit is not None:
        return f"context.max_device_memory: {text} is more than the card has, give a smaller one; {reserved}"
    return reserved


def _limit(settings: Settings) -> int | None:
    limit = settings.context.max_device_memory
    return None if limit is None else int(float(limit[:-2]) * GIB)


def _print_nearest(options: argparse.Namespace, settings: Settings, plan: RunPlan, memory: int) -> None:
    cards = plan.parallel.cards
    found = nearest_fit(settings, cards, memory, partial(_replan, options, cards))
    if found is None:
        print(_nothing_fits(settings, plan, memory))
        return
    overrides, near = found
    print(f"nearest setting that fits ({near.card.total / GIB:.2f} GiB of {memory / GIB:.2f} GiB):")
    more, _ = _for_cards(_given(options), options.config, cards)
    print(f"  {' '.join(_changed(options, [*more, *overrides]))}")
    if near.rows != plan.rows:
        print(f"an update then has {near.rows:,} rows, not {plan.rows:,}")


def _nothing_fits(settings: Settings, plan: RunPlan, memory: int) -> str:
    if not settings.is_training():
        alone = "the weights alone are larger" if plan.card.weights > memory else "not even one row at a time fits"
        return f"nothing near it fits: {alone}. Take cards with more memory"
    remedy = "shorten its rows" if settings.model.pet_config.pet_type else (
        "train an adapter (model.pet_config.pet_type=lora)"
    )  # fmt: skip
    return (
        "nothing near it fits: neither recompute, nor another split of these cards, nor smaller batches. Take more "
        f"cards, or {remedy}"
    )


def _given(options: argparse.Namespace) -> Settings:
    """The settings without overrides for another number of cards."""
    return load_settings(options.config, options.overrides, check_files=False)


def _changed(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """Overrides that change the file and the command line; of several for a key the last one."""
    known, last = _given(options).to_dict(), {text.partition("=")[0]: text for text in overrides}
    return [text for text in last.values() if not _is_so(known, text)]


def _replan(options: argparse.Namespace, cards: int, overrides: Sequence[str]) -> RunPlan | None:
    try:
        settings, cards = settings_for(options.config, [*options.overrides, *overrides], cards)
        return plan_run(settings, cards)
    except SettingsError:
        return None


def _is_so(values: dict, text: str) -> bool:
    """Whether the settings have a value already."""
    name, _, value = text.partition("=")
    for part in name.split("."):
        values = values[part]
    return values == parse_yaml(value, text).plain()


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*G(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 32GB")
    return int(float(match.group(1)) * GIB)


def _cards(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of cards, at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="YAML", help="of the run")
    what.add_argument("--model", metavar="PATH", help="of a server: folder of weights, config.json or YAML")
    parser.add_argument("--cards", type=_cards, metavar="N", help="default: those of the file")
    parser.add_argument("--memory", type=_memory, metavar="32GB", help="of a card; a GB has 2^30 bytes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the file's values")
    server = parser.add_argument_group("a server, with --model")
    server.add_argument("--slots", type=_COUNT, metavar="N", help=f"requests at a time (default: {SLOTS})")
    server.add_argument(
        "--kv-cache", choices=tuple(STORAGE), help="type of keys and values of the C++ kernels of a CPU"
    )
    server.add_argument("--context", type=_COUNT, metavar="N", help="most tokens of one with its answer (seq_length)")
    server.add_argument("--quantize", type=int, choices=BITS, help="weights of so many bits (those of the files)")
    server.add_argument("--quantize-group", type=int, choices=GROUPS, help="with --quantize 4: inputs of a scale (32)")
    server.add_argument("--max-adapters", type=_COUNT, metavar="N", help="adapters at a time (0)")
    server.add_argument("--max-lora-rank", type=_COUNT, metavar="N", help="largest rank of LoRA adapters (16)")
    server.add_argument("--max-prefix", type=_COUNT, metavar="N", help="longest P-Tuning prefix (0)")
    server.add_argument(
        "--device_target", choices=("CPU", "Ascend"), default="Ascend", help="a CPU computes in float32 (Ascend)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
