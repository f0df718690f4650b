"""Fused Ascend kernels: their wiring with stand-ins for the kernels, their compilation with the rig."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from reference import graph_mode
from tolerances import LOGITS

from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.generation.pages import PAGE
from glm_ms.kernels.cases import SMALL, KernelCase, OverPages, kernel_cases
from glm_ms.model.cache import BlockCache, KVCache
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops import ascend, registry
from glm_ms.ops.portable import ApplyRotary, CachedAttention, GroupedAttention, RMSNormalize
from glm_ms.ops.quantized import Int4Product, Int8Product
from glm_ms.peft.adapter import AdapterError, StoredAdapter
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.peft.rows import AdapterBounds
from glm_ms.quant import Quantization
from glm_ms.quant.network import quantize_network
from glm_ms.selfcheck.kernels import fused_rows

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RIG = Path(os.environ.get("GLM_MS_SHARED", REPOSITORY.parent / "shared")) / "rig" / "run.sh"
SCRIPT = Path(__file__).resolve().parent / "rig_fused.py"


class RmsNormByFormula(nn.Cell):
    """What CANN's reference says of aclnnRmsNorm: y = x / sqrt(mean(x^2) + eps) * gamma, and 1 / sqrt(...)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def construct(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1 / ops.sqrt(ops.mean(x * x, -1, True) + self.eps)
        return x * scale * gamma, scale


class RotaryByFormula(nn.Cell):
    """aclnnRotaryPositionEmbedding, mode 1 (interleave), layout BSND with tables 1S1D."""

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mode: int) -> Tensor:
        assert mode == 1
        assert cos.shape == sin.shape == (1, x.shape[1], 1, x.shape[3])
        assert x.shape[0] == 1
        turned = ops.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
        return x * cos + turned * sin


class FlashByFormula(nn.Cell):
    """aclnnFlashAttentionScore, BNSD or BSND: scores times scale, where the mask is 1 hidden, softmax, values."""

    def __init__(self, num_heads: int, scale: float, layout: str) -> None:
        super().__init__()
        self.num_heads, self.scale, self.tokens_first = num_heads, scale, layout == "BSND"

    def construct(
        self, query: Tensor, key: Tensor, value: Tensor, shift, drop, padding, mask: Tensor, *unused
    ) -> tuple:
        assert mask.dtype == ms.uint8
        if self.tokens_first:
            query, key, value = (one.swapaxes(1, 2) for one in (query, key, value))
        assert query.shape[1] == self.num_heads
        per_group = query.shape[1] // key.shape[1]
        key, value = ops.repeat_interleave(key, per_group, 1), ops.repeat_interleave(value, per_group, 1)
        scores = ops.matmul(query, key.swapaxes(2, 3)) * self.scale
        scores = ops.where(mask.astype(ms.bool_), Tensor(-1e30, ms.float32), scores)
        mixed = ops.matmul(ops.softmax(scores, -1), value)
        return None, None, None, mixed.swapaxes(1, 2) if self.tokens_first else mixed


class StoreByFormula(nn.Cell):
    """ATB's ReshapeAndCacheOperation: token i of key and value goes to slot slot_mapping[i] of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.write = ops.ScatterNdUpdate()

    def construct(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> Tensor:
        _, size, groups, dim = keys.shape
        places = ops.stack((slot_mapping // size, slot_mapping % size), 1)
        self.write(keys, places, key.reshape(-1, groups, dim))
        return ops.depend(key, self.write(values, places, value.reshape(-1, groups, dim)))


class PagedByFormula(nn.Cell):
    """ATB's PagedAttentionOperation: a token of each sequence looks at the first context_lens keys of its blocks."""

    def __init__(self, num_heads: int, scale: float, num_groups: int) -> None:
        super().__init__()
        self.num_heads, self.num_groups, self.scale = num_heads, num_groups, scale

    def construct(self, query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, context_lens: Tensor) -> Tensor:
        batch, total, dim = blocks.shape[0], blocks.shape[1] * keys.shape[1], keys.shape[3]
        heads = (batch, self.num_heads, 1, dim)
        per_group = self.num_heads // self.num_groups
        key = ops.gather(keys, blocks.reshape(-1), 0).reshape(batch, total, self.num_groups, dim)
        value = ops.gather(values, blocks.reshape(-1), 0).reshape(batch, total, self.num_groups, dim)
        key = ops.repeat_interleave(key, per_group, 2).transpose(0, 2, 3, 1)
        value = ops.repeat_interleave(value, per_group, 2).transpose(0, 2, 1, 3)
        scores = ops.matmul(query.reshape(heads), key) * self.scale
        seen = ops.expand_dims(ops.arange(total), 0) < ops.expand_dims(context_lens, 1)
        scores = ops.where(seen.reshape(batch, 1, 1, total), scores, Tensor(-1e30, ms.float32))
        return ops.matmul(ops.softmax(scores, -1), value).reshape(query.shape)


