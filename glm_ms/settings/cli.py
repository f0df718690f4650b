"""The command line of `run_glm.py`: arguments -> flags and overrides -> settings."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from glm_ms import spelling
from glm_ms.program import command_name
from glm_ms.settings.errors import Problem, SettingsError
from glm_ms.settings.loader import read_settings, repeated
from glm_ms.settings.machine import machine_problems
from glm_ms.settings.schema import FLAGS, Settings, leaf_keys
from glm_ms.storage.suggest import nearest

PROGRAM = "run_glm.py"
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=.*", re.DOTALL)
_GLUED = re.compile(r"(.+?\.ya?ml)\s*(--\w.*)", re.DOTALL)  # `--config x.yaml--run_mode eval`
_EXAMPLES = """examples:
  python run_glm.py --config configs/tiny/finetune_glm3_tiny.yaml
  python run_glm.py --config configs/tiny/finetune_glm3_tiny.yaml --epochs 2 lr_schedule.learning_rate=1e-3
  python run_glm.py --config configs/tiny/eval_glm3_tiny.yaml metric.type=[ADGENMetric,PerplexityMetric]
  python run_glm.py --config configs/glm3/predict_glm3_6b_800T_A2_64G.yaml --device_target CPU \\
      --load_checkpoint chatglm3-6b processor.tokenizer.vocab_file=chatglm3-6b/tokenizer.model \\
      --predict_data "你好" generation.max_new_tokens=64
  msrun --worker_num 8 --local_worker_num 8 run_glm.py \\
      --config configs/glm3/run_glm3_6b_finetune_800T_A2_64G.yaml
"""
# Flags of run_mindformer.py that do not exist here; `tools` as of `spelling.TOOLS`.
FLAGS_GONE = {
    "options": "write the overrides alone, key.sub=value",
    "sink_mode": "every step runs by itself; remove it",
    "profile": "there is no profiler; remove it",
    "remote_save_url": "nothing is uploaded; remove it",
    "auto_trans_ckpt": "whole checkpoints are loaded and need no transformation; remove it",
    "src_strategy_path_or_dir": "whole checkpoints are loaded; merge slices first with {tools[transform_ckpt]}",
    "strategy_load_checkpoint": "whole checkpoints are loaded; merge slices first with {tools[transform_ckpt]}",
    "only_save_strategy": "there is no run that only writes strategies",
}
_OVERRIDES = "--key.sub"
# Every spelling -> flag name.
_SPELLINGS = {name: name for name in FLAGS} | {flag.former: name for name, flag in FLAGS.items() if flag.former}


class Arguments(NamedTuple):
    """Parsed arguments: path of the YAML, flag name -> text, `key.sub=value` texts in order."""

    config: str
    flags: dict[str, str]
    overrides: list[str]


def parse_args(argv: Sequence[str]) -> Arguments:
    """Sorts arguments into flags and overrides; `load_settings` checks their values.

    An override is written `key.sub=value`, `--key.sub=value` or `--key.sub value`. `--help` and `--help_keys` print
    their text and exit with status 0. Raises SettingsError for an unknown flag, a flag without its value, a flag or key
    that is given twice, no --config.
    """
    spelling.register_flags(_argument_names())
    known, problems = _unambiguous(argv)
    values = vars(build_parser().parse_args(known))
    problems += repeated(values["overrides"])
    if values["config"] is None:
        problems.append("--config is missing: the YAML file of the run; see configs/")
    if problems:
        raise SettingsError([Problem("", problem, where="command line") for problem in problems])
    flags = {name: values[name] for name in FLAGS if values[name] is not None}
    return Arguments(values["config"], flags, values["overrides"])


def build_parser() -> argparse.ArgumentParser:
    """The parser of the arguments that `_unambiguous` returns."""
    parser = argparse.ArgumentParser(
        usage=f"{_command()} --config FILE [--flag value ...] [key.sub=value ...]",
        description="Finetune, evaluate and run ChatGLM2 / ChatGLM3 with the settings of a YAML file.",
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("--help_keys", action=_HelpKeys, nargs=0, help="show every key with its default")
    parser.add_argument("--config", type=_unprotected, metavar="FILE", help="the YAML file of the run (required)")
    about = "set any key of the YAML, also written key.sub=value"
    several: dict[str, Any] = {"action": "append", "default": [], "dest": "overrides"}
    parser.add_argument(_OVERRIDES, type=_unprotected, metavar="VALUE", help=about, **several)
    for name, flag in FLAGS.items():
        spellings = [f"--{spelling}" for spelling, meant in _SPELLINGS.items() if meant == name]
        doc = flag.about + (leaf_keys()[flag.key].metadata["doc"] if flag.key else "")
        bare: dict[str, Any] = {"nargs": "?", "const": "=True"} if flag.bare else {}
        parser.add_argument(*spellings, type=_unprotected, dest=name, metavar=flag.value, help=doc, **bare)
    return parser


class _HelpKeys(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from glm_ms.settings.reference import keys_help

        sys.stdout.write(keys_help())
        parser.exit(0)


def _unprotected(text: str) -> str:
    """The value of an argument that `_unambiguous` has written as `--flag==value`."""
    return text[1:]


def _unambiguous(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments that argparse reads without doubt, and the problems of the others.

    Flags become `--flag==value`, overrides `--key.sub==key.sub=value`; the second "=" protects the value `--`, which
    argparse drops. A value may begin with a dash, as in `--predict_data -5`, but not with two. A flag whose value is
    optional does not take the override that follows it.
    """
    rest, known, problems, seen = list(argv), list[str](), list[str](), dict[str, str]()
    while rest:
        token = rest.pop(0)
        name, equals, value = token[2:].partition("=") if token.startswith("--") else ("", "", "")
        meant = _SPELLINGS.get(name, name)
        flag = FLAGS.get(meant)
        bare = flag is not None and flag.bare
        next_is_value = bool(rest) and not equals and not rest[0].startswith("--")
        if token in ("-h", "--help", "--help_keys"):
            known.append(token)
        elif flag is not None or name == "config" or "." in name:
            if meant in seen and "." not in name:
                also = "" if seen[meant] == name else f", also as --{seen[meant]}"
                problems.append(f"--{name} is given twice{also}; remove one")
            seen[meant] = name
            if next_is_value and not (bare and _OVERRIDE.fullmatch(rest[0])):
                equals, value = "=", rest.pop(0)
            if name == "config" and (glued := _GLUED.fullmatch(value)):
                value, more = glued.groups()
                problems.append(f"--config: a space is missing, or quotes are too many; write {value} {more}")
                rest = [*more.split(), *rest]
            if equals:
                known.append(f"{_OVERRIDES}=={name}={value}" if "." in name else f"--{name}=={value}")
            elif bare:
                known.append(token)
            else:
                problems.append(f"{token}: a value must follow ({token}=VALUE if it begins with --)")
        elif _OVERRIDE.fullmatch(token):
            known.append(f"{_OVERRIDES}=={token}")
        elif token.startswith("--"):
            problems.append(f"--{name}: unknown flag{_flag_hint(name)}")
            if next_is_value and not rest[0].startswith("-") and not _OVERRIDE.fullmatch(rest[0]):
                rest.pop(0)  # probably its value
        elif token.endswith((".yaml", ".yml")):
            problems.append(f"{token!r}: unexpected; did you mean --config {token}?")
        else:
            problems.append(f"{token!r}: unexpected; flags begin with --, overrides are written key.sub=value")
    return known, problems


