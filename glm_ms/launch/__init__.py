"""Starts a run on many cards: rank tables of Ascend servers, and one process per card. Needs no MindSpore."""
