"""Checkpoints: read, checked against a config, converted and written as streams of single tensors."""
