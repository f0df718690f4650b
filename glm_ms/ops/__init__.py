"""Portable operators. Each is a cell built from MindSpore primitives held as attributes, so that a parallel
strategy can be attached to a primitive from outside. `fusion` puts Ascend's fused kernels in their place."""
