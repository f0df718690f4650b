"""SwiGLU."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class SwiGLU(nn.Cell):
    """silu(first half) * second half of the last axis, silu(x) = x sigmoid(x). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self) -> None:
        super().__init__()
        self.split = ops.Split(axis=-1, output_num=2)
        self.sigmoid, self.gate, self.mul = ops.Sigmoid(), ops.Mul(), ops.Mul()

    def construct(self, x: Tensor) -> Tensor:
        """x [..., 2F] -> [..., F]."""
        gate, up = self.split(x)
        return self.gated(gate, up)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up [..., F] -> silu(gate) * up [..., F]."""
        return self.mul(self.gate(gate, self.sigmoid(gate)), up)