class WeightByFormula(nn.Cell):
    """aclnnWeightQuantBatchMatmulV2 without offsets: x times weight * scale. The weight is int8 [out, in], told to be
    transposed, with scales [out]; or int4 [in, out], of two outputs the first in the low nibble, with scales
    [in / group, out]."""

    def __init__(self, kernel: nn.Cell) -> None:
        super().__init__()
        assert not kernel.transpose_x
        self.transposed, self.group = kernel.transpose_weight, kernel.antiquant_group_size

    def construct(self, x: Tensor, weight: Tensor, scale: Tensor, *unused: None) -> Tensor:
        assert unused == (None,) * 4
        assert scale.dtype == x.dtype
        values, factors = weight.asnumpy(), scale.asnumpy()
        if self.transposed:
            assert (weight.dtype, self.group, factors.shape) == (ms.int8, 0, values.shape[:1])
            matrix = values.T * factors
        else:
            assert weight.dtype == ms.qint4x2
            values = np.stack([(values << 4) >> 4, values >> 4], -1).reshape(len(values), -1)
            matrix = values * np.repeat(factors, self.group, axis=0)[: len(values)]
        return ops.matmul(x, Tensor(matrix.astype(np.float32)))


def with_stand_in(cell: nn.Cell) -> nn.Cell:
    """A fused cell whose kernel is replaced by its formula, told what the cell told the kernel."""
    if isinstance(cell, OverPages):
        for one in (cell.cell, cell.cell.flash):
            with_stand_in(one)
        return cell
    if isinstance(cell, ascend.FusedRMSNormalize):
        del cell.normalize
        cell.normalize = RmsNormByFormula(1e-5)
    elif isinstance(cell, ascend.FusedRotary):
        del cell.turn
        cell.turn = RotaryByFormula()
    elif isinstance(cell, ascend.PagedFlashAttention):
        kernel = cell.paged
        del cell.paged, cell.store
        cell.paged = PagedByFormula(kernel.head_num, kernel.scale_value, kernel.kv_head_num)
        cell.store = StoreByFormula()
    elif isinstance(cell, ascend.FlashAttention):
        kernel = cell.attention
        assert kernel.keep_prob == 1.0
        del cell.attention
        cell.attention = FlashByFormula(kernel.head_num, kernel.scale_value, cell.LAYOUT)
    elif isinstance(cell, ascend.FusedProduct):
        kernel = cell.product
        del cell.product
        cell.product = WeightByFormula(kernel)
    return cell


CASES = kernel_cases(SMALL)


@pytest.fixture
def call_by_call() -> Iterator[None]:
    """PyNative mode, in which the asserts of the stand-ins run as Python."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=mode)


class Weighed(nn.Cell):
    """A scalar of a cell's result, for its gradient."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.cell = cell

    def construct(self, weights: Tensor, *inputs: Tensor) -> Tensor:
        return (self.cell(*inputs) * weights).sum()


