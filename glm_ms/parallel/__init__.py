"""Parallel strategies, attached to a network from outside, and what they mean for every parameter.

`config` and `slices` need no MindSpore.
"""
