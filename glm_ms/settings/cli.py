"""The command line of `run_glm.py`: arguments -> flags and overrides -> settings."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from glm_ms.settings.device import device_problems
from glm_ms.settings.errors import SettingsError
from glm_ms.settings.flags import FLAGS, FLAGS_GONE, FORMER_FLAGS
from glm_ms.settings.loader import read_settings
from glm_ms.settings.schema import Settings, leaf_keys
from glm_ms.storage.suggest import did_you_mean

PROGRAM = "run_glm.py"
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=.*", re.DOTALL)
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


class Arguments(NamedTuple):
    """What was typed.

    Attributes:
        config: path of the YAML.
        flags: flag name -> text.
        overrides: `key.sub=value` texts, in order.
    """

    config: str
    flags: dict[str, str]
    overrides: list[str]


class HelpRequested(Exception):  # noqa: N818 - not an error
    """`--help` or `--help_keys` was given; the message is the text to show."""


def parse_args(argv: Sequence[str]) -> Arguments:
    """Sorts arguments into flags and overrides; values are checked by `load_settings`.

    An override is written `key.sub=value`, `--key.sub=value` or `--key.sub value`.

    Args:
        argv: arguments without the program name.

    Raises:
        SettingsError: an unknown flag, a flag without its value, no --config.
        HelpRequested: --help, -h or --help_keys.
    """
    reader = _Reader(argv)
    reader.read()
    if reader.problems:
        raise SettingsError([f"command line: {problem}" for problem in reader.problems])
    return Arguments(reader.config or "", reader.flags, reader.overrides)


class _Reader:
    """Walks the arguments once. argparse is not used: overrides stand anywhere among the flags, and a flag
    whose value may be left out must not swallow the override that follows it."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.rest = list(argv)
        self.config: str | None = None
        self.flags: dict[str, str] = {}
        self.overrides: list[str] = []
        self.problems: list[str] = []

    def read(self) -> None:
        while self.rest:
            token = self.rest.pop(0)
            if token in ("-h", "--help", "--help_keys"):
                raise HelpRequested(keys_help() if token == "--help_keys" else usage())
            if token.startswith("--"):
                self.flag(*token[2:].partition("="))
            elif _OVERRIDE.fullmatch(token):
                self.overrides.append(token)
            else:
                self.problems.append(_stray(token))
        if self.config is None:
            self.problems.append("--config is missing: the YAML file of the run; see configs/")

    def flag(self, name: str, equals: str, value: str) -> None:
        name = FORMER_FLAGS.get(name, name)
        if name != "config" and name not in FLAGS and "." not in name:
            self.problems.append(f"--{name}: unknown flag{_flag_hint(name)}")
            follower = self.rest[0] if self.rest and not equals else "-"
            if not follower.startswith("-") and not _OVERRIDE.fullmatch(follower):
                self.rest.pop(0)  # most likely its value; to report that as well would only confuse
            return
        if not equals:
            value = self.value_of(name)
        if name == "config":
            self.config = value
        elif name in FLAGS:
            self.flags[name] = value
        else:
            self.overrides.append(f"{name}={value}")

    def value_of(self, name: str) -> str:
        bare = FLAGS[name].bare if name in FLAGS else None
        if self.value_follows() and (bare is None or not _OVERRIDE.fullmatch(self.rest[0])):
            return self.rest.pop(0)
        if bare is None:
            self.problems.append(f"--{name}: a value must follow (--{name}=VALUE if it begins with --)")
            return ""
        return bare

    def value_follows(self) -> bool:
        return bool(self.rest) and not self.rest[0].startswith("--")


def settings_from_command_line(argv: Sequence[str] | None = None) -> Settings:
    """The settings a command line asks for, checked also against the devices of this machine.

    On a wrong command line or configuration it writes the report to stderr and exits with status 2;
    on --help it writes the help to stdout and exits with status 0.

    Args:
        argv: arguments without the program name; None: those of this process.
    """
    try:
        config, flags, overrides = parse_args(sys.argv[1:] if argv is None else argv)
        settings, problems = read_settings(config, overrides, flags)
        problems += device_problems(settings)
        if problems:
            raise SettingsError(problems)
    except HelpRequested as request:
        sys.stdout.write(str(request))
        raise SystemExit(0) from None
    except SettingsError as error:
        report = "".join(f"{PROGRAM}: error: {problem}\n" for problem in error.problems)
        sys.stderr.write(f"{report}Try: python {PROGRAM} --help\n")
        raise SystemExit(2) from None
    return settings


def usage() -> str:
    """The text of --help."""
    rows = [("--config FILE", "the YAML file of the run (required)")]
    for name, flag in FLAGS.items():
        former = f" (also --{flag.former})" if flag.former else ""
        rows.append((f"--{name} {flag.value}", flag.doc + former))
    rows += [
        ("key.sub=value", "sets any key of the YAML, also written --key.sub value"),
        ("--help, --help_keys", "this text; every key with its default"),
    ]
    width = max(len(left) for left, _ in rows) + 2
    lines = "".join(f"  {left:<{width}}{right}\n" for left, right in rows)
    return (
        f"usage: python {PROGRAM} --config FILE [--flag value ...] [key.sub=value ...]\n\n"
        f"Finetune, evaluate and run ChatGLM2 / ChatGLM3 as a YAML file says.\n\n{lines}\n{_EXAMPLES}"
    )


def keys_help() -> str:
    """The text of --help_keys: each key, its default and what it means."""
    lines = []
    for name, field in leaf_keys().items():
        lines.append(f"{name} = {_shown(field)}\n    {field.metadata['doc']}\n")
    return "".join(lines)


def _shown(field: dataclasses.Field) -> str:
    value: Any = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if value is None:
        return "null"
    return '""' if value == "" else str(value)


def _flag_hint(name: str) -> str:
    if name in FLAGS_GONE:
        return f"; {FLAGS_GONE[name]}"
    hint = did_you_mean(name.replace("-", "_"), ["config", "help", *FLAGS, *FORMER_FLAGS])
    if hint:
        return hint.replace("did you mean ", "did you mean --").replace(" or ", " or --")
    near = [key for key in leaf_keys() if key.rpartition(".")[2] == name]
    return f"; as an override: {near[0]}=VALUE" if near else "; see --help"


def _stray(token: str) -> str:
    if token.endswith((".yaml", ".yml")):
        return f"{token!r}: unexpected; did you mean --config {token}?"
    return f"{token!r}: unexpected; flags begin with --, overrides are written key.sub=value"