@pytest.mark.usefixtures("call_by_call")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_fused_cell_is_the_portable_operator(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, scale, mask and modes that the fused cell passes on, forward and backward."""
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    monkeypatch.setattr(ascend, "HALF_TYPES", (ms.float32,))
    inputs = case.tensors("float32")
    portable, fused = case.reference("float32"), with_stand_in(case.fused("float32"))
    expected, found = portable(*inputs), fused(*inputs)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), **LOGITS)
    exact = case.exact(*(array.astype(np.float64) for array in case.inputs))
    np.testing.assert_allclose(found.asnumpy(), exact, **LOGITS)
    if not case.differentiable:
        return
    weights = Tensor(np.random.default_rng(3).standard_normal(expected.shape, np.float32))
    positions = tuple(i + 1 for i in case.differentiable)
    wanted = ops.grad(Weighed(portable), positions)(weights, *inputs)
    gradients = ops.grad(Weighed(fused), positions)(weights, *inputs)
    if len(positions) == 1:
        wanted, gradients = (wanted,), (gradients,)
    for one, other in zip(gradients, wanted):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), **LOGITS)


@pytest.mark.usefixtures("call_by_call")
def test_a_norm_weight_of_another_type_is_not_rounded() -> None:
    """float16 cannot hold 1 + 2^-12; the product must."""
    x = Tensor(np.full((2, 64), 2048, np.float32), ms.float16)
    weight = Tensor(np.full(64, 1 + 2.0**-12, np.float32))
    cell = with_stand_in(ascend.FusedRMSNormalize(1e-5))
    seen = []

    class Spy(nn.Cell):
        def construct(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((x.dtype, gamma.dtype, float(gamma[0])))
            return x, gamma

    del cell.normalize
    cell.normalize = Spy()
    assert cell(x, weight).dtype == ms.float16
    assert seen == [(ms.float32, ms.float32, 1 + 2.0**-12)]


def tiny_network(**changes: object) -> GLMNetwork:
    sizes = {
        "num_layers": 2, "padded_vocab_size": 64, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16,
        "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 32,
    }  # fmt: skip
    return GLMNetwork(GLMConfig(**{**sizes, **changes}))


def kinds(network: nn.Cell) -> list[type]:
    return [type(cell) for _, cell in network.cells_and_names()]


def test_on_a_cpu_nothing_is_fused() -> None:
    network = tiny_network()
    before = kinds(network)
    assert registry.fuse_kernels(network, ms.float16) == [
        "portable operators: the device is CPU, the fused kernels are for Ascend"
    ]
    assert kinds(network) == before


def test_fusing_replaces_operators_and_keeps_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    network = tiny_network()
    names = [parameter.name for parameter in network.get_parameters()]
    assert registry.fuse_kernels(network, ms.bfloat16) == [
        "RMS norm: fused kernel in 5 cells",
        "attention: fused kernel in 2 cells",
        "cached attention: fused kernel in 2 cells",
        "rotary embedding: fused kernel in 2 cells",
    ]
    assert [parameter.name for parameter in network.get_parameters()] == names
    found = kinds(network)
    assert not {RMSNormalize, ApplyRotary, GroupedAttention, CachedAttention} & set(found)
    fused = (ascend.FusedRMSNormalize, ascend.FusedRotary, ascend.FlashAttention, ascend.PagedFlashAttention)
    assert [found.count(kind) for kind in fused] == [5, 2, 2, 2]
    assert found.count(ascend.FlashTables) == 2  # of attention over pages, for flat tables


def test_a_fused_network_gives_the_same_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network runs the cells that were put in, with the formulas in place of the kernels."""
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    monkeypatch.setattr(ascend, "HALF_TYPES", (ms.float32,))
    network = tiny_network()
    ids = Tensor(np.random.default_rng(0).integers(0, 64, (2, 12)), ms.int32)
    mask = Tensor(np.array([[1] * 12, [0] * 5 + [1] * 7], np.int32))
    positions = Tensor(np.array([range(12), [0] * 5 + list(range(7))], np.int32))
    slots = Tensor(np.arange(12), ms.int32)
    with graph_mode():
        expected = network(ids, mask, positions, slots).asnumpy()
        registry.fuse_kernels(network, ms.float32)
        for _, cell in list(network.cells_and_names()):
            if type(cell).__module__ == ascend.__name__:
                with_stand_in(cell)
        network.compile_cache.clear()
        found = network(ids, mask, positions, slots).asnumpy()
    assert FlashByFormula in kinds(network)
    np.testing.assert_allclose(found, expected, **LOGITS)


@pytest.mark.usefixtures("call_by_call")
@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4, 32)], ids=str)
def test_a_fused_quantized_network_gives_the_same_hidden_states(
    monkeypatch: pytest.MonkeyPatch, quantization: Quantization
) -> None:
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    network = tiny_network()
    quantize_network(network, quantization)
    names = [parameter.name for parameter in network.get_parameters()]
    ids, slots = Tensor(np.arange(12).reshape(2, 6) + 3, ms.int32), Tensor(np.arange(6), ms.int32)
    inputs = ids, ops.ones_like(ids), Tensor(np.tile(np.arange(6, dtype=np.int32), (2, 1))), slots
    expected = network(*inputs).asnumpy()
    monkeypatch.setattr(ascend, "HALF_TYPES", (ms.float32,))
    operator = f"int{quantization.bits} product"
    assert f"{operator}: fused kernel in 9 cells" in registry.fuse_kernels(network, ms.float32)
    assert [parameter.name for parameter in network.get_parameters()] == names
    for _, cell in list(network.cells_and_names()):
        if type(cell).__module__ == ascend.__name__:
            with_stand_in(cell)
    np.testing.assert_allclose(network(*inputs).asnumpy(), expected, **LOGITS)


