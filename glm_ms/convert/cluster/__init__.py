"""Sharded checkpoints: strategy files, layouts, resharding."""
