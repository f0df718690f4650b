"""Checkpoints of training runs: written whole, found, checked and restored."""