@pytest.mark.parametrize(
    ("product", "scale", "dtype", "reason"),
    [
        ((64, 32), 1.0, ms.float32, "compute_dtype float32; the kernel takes float16 and bfloat16"),
        ((8, 65536), 1.0, ms.float16, "8 inputs and 65536 outputs; the kernel takes up to 65535"),
        ((8, 16), 2.0**-15, ms.float16, "a scale is no normal number of float16; compute in bfloat16"),
        ((8, 16), 65536.0, ms.float16, "a scale is no normal number of float16; compute in bfloat16"),
        ((8, 16), 0.0, ms.float16, None),
        ((8, 16), 2.0**-15, ms.bfloat16, None),
        ((64, 33, 32), 1.0, ms.float16, "33 outputs; the kernel takes even numbers"),
        ((64, 32, 64), 1.0, ms.float16, "groups of 64 of 64 inputs; the kernel takes smaller groups"),
        ((65, 32, 64), 1.0, ms.float16, None),
    ],
)
def test_products_that_the_kernel_cannot_take(
    product: tuple[int, ...], scale: float, dtype: ms.Type, reason: str | None
) -> None:
    cell = (Int8Product if len(product) == 2 else Int4Product)(*product, dtype)
    cell.scale.set_data(Tensor(np.full(cell.scale.shape, scale), cell.scale.dtype))
    kernel = ascend.FusedInt8Product if len(product) == 2 else ascend.FusedInt4Product
    assert kernel.why_not(cell, dtype) == reason


