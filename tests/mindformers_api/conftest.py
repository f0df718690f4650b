"""Fixtures of the tests of MindFormers' interfaces: a vocabulary and runs in this process."""

from __future__ import annotations

import engine_fixtures

vocabulary, finetune = engine_fixtures.vocabulary, engine_fixtures.finetune
