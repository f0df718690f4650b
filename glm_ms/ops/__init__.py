"""Portable operators and the fused kernels of devices."""
