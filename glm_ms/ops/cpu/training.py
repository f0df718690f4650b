"""C++ kernels of a training step; `glm_ms.ops.training` defines what they compute."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.ops import portable
from glm_ms.ops.cpu import library
from glm_ms.ops.cpu.blas import has_blas
from glm_ms.ops.cpu.custom import custom


def has_kernels() -> bool:
    """Whether there is a library of kernels."""
    return library.load() is not None


class SquareSum(nn.Cell):
    """As the portable operator: one pass over each tensor at the speed of memory, one result for any number of threads.

    Blocks are added up in float32, their sums in double.
    """

    usable = staticmethod(has_kernels)

    def __init__(self) -> None:
        super().__init__()
        self.sum = custom("square_sum", [ms.float32], [1])

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Tensors -> float32 scalar; those of another type are converted."""
        return ops.reshape(self.sum(*[ops.cast(tensor, ms.float32) for tensor in tensors]), ())


class AdamWUpdate(nn.Cell):
    """As the portable operator, in one pass over weight, moments and gradient, and without a scaled gradient.

    The moments have the same bits as those of the portable operator; its division is not exactly rounded, this one is,
    so weights may differ by 1e-6 of an update and the rounding of the weight.
    """

    usable = staticmethod(has_kernels)

    def __init__(self) -> None:
        super().__init__()
        self.update = custom("adamw", [ms.float32], [1], in_place=True)

    def construct(
        self, weight: Parameter, m: Parameter, v: Parameter, gradient: Tensor, rate: Tensor, beta1: Tensor,
        beta2: Tensor, eps: Tensor, decay: Tensor, scale: Tensor
    ) -> Tensor:  # fmt: skip
        """As the portable operator."""
        return self.update(weight, m, v, gradient, rate, beta1, beta2, eps, decay, scale)


