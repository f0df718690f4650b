"""Checkpoints cut into slices for several cards: strategy files, layouts, resharding."""
