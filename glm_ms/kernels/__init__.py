"""Fused kernels against the portable operators, and which of them a run uses."""
