"""Settings of a run: a YAML file and a command line -> one checked object, without MindSpore, in milliseconds."""

from __future__ import annotations

from glm_ms.settings.cli import Arguments, parse_args, settings_from_command_line
from glm_ms.settings.errors import Problem, SettingsError
from glm_ms.settings.loader import load_data_settings, load_settings, read_settings
from glm_ms.settings.machine import ascend_cards, machine_problems
from glm_ms.settings.schema import FLAGS, Settings, resolve_vocab_size

__all__ = [
    "FLAGS", "Arguments", "Problem", "Settings", "SettingsError", "ascend_cards", "load_data_settings",
    "load_settings", "machine_problems", "parse_args", "read_settings", "resolve_vocab_size",
    "settings_from_command_line",
]  # fmt: skip