@pytest.mark.slow
def test_a_decoder_over_whole_pages_is_that_over_flat_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, steps, copies of pages, LoRA and a prefix, with the formulas in place of the kernels."""
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    monkeypatch.setattr(ascend, "HALF_TYPES", (ms.float32,))
    networks = [tiny_network(seq_length=128) for _ in range(2)]
    rng = np.random.default_rng(0)
    for one, other in zip(*(network.get_parameters() for network in networks)):
        values = Tensor(rng.normal(0, 0.2, one.shape).astype(np.float32))
        one.set_data(values)
        other.set_data(values)
    registry.fuse_kernels(networks[1], ms.float32)
    for _, cell in list(networks[1].cells_and_names()):
        if type(cell).__module__ == ascend.__name__:
            with_stand_in(cell)
    width = 2 * 2 * 2 * 16
    prefix = StoredAdapter(
        Path("prefix"), PrefixConfig(PAGE, dropout=0.0),
        {"transformer.prefix_encoder.embedding.weight": rng.normal(0, 1, (PAGE, width)).astype(np.float32)}
    )  # fmt: skip
    odd = StoredAdapter(Path("odd"), PrefixConfig(5, dropout=0.0), {
        "transformer.prefix_encoder.embedding.weight": rng.normal(0, 1, (5, width)).astype(np.float32)
    })  # fmt: skip
    prompt, results = rng.integers(3, 60, 40), []
    for network, kind in zip(networks, (KVCache, BlockCache)):
        decoder = PagedDecoder(PagedGraphs(network, 3, 64, 32, AdapterBounds(1, max_prefix=PAGE)))
        assert type(decoder.graphs.cache) is kind
        decoder.load_adapter("prefix", prefix)
        slots, logits = [decoder.open(prompt[:length], name) for length, name in ((40, None), (7, "prefix"))], []
        for slot in slots:
            found = None
            while found is None:
                found = decoder.prefill(slot)
            logits.append(found)
        slots += decoder.fork(slots[1:])
        for word in (5, 9):
            logits.extend(decoder.step(slots, np.array([word, word + 1, word + 2], np.int32)))
        results.append(np.stack(logits))
        if kind is BlockCache:
            decoder.free(slots)
            decoder.unload_adapter("prefix")
            with pytest.raises(AdapterError, match="a prefix of 5 positions; the kernels of this device take multip"):
                decoder.load_adapter("odd", odd)
    np.testing.assert_allclose(results[1], results[0], **LOGITS)
    assert np.ptp(results[0]) > 1


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({}, ms.float32, "compute_dtype float32; the kernel takes float16 and bfloat16"),
        ({"kv_channels": 8}, ms.float16, "kv_channels 8; must be a multiple of 16 up to 512"),
        ({"attention_dropout": 0.1}, ms.float16, "attention_dropout is above 0"),
    ],
)
def test_what_a_kernel_cannot_do_stays_portable(
    monkeypatch: pytest.MonkeyPatch, changes: dict, dtype: ms.Type, reason: str
) -> None:
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    network = tiny_network(**changes)
    lines = registry.fuse_kernels(network, dtype)
    assert f"attention: portable operator in 2 cells ({reason})" in lines
    assert kinds(network).count(GroupedAttention) == 2


class ToyNorm(nn.Cell):
    """A kernel of a CPU: the formula of the norm in one line."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    @staticmethod
    def why_not(cell: RMSNormalize, dtype: ms.Type) -> str | None:
        return None if dtype == ms.float32 else "float32 only"

    @staticmethod
    def replacing(cell: RMSNormalize, dtype: ms.Type) -> nn.Cell:
        return ToyNorm(cell.eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * ops.rsqrt((x * x).mean(-1, True) + self.eps) * weight


def test_a_kernel_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network uses it, and the check of the device compares it with the portable operator."""
    monkeypatch.setitem(registry.OPERATORS, ("RMS norm", "CPU"), ToyNorm)
    monkeypatch.setattr(ascend, "why_not_fused", lambda: "this is not an Ascend card")
    network = tiny_network()
    assert registry.fuse_kernels(network, ms.float32) == ["RMS norm: fused kernel in 5 cells"]
    assert kinds(network).count(ToyNorm) == 5
    with graph_mode():
        rows = list(fused_rows(SMALL, "float32"))
    assert [row.check for row in rows] == ["RMS norm", "RMS norm, gradient"]
    assert all(row.passed for row in rows), rows
    lines = registry.fuse_kernels(tiny_network(), ms.float16)
    assert lines == ["RMS norm: portable operator in 5 cells (float32 only)"]


@pytest.mark.parametrize(
    ("soc", "reason"), [("ascend910", "this card (910A) lacks them"), ("ascend910b", None), ("ascend910_93", None)]
)
def test_which_cards_have_the_kernels(monkeypatch: pytest.MonkeyPatch, soc: str, reason: str | None) -> None:
    monkeypatch.setattr(ascend.ms, "get_context", lambda name: {"device_target": "Ascend"}[name])
    monkeypatch.setattr(ascend, "soc_version", lambda: soc)
    found = ascend.why_not_fused()
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.slow
@pytest.mark.skipif(not RIG.is_file(), reason=f"no rig: {RIG} (set GLM_MS_SHARED)")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which the rig needs")
def test_mindspore_accepts_the_kernels(tmp_path: Path) -> None:
    """MindSpore's frontend for the Ascend target: every fused cell, and whole networks, forward and backward."""
    command = [
        "bash",
        RIG,
        "--target",
        "ascend",
        "--ranks",
        "1",
        "--out",
        tmp_path / "out",
        "--timeout",
        "200",
    ]
    result = subprocess.run(
        [*map(str, command), "--", str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    passed = {line[3:] for line in result.stdout.splitlines() if line.startswith("OK ")}
    both = [f"{way} {name}" for way in ("forward", "backward") for name in ("norm", "norm_mixed", "rotary")]
    half = [f"{way} {name}" for way in ("forward", "backward") for name in ("flash", "flash_one_mask", "flash_step")]
    half += ["forward pages", "forward pages_step", "forward int8", "forward int4"]
    expected = {f"{name} {dtype}" for name in both for dtype in ("Float32", "Float16", "BFloat16")}
    expected |= {f"{name} {dtype}" for name in half for dtype in ("Float16", "BFloat16")}
    expected |= {
        f"{way} {dtype}"
        for way in ("network", "prefill", "step", "paged", "int8", "int4")
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert passed == expected
