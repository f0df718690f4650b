"""Run by the rig: compiles every fused cell, and networks made of them, for the Ascend target."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import rig
from mindspore import Tensor, nn, ops

from glm_ms.generation.pages import PAGE
from glm_ms.kernels.cases import OverPages, Product, product_case
from glm_ms.model.cache import BlockCache, CopyPages, KVCache, PagedGLM, WritePage
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.model.loss import GLMWithLoss
from glm_ms.ops import ascend
from glm_ms.ops.registry import OPERATORS, fuse_kernels
from glm_ms.quant import Quantization
from glm_ms.quant.network import quantize_network

ALIVE: list[nn.Cell] = []  # the graph parser knows cells by their address
BATCH, LENGTH, HEADS, GROUPS, DIM, HIDDEN, CAPACITY = 2, 6, 4, 2, 16, 64, 16


def tensor(*shape: int, dtype: ms.Type) -> Tensor:
    return Tensor(np.ones(shape, np.float32), dtype)


class Gradients(nn.Cell):
    """Gradients of all inputs of a cell."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.cell = cell
        self.grad = ops.GradOperation(get_all=True)

    def construct(self, *inputs: Tensor) -> tuple:
        return self.grad(self.cell)(*inputs)


class Step(nn.Cell):
    """Loss and gradients of a network."""

    def __init__(self, with_loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = with_loss
        self.gradients = ops.value_and_grad(
            with_loss, None, ms.ParameterTuple(with_loss.trainable_params()), has_aux=True
        )

    def construct(self, *inputs: Tensor) -> tuple:
        return self.gradients(*inputs)


def cases(dtype: ms.Type) -> list[tuple[str, type, tuple, tuple[Tensor, ...]]]:
    """Name, class or what makes the cell, arguments, inputs."""
    half = dtype != ms.float32
    rows = (BATCH, LENGTH, HIDDEN)
    heads, table = (BATCH, LENGTH, HEADS, DIM), (BATCH, LENGTH, 1, DIM)
    keys = (BATCH, LENGTH, GROUPS, DIM)
    found = [
        (
            "norm", ascend.FusedRMSNormalize, (1e-5,),
            (tensor(*rows, dtype=dtype), tensor(HIDDEN, dtype=dtype)),
        ),
        (
            "norm_mixed", ascend.FusedRMSNormalize, (1e-5,),
            (tensor(*rows, dtype=dtype), tensor(HIDDEN, dtype=ms.float32)),
        ),
        (
            "rotary", ascend.FusedRotary, (),
            (tensor(*heads, dtype=dtype), tensor(*table, dtype=dtype), tensor(*table, dtype=dtype)),
        ),
    ]  # fmt: skip
    if not half:
        return found
    qkv = (tensor(*heads, dtype=dtype), tensor(*keys, dtype=dtype), tensor(*keys, dtype=dtype))
    for name, mask_batch in (("flash", BATCH), ("flash_one_mask", 1)):
        bias = tensor(mask_batch, 1, LENGTH, LENGTH, dtype=ms.float32)
        found.append((name, ascend.FlashAttention, (HEADS, DIM), (*qkv, bias)))
    for name, length in (("pages", LENGTH), ("pages_step", 1)):
        cell = ascend.PagedFlashAttention(HEADS, GROUPS, DIM)
        new = tensor(BATCH, length, GROUPS, DIM, dtype=dtype)
        found.append((
            name, OverPages, (cell, dtype, np.ones((2, BATCH, 2 * PAGE, GROUPS, DIM), np.float32), length),
            (
                tensor(BATCH, length, HEADS, DIM, dtype=dtype), new, new,
                tensor(BATCH, 1, length, 2 * PAGE, dtype=ms.float32)
            )
        ))  # fmt: skip
    for product in (Product(8, HIDDEN, 96, 0), Product(4, HIDDEN, 96, 32)):
        case = product_case(product, BATCH * LENGTH, np.random.default_rng(0))
        fused = OPERATORS[case.operator, "Ascend"].replacing(case.portable(dtype), dtype)
        found.append(
            (f"int{product.bits}", lambda cell: cell, (fused,), (tensor(BATCH * LENGTH, HIDDEN, dtype=dtype),))
        )
    query = tensor(BATCH, 1, HEADS, DIM, dtype=dtype)
    bias = tensor(BATCH, 1, 1, LENGTH, dtype=ms.float32)
    found.append(("flash_step", ascend.FlashAttention, (HEADS, DIM), (query, *qkv[1:], bias)))
    return found


def compile_networks() -> None:
    """A whole network, with its loss and its gradients, for each compute type."""
    alive = []  # the graph parser knows cells by their address
    for name in ("float32", "float16", "bfloat16"):
        config = GLMConfig(
            num_layers=2, padded_vocab_size=64, hidden_size=HIDDEN, ffn_hidden_size=96, kv_channels=DIM,
            num_attention_heads=HEADS, multi_query_group_num=GROUPS, seq_length=32, compute_dtype=name
        )  # fmt: skip
        network = GLMNetwork(config)
        names = [parameter.name for parameter in network.get_parameters()]
        for line in fuse_kernels(network, getattr(ms, name)):
            print(f"FUSED {name} {line}")
        assert [parameter.name for parameter in network.get_parameters()] == names
        with_loss = GLMWithLoss(network)
        ids = Tensor(np.ones((BATCH, LENGTH), np.int32))
        slots = Tensor(np.arange(LENGTH, dtype=np.int32))

        alive.append(Step(with_loss))
        alive[-1].compile(ids, ids, ids, ids, slots)
        print(f"OK network {name}", flush=True)
        cache = KVCache(config, 2 * BATCH, PAGE)
        for batch, length in ((1, LENGTH), (BATCH, 1)):  # a chunk of a prompt, a step
            cell = PagedGLM(network, cache, 2 * PAGE)
            tokens, indices = np.ones((batch, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (batch, 1))
            pages = np.arange(2 * batch).reshape(batch, 2)
            rows = cache.page_rows(np.take_along_axis(pages, indices // PAGE, 1), indices % PAGE)
            arrays = [tokens, tokens, indices, np.zeros(batch, np.int32), rows, cache.page_blocks(pages), None]
            if length > 1:
                arrays.append(np.array([length - 1], np.int32))
            cell.compile(*(None if array is None else Tensor(array) for array in arrays))
            alive.append(cell)
            print(f"OK {'prefill' if length > 1 else 'step'} {name}", flush=True)
        alive.append(compile_pages(network, config))
        print(f"OK paged {name}", flush=True)


def compile_quantized() -> None:
    """Networks with quantized weights. In float32, which the kernel does not take, products stay portable."""
    for name in ("float32", "float16", "bfloat16"):
        for quantization in (Quantization(8), Quantization(4, 32)):
            config = GLMConfig(
                num_layers=2, padded_vocab_size=64, hidden_size=HIDDEN, ffn_hidden_size=96, kv_channels=DIM,
                num_attention_heads=HEADS, multi_query_group_num=GROUPS, seq_length=32, compute_dtype=name
            )  # fmt: skip
            network = GLMNetwork(config)
            quantize_network(network, quantization)
            lines = fuse_kernels(network, getattr(ms, name))
            fused = f"int{quantization.bits} product: fused kernel in 9 cells" in lines
            assert fused == (name != "float32"), lines
            ids, slots = Tensor(np.ones((BATCH, LENGTH), np.int32)), Tensor(np.arange(LENGTH, dtype=np.int32))
            ALIVE.append(network)
            network.compile(ids, ids, ids, slots)
            print(f"OK int{quantization.bits} {name}", flush=True)


def compile_pages(network: GLMNetwork, config: GLMConfig) -> list[nn.Cell]:
    """A chunk of a prompt, a step, a copy and a write over the pages of a cache."""
    whole = config.compute_dtype != "float32"
    cache = (BlockCache if whole else KVCache)(config, 6, PAGE)
    assert network.transformer.encoder.layers[0].self_attention.cached_attention.whole_pages == whole
    cells = []
    for batch, length, last in ((1, PAGE, np.array([3])), (BATCH, 1, None)):
        cell, tokens = PagedGLM(network, cache, 2 * PAGE), np.ones((batch, length), np.int32)
        pages = np.full((batch, 2), 2)
        arrays = [
            tokens, tokens, tokens, np.zeros(batch), cache.page_rows(pages[:, :1] + 0 * tokens, 0 * tokens),
            cache.page_blocks(pages), None, last
        ]  # fmt: skip
        cell.compile(*(None if array is None else Tensor(array.astype(np.int32)) for array in arrays))
        cells.append(cell)
    numbers = Tensor(np.array([2], np.int32))
    content = cache.page_content(np.ones((len(cache.tables), PAGE, GROUPS, DIM), np.float32))
    copy, write = CopyPages(cache), WritePage(cache)
    copy.compile(numbers, numbers)
    write.compile(numbers, Tensor(content, cache.keys[0].dtype))
    return [*cells, copy, write]


rig.start()
for dtype in (ms.float32, ms.float16, ms.bfloat16):
    for name, kind, arguments, inputs in cases(dtype):
        kind(*arguments).compile(*inputs)
        print(f"OK forward {name} {dtype}", flush=True)
        if kind is OverPages or name.startswith("int"):
            continue
        Gradients(kind(*arguments)).compile(*inputs)
        print(f"OK backward {name} {dtype}", flush=True)
compile_networks()
compile_quantized()
rig.done()
