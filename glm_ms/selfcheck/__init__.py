"""Checks of kernels and numbers on a new machine."""