def _argument_names() -> dict[str, str]:
    """Last part of a key -> how a message names it: its flag, or else the whole key if no other one ends so."""
    keys = list(leaf_keys())
    ends = Counter(key.rpartition(".")[2] for key in keys)
    whole = {end: key for key in keys if ends[end := key.rpartition(".")[2]] == 1}
    return {**whole, **{name: f"--{name}" for name in FLAGS}}


def _flag_hint(name: str) -> str:
    if name in FLAGS_GONE:
        return f"; {FLAGS_GONE[name].format(tools=spelling.TOOLS)}"
    near = nearest(name.replace("-", "_"), ["config", "help", "help_keys", *_SPELLINGS])
    if near:
        return f"; did you mean {' or '.join(f'--{known}' for known in near)}?"
    keys = [key for key in leaf_keys() if key.rpartition(".")[2] == name]
    return f"; as an override: {keys[0]}=VALUE" if keys else "; see --help"


def _command() -> str:
    return command_name(f"python {PROGRAM}")


def settings_from_command_line(argv: Sequence[str] | None = None) -> Settings:
    """The settings of a command line (None: that of this process), checked also against this machine.

    Writes the problems of a wrong command line or configuration to stderr and exits with status 2.
    """
    try:
        config, flags, overrides = parse_args(sys.argv[1:] if argv is None else argv)
        settings, problems = read_settings(config, overrides, flags)
        problems += machine_problems(settings)
        if problems:
            raise SettingsError(problems)
    except SettingsError as error:
        report = "".join(f"{command_name(PROGRAM)}: error: {problem}\n" for problem in error.problems)
        sys.stderr.write(f"{report}Try: {_command()} --help\n")
        raise SystemExit(2) from None
    return settings