class OutputLoss(nn.Cell):
    """Output layer and sum of the cross entropy of the labelled tokens in one, for training.

    Only labelled tokens cost a product, by up to 512 at a time, so that their scores are never all in memory. Loss
    and gradients are computed together: without the gradients it is wasteful. Needs `has_blas`.

    Args:
        trains_weight: whether the gradient of the weight is wanted.
        bfloat16: whether the operands of the products are rounded to bfloat16.
    """

    usable = staticmethod(has_blas)

    def __init__(self, trains_weight: bool, bfloat16: bool = False) -> None:
        super().__init__()
        self.trains_weight = trains_weight
        name = "output_loss" + "_bf16" * bfloat16 + "_frozen" * (not trains_weight)
        self.run = custom(name, [ms.float32] * (3 if trains_weight else 2), inputs=3)
        self.scale_hidden, self.scale_weight = (
            custom("scale", [ms.float32], inputs=2, in_place=True) for _ in range(2)
        )

    def construct(self, hidden: Tensor, weight: Parameter, targets: Tensor) -> tuple[Tensor, ...]:
        """hidden float32 [N, H], weight float32 [V, H], targets int32 [N] in [0, V), or -100 for none -> loss
        float32 [1]; what follows it is for the derivative."""
        return self.run(hidden, weight, targets)

    def bprop(
        self, hidden: Tensor, weight: Parameter, targets: Tensor, out: tuple[Tensor, ...], gradient: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The gradients of the sum times that of the loss, in their memory."""
        of_hidden = ops.depend(out[1], self.scale_hidden(out[1], gradient[0]))
        if not self.trains_weight:
            return of_hidden, ops.zeros_like(weight), ops.zeros_like(targets)
        of_weight = ops.depend(out[2], self.scale_weight(out[2], gradient[0]))
        return of_hidden, of_weight, ops.zeros_like(targets)


class BFloat16Product(nn.Cell):
    """x weight^T and its gradients, with operands rounded to bfloat16 and sums of float32. Needs `has_blas`."""

    usable = staticmethod(has_blas)

    def __init__(self) -> None:
        super().__init__()
        self.product, self.input_gradient, self.weight_gradient = (
            custom(name, [ms.float32], inputs=2)
            for name in ("bf16_product", "bf16_input_gradient", "bf16_weight_gradient")
        )

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x float32 [N, K], weight float32 [M, K] -> float32 [N, M]."""
        return self.product(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, _: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the result, float32 [N, M] -> those of x and weight. What nobody uses is not computed."""
        return self.input_gradient(gradient, weight), self.weight_gradient(gradient, x)


class RMSNormalize(nn.Cell):
    """As the portable operator `cell`, for float32; each direction is one pass over the rows."""

    usable = staticmethod(has_kernels)

    def __init__(self, cell: portable.RMSNormalize) -> None:
        super().__init__()
        self.eps, self.added = cell.eps, Tensor(cell.eps, ms.float32)
        self.norm = custom("rms_norm", [ms.float32], inputs=3)
        self.input_gradient = custom("rms_norm_gradient", [ms.float32], inputs=4)
        self.weight_gradient = custom("rms_norm_weight_gradient", [ms.float32], inputs=4)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x float32 [..., H], weight float32 [H] -> [..., H]."""
        return self.norm(x, weight, self.added)

    def bprop(self, x: Tensor, weight: Tensor, _: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the result, [..., H] -> those of x and weight. What nobody uses is not computed."""
        inputs = x, weight, self.added, gradient
        return self.input_gradient(*inputs), self.weight_gradient(*inputs)


class SwiGLU(nn.Cell):
    """As the portable operator `cell`, for float32; each direction is one pass."""

    usable = staticmethod(has_kernels)

    def __init__(self, cell: portable.SwiGLU) -> None:
        super().__init__()
        self.activate, self.gradient = (
            custom(name, [ms.float32], inputs=inputs) for name, inputs in (("swiglu", 1), ("swiglu_gradient", 2))
        )

    def construct(self, x: Tensor) -> Tensor:
        """x float32 [..., 2F] -> [..., F]."""
        return self.activate(x)

    def bprop(self, x: Tensor, _: Tensor, gradient: Tensor) -> tuple[Tensor]:
        """The gradient of the result, [..., F] -> that of x."""
        return (self.gradient(x, gradient),)


class AddBias(nn.Cell):
    """The sum of rows and a bias. MindSpore's Add keeps an index of 8 bytes for each element between steps."""

    usable = staticmethod(has_kernels)

    def __init__(self) -> None:
        super().__init__()
        self.add = custom("add_bias", [ms.float32], inputs=2)
        self.sum = ops.ReduceSum()

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        """x float32 [N, M], bias float32 [M] -> [N, M]."""
        return self.add(x, bias)

    def bprop(self, x: Tensor, bias: Tensor, _: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the result, [N, M] -> those of x and bias. What nobody uses is not computed."""
        return gradient, self.sum(gradient, 0)


class ApplyRotary(nn.Cell):
    """As the portable operator `cell`, for float32, with the same bits; each direction is one pass."""

    usable = staticmethod(has_kernels)

    def __init__(self, cell: portable.ApplyRotary) -> None:
        super().__init__()
        self.turn = custom("rotary", [ms.float32], inputs=3)
        self.turn_back = custom("rotary_gradient", [ms.float32], inputs=3)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x float32 [B, S, N, D], cos and sin float32 [B, S, 1, D] -> [B, S, N, D]."""
        return self.turn(x, cos, sin)

    def bprop(self, x: Tensor, cos: Tensor, sin: Tensor, _: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the result -> that of x; the angles are constant."""
        return self.turn_back(gradient, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)


class Attention(nn.Cell):
    """softmax(query key^T / sqrt(D) + bias) value of groups of heads, without memory for all scores.

    Scores of 128 queries of a head are in memory together, and computed again for the gradients. Keys behind the last
    one that such a block sees cost nothing. `operator` is the name of the C++ operator, which says what it takes in
    place of the bias.
    """

    def __init__(self, operator: str = "attention") -> None:
        super().__init__()
        self.attend = custom(operator, [ms.float32], inputs=4)
        self.gradients = custom(f"{operator}_gradient", [ms.float32] * 3, inputs=6)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """As `GroupedAttention`."""
        return self.attend(query, key, value, bias)

    def bprop(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, result: Tensor, gradient: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradient of the result -> those of query, key and value; the bias is constant."""
        of_query, of_key, of_value = self.gradients(query, key, value, bias, result, gradient)
        return of_query, of_key, of_value, ops.zeros_like(bias)


class GroupedAttention(nn.Cell):
    """As the portable operator `cell`, which must have no dropout, for float32. Needs `has_blas`."""

    usable = staticmethod(has_blas)
    # Whether it takes packed rows too.
    packs = True

    def __init__(self, cell: portable.GroupedAttention) -> None:
        super().__init__()
        self.attention, self.packed_attention = Attention(), Attention("packed_attention")

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, _: Tensor | None = None) -> Tensor:
        """query float32 [B, S, N, D]; key, value float32 [B, T, G, D]; bias float32 [B or 1, 1, S, T], 0 where a query
        sees a key, else `HIDDEN_SCORE` -> [B, S, N * D]. Of packed rows B is the number of tokens, S and T are 1, and
        their row numbers, int32 [B], are in place of the bias: see `glm_ms.engine.step.packing`."""
        if bias.ndim == 1:
            return self.packed_attention(query, key, value, bias)
        return self.attention(query, key, value, bias)
