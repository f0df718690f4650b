"""Portable operators and the fused kernels of devices. A portable operator is a cell whose MindSpore primitives are
attributes, so that a parallel strategy can be attached to each from outside."""
