"""Settings of a run: a YAML file and a command line -> one checked object.

Nothing here imports MindSpore or MindFormers: a misspelt key is reported in milliseconds.
"""

from __future__ import annotations

from glm_ms.settings.cli import Arguments, HelpRequested, parse_args, settings_from_command_line
from glm_ms.settings.data_checks import seq_length_problem
from glm_ms.settings.device import ascend_cards, check_device
from glm_ms.settings.errors import SettingsError
from glm_ms.settings.flags import FLAGS
from glm_ms.settings.loader import load_settings
from glm_ms.settings.schema import Settings
from glm_ms.settings.vocabulary import resolve_vocab_size

__all__ = [
    "FLAGS",
    "Arguments",
    "HelpRequested",
    "Settings",
    "SettingsError",
    "ascend_cards",
    "check_device",
    "load_settings",
    "parse_args",
    "resolve_vocab_size",
    "seq_length_problem",
    "settings_from_command_line",
]
