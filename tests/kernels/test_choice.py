"""`context.use_fused_kernels: auto` with kernels of a pretended device: one that agrees, one that differs, one that
raises; what later starts know, what ranks share, and what a run compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
from marks import slow_unless
from mindspore import Tensor, nn, ops

from glm_ms.engine.weights import kernel_use
from glm_ms.kernels import choice
from glm_ms.kernels.cases import Product
from glm_ms.kernels.choice import machine, use_kernels
from glm_ms.kernels.remembered import file_for
from glm_ms.kernels.run_checks import Use, products_of, run_checks
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops import ascend, registry
from glm_ms.ops.portable import ApplyRotary, RMSNormalize
from glm_ms.ops.quantized import Int8Product
from glm_ms.quant import Quantization
from glm_ms.quant.network import quantize_network
from glm_ms.settings import load_settings

REPOSITORY = Path(__file__).resolve().parent.parent.parent

CONFIG = GLMConfig(
    num_layers=2, padded_vocab_size=64, hidden_size=64, ffn_hidden_size=96, kv_channels=16, num_attention_heads=4,
    multi_query_group_num=2, seq_length=32
)  # fmt: skip
PRODUCTS = [Product(8, 64, 96, 0), Product(4, 64, 96, 32)]
TRAINING, SERVING = Use(rows=4, length=16, trains=True), Use(slots=3, context=32)


class Kernel(nn.Cell):
    """A norm in another order of operations; `factor` makes it wrong."""

    factor = 1.0

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps, self.scale = eps, self.factor

    @staticmethod
    def why_not(cell: RMSNormalize, dtype: ms.Type) -> str | None:
        return None

    @classmethod
    def replacing(cls, cell: RMSNormalize, dtype: ms.Type) -> nn.Cell:
        return cls(cell.eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * ops.rsqrt((x * x).mean(-1, True) + self.eps) * weight * self.scale


class Differs(Kernel):
    factor = 1.01


class NotANumber(Kernel):
    factor = float("nan")


class Raises(Kernel):
    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("Unsupported op [RmsNorm]\n----\n- C++ Call Stack: x.cc:1")


class WrongGradient(Kernel):
    """The result is right; its gradient is not, as half of it does not depend on the input for the compiler."""

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x * ops.rsqrt((x * x).mean(-1, True) + self.eps) * weight
        return 0.5 * y + 0.5 * ops.stop_gradient(y)


class Refuses(Kernel):
    @staticmethod
    def why_not(cell: RMSNormalize, dtype: ms.Type) -> str | None:
        return "float16 only"


class SameRotary(ApplyRotary):
    @staticmethod
    def why_not(cell: ApplyRotary, dtype: ms.Type) -> None:
        return None

    @staticmethod
    def replacing(cell: ApplyRotary, dtype: ms.Type) -> nn.Cell:
        return SameRotary(cell.head_dim, dtype)


class SameInt8(Int8Product):
    trains = False

    @staticmethod
    def why_not(cell: Int8Product, dtype: ms.Type) -> None:
        return None

    @staticmethod
    def replacing(cell: Int8Product, dtype: ms.Type) -> nn.Cell:
        same = SameInt8(cell.in_features, cell.out_features, dtype)
        for one, other in zip(same.get_parameters(), cell.get_parameters()):
            one.set_data(other)
        return same


class Chosen:
    """Networks whose kernels are chosen, and the lines for the user."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.lines = monkeypatch, list[str]()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))

    def kernel(self, cell: type, operator: str = "RMS norm") -> None:
        """Makes the CPU a device that has this kernel."""
        self.monkeypatch.setitem(registry.OPERATORS, (operator, "CPU"), cell)

    def __call__(
        self, use: Use = SERVING, wanted: Any = "auto", quantization: Quantization | None = None, **options: Any
    ) -> list[type]:
        """Kinds of the cells of a network; its lines replace those of the one before."""
        network = GLMNetwork(CONFIG)
        if quantization is not None:
            quantize_network(network, quantization)
        self.lines.clear()
        use_kernels(network, CONFIG, use, wanted, self.lines.append, **options)
        return [type(cell) for _, cell in network.cells_and_names()]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chosen:
    return Chosen(monkeypatch, tmp_path)


def refuse(*_: Any) -> Any:
    raise AssertionError("compared again")


@pytest.mark.parametrize("use", slow_unless([SERVING], [SERVING, TRAINING]))
def test_a_kernel_that_agrees_is_used(chosen: Chosen, tmp_path: Path, use: Use) -> None:
    chosen.kernel(Kernel)
    kinds = chosen(use)
    assert kinds.count(Kernel) == 5
    assert RMSNormalize not in kinds
    path = file_for(machine(), tmp_path / "glm_ms")
    assert path.is_file()
    first, second = chosen.lines
    assert first == "comparing fused kernels with the portable operators on this card, once for these sizes"
    assert second.startswith("RMS norm: fused kernel in 5 cells; compared in ")
    assert second.endswith(f" s, {path}")


def test_a_later_start_compares_nothing(chosen: Chosen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen.kernel(Kernel)
    chosen()
    monkeypatch.setattr("glm_ms.kernels.run_checks.against_portable", refuse)
    assert chosen().count(Kernel) == 5
    path = file_for(machine(), tmp_path / "glm_ms")
    assert chosen.lines == [f"RMS norm: fused kernel in 5 cells; as compared by an earlier start, {path}"]


@pytest.mark.parametrize(
    ("kernel", "use", "reason"),
    [
        (Differs, SERVING, "RMS norm of 1x32, width 64, weights float32, float32: result differs by "),
        (Raises, SERVING, "float32: result: RuntimeError: 'Unsupported op [RmsNorm]"),
        pytest.param(NotANumber, TRAINING, "with gradients: result differs by nan, allowed ", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_that_does_not_agree_stays_portable(chosen: Chosen, kernel: type, use: Use, reason: str) -> None:
    chosen.kernel(kernel)
    chosen.kernel(SameRotary, "rotary embedding")
    for _ in range(2):  # the second start remembers it
        kinds = chosen(use)
        assert kinds.count(RMSNormalize) == 5
        assert kernel not in kinds
        assert kinds.count(SameRotary) == 2
        line = chosen.lines[-1]
        assert "rotary embedding: fused kernel in 2 cells; RMS norm: portable operator in 5 cells (RMS norm of" in line
        assert reason in line


def test_a_wrong_gradient_does_not_matter_without_training(chosen: Chosen) -> None:
    chosen.kernel(WrongGradient)
    assert chosen(SERVING).count(WrongGradient) == 5
    assert chosen(TRAINING).count(RMSNormalize) == 5
    assert "with gradients: gradient differs by " in chosen.lines[-1]


def test_a_kernel_for_other_sizes_is_not_compared(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_ms.kernels.run_checks.against_portable", refuse)
    chosen.kernel(Refuses)
    assert chosen().count(RMSNormalize) == 5
    assert chosen.lines == []


def test_a_cpu_has_no_line(chosen: Chosen, tmp_path: Path) -> None:
    assert chosen().count(RMSNormalize) == 5
    assert chosen.lines == []
    assert list(tmp_path.iterdir()) == []


def test_all_and_none(chosen: Chosen, tmp_path: Path) -> None:
    chosen.kernel(Differs)
    assert chosen(wanted=True).count(Differs) == 5
    assert chosen.lines == ["RMS norm: fused kernel in 5 cells"]
    assert chosen(wanted=False).count(RMSNormalize) == 5
    assert chosen.lines == []
    assert list(tmp_path.iterdir()) == []


def test_a_card_without_kernels_says_so(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "device", lambda: "Ascend")
    monkeypatch.setattr(ascend, "why_not_fused", lambda: "this card (910A) lacks them")
    assert chosen().count(RMSNormalize) == 5
    assert chosen.lines == ["portable operators: this card (910A) lacks them"]


def test_ranks_have_the_kernels_of_the_first(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank finds a kernel that differs; for the other one it would agree."""
    sent: list[Any] = []

    def first(work: Callable[[], Any]) -> Any:
        sent.append(json.loads(json.dumps(work())))  # as it arrives
        return sent[-1]

    chosen.kernel(Differs)
    assert chosen(on_first=first).count(RMSNormalize) == 5
    line = chosen.lines[-1]
    chosen.kernel(Kernel)
    monkeypatch.setattr(choice, "_compared", refuse)
    assert chosen(on_first=lambda work: sent[0]).count(RMSNormalize) == 5
    assert chosen.lines == [line]


def test_new_code_is_compared_again(chosen: Chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = machine()
    assert before.startswith(f"CPU, MindSpore {ms.__version__}, glm_ms ")
    changed = tmp_path / "portable.py"
    changed.write_text("x = 1")
    monkeypatch.setattr(choice.portable, "__file__", str(changed))
    assert machine() != before


def names(config: GLMConfig, use: Use) -> list[str]:
    return [check.name for check in run_checks(config, use)]


def test_sizes_and_types_of_a_training() -> None:
    config = GLMConfig(compute_dtype="bfloat16", seq_length=512)
    use = Use(rows=8, length=512, prefix=128, trains=True)
    assert names(config, use) == [
        "RMS norm of 2x512, width 4096, weights float32, bfloat16, with gradients",
        "rotary embedding of 2x512, 32 heads in 2 groups of 128, bfloat16, with gradients",
        "attention of 2x512, 32 heads in 2 groups of 128, 640 keys, bfloat16, with gradients",
    ]
    check = run_checks(config, use)[2]
    case = check.build()
    assert case.inputs[0].shape == (2, 512, 32, 128)
    assert case.inputs[1].shape == (2, 640, 2, 128)


def test_sizes_and_types_of_a_server() -> None:
    config = GLMConfig(compute_dtype="float16", param_init_type="float16")
    assert names(config, Use(slots=64, context=8192)) == [
        "RMS norm of 1x32, width 4096, weights float16, float16",
        "rotary embedding of 1x32, 32 heads in 2 groups of 128, float16",
        "attention over pages of 1x32, 32 heads in 2 groups of 128, 2048 keys, float16",
        "RMS norm of 16x1, width 4096, weights float16, float16",
        "rotary embedding of 16x1, 32 heads in 2 groups of 128, float16",
        "attention over pages of 16x1, 32 heads in 2 groups of 128, 2048 keys, float16",
    ]


def test_quantized_products_of_a_network() -> None:
    network = GLMNetwork(CONFIG)
    assert products_of(network) == set()
    quantize_network(network, Quantization(4, 32))
    products = products_of(network)
    assert products == {
        Product(4, 64, 128, 32), Product(4, 64, 64, 32), Product(4, 64, 192, 32), Product(4, 96, 64, 32)
    }  # fmt: skip
    found = [check for check in run_checks(CONFIG, Use(slots=3, context=200), products) if "int4" in check.operator]
    assert len(found) == 8
    assert found[0].name == "int4 product of 3x64 to 64, groups of 32, float32"
    assert found[1].build().inputs[0].shape == (32, 64)
    wide = run_checks(CONFIG, Use(rows=8, length=100), [Product(8, 64, 65024, 0)])[-1]
    assert wide.name == "int8 product of 200x64 to 16384, float32"


@pytest.mark.parametrize("wanted", ["auto", True])
def test_a_kernel_without_gradient_does_not_train(chosen: Chosen, wanted: Any) -> None:
    chosen.kernel(SameInt8, "int8 product")
    assert chosen(SERVING, wanted, Quantization(8)).count(SameInt8) == 9
    kinds = chosen(TRAINING, wanted, Quantization(8))
    assert (kinds.count(SameInt8), kinds.count(Int8Product)) == (0, 9)
    assert not chosen.lines or chosen.lines == ["int8 product: portable operator in 9 cells (it has no gradient)"]


def test_every_operator_is_compared() -> None:
    """A kernel without a comparison would never be used."""
    use = Use(rows=1, length=4, slots=1, context=4)
    assert {check.operator for check in run_checks(CONFIG, use, PRODUCTS)} == set(registry.operators_of("Ascend"))


@pytest.mark.parametrize("operator", slow_unless(["rotary embedding"], sorted(registry.operators_of("Ascend"))))
def test_comparisons_of_every_operator_run(chosen: Chosen, operator: str) -> None:
    """With the portable operator in place of the kernel."""

    class Same:
        @staticmethod
        def why_not(cell: nn.Cell, dtype: ms.Type) -> None:
            return None

        @staticmethod
        def replacing(cell: nn.Cell, dtype: ms.Type) -> nn.Cell:
            return cell

    chosen.kernel(Same, operator)
    use = Use(rows=2, length=8, prefix=3, trains=True, slots=2, context=40)
    for check in run_checks(CONFIG, use, PRODUCTS):
        if check.operator == operator:
            outcome = check.run()
            assert outcome.agrees, outcome
            assert "result differs by 0.0e+00, allowed " in outcome.why
            assert ("gradient differs by" in outcome.why) == check.gradients


@pytest.mark.parametrize(
    ("name", "overrides", "use"),
    [
        ("run_glm3_6b_ptuning2_800T_A2_64G", ("runner_config.batch_size=4",),
         {"rows": 4, "prefix": 128, "trains": True, "slots": 0}),
        ("predict_glm3_6b_800T_A2_64G", ("predict_batch_size=2", "generation.num_beams=3",
         "generation.do_sample=False"), {"slots": 6, "context": 2048}),
        ("run_glm3_6b_finetune_eval_800T_A2_64G", ("eval_dataset.batch_size=8", "metric.type=PerplexityMetric"),
         {"rows": 8, "slots": 0}),
        ("run_glm3_6b_finetune_eval_800T_A2_64G", ("metric.type=ADGENMetric",), {"rows": 0, "slots": 8}),
    ],
)  # fmt: skip
def test_use_of_a_run(name: str, overrides: tuple[str, ...], use: dict[str, Any]) -> None:
    settings = load_settings(REPOSITORY / "configs" / "glm3" / f"{name}.yaml", overrides, check_files=False)
    assert settings.context.use_fused_kernels == "auto"
    settings.model.model_config.padded_vocab_size = 65024
    found = kernel_use(settings, settings.glm_config())
    assert {key: getattr(found, key) for key in use} == use
    assert (found.length > 0) == (found.rows > 0)
    assert (found.context > 0) == (found.slots > 0)
