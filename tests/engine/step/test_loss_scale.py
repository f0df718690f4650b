"""Loss scaling: overflows are skipped without a trace, the scale moves as it should, float16 learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from engine_helpers import curve, read_jsonl, run_here, tiny_arguments
from mindspore import Parameter, Tensor, nn, ops
from tolerances import GRAD_NORM, LOSS_CURVE

DYNAMIC = {
    "type": "DynamicLossScaleUpdateCell", "loss_scale_value": 1024.0, "scale_factor": 2, "scale_window": 3,
}  # fmt: skip
FIXED = {**DYNAMIC, "type": "FixedLossScaleUpdateCell"}


class Toy(nn.Cell):
    """Sum of squares of a linear map, computed in a given type; every row is a token."""

    def __init__(self, dtype: Any = ms.float32) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)), name="weight")
        self.dtype = dtype

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = ops.cast(ops.matmul(ops.cast(x, self.dtype), ops.cast(self.weight, self.dtype)), ms.float32)
        return ops.ReduceSum()(y * y), ops.ReduceSum()(ops.ones_like(x[:, :1]))


class Steps:
    """A training step on a toy and what it holds."""

    def __init__(self, scale: dict | None, dtype: Any = ms.float32, accumulation_steps: int = 1) -> None:
        from mindformers.core.lr import LinearWithWarmUpLR

        from glm_ms.engine.step.adamw import GLMAdamW
        from glm_ms.engine.step.train_step import GLMTrainOneStep

        ms.set_context(mode=ms.GRAPH_MODE)
        self.network = Toy(dtype)
        rate = LinearWithWarmUpLR(learning_rate=0.1, warmup_steps=0, total_steps=100)
        self.optimizer = GLMAdamW(self.network.trainable_params(), rate)
        self.cell = GLMTrainOneStep(self.network, self.optimizer, 1.0, accumulation_steps, loss_scale=scale)
        self.cell.set_train()
        self.x = np.random.default_rng(0).standard_normal((16, 5, 3)).astype(np.float32)

    def __call__(self, i: int, factor: float = 1.0) -> list[float]:
        """loss, norm, rate, tokens."""
        return [float(value.asnumpy()) for value in self.cell(Tensor(self.x[i] * np.float32(factor)))]

    def state(self) -> dict[str, np.ndarray]:
        """Weights, moments and counter."""
        return {p.name: p.asnumpy().copy() for p in self.optimizer.get_parameters()}

    def scale(self) -> tuple[float, int, int]:
        """Scale, good steps, overflows in a row."""
        scale = self.cell.loss_scale
        return scale.value(), int(scale.good_steps.asnumpy()), int(scale.overflows.asnumpy())


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_scale_changes_no_update(accumulation_steps: int) -> None:
    plain, scaled = (Steps(scale, accumulation_steps=accumulation_steps) for scale in (None, DYNAMIC))
    for i in range(8):
        one, other = plain(i), scaled(i)
        np.testing.assert_allclose(other[0], one[0], **LOSS_CURVE)
        np.testing.assert_allclose(other[1], one[1], **GRAD_NORM)
        assert other[2:] == one[2:]
    np.testing.assert_allclose(scaled.state()["weight"], plain.state()["weight"], **LOSS_CURVE)


def test_the_scale_moves_with_overflows() -> None:
    """Genuine overflows of float16: rows a hundred thousand times as large."""
    steps = Steps(DYNAMIC, ms.float16)
    expected = [
        (1024, 1, 0), (1024, 2, 0), (2048, 0, 0),  # three good ones
        (1024, 0, 1), (512, 0, 2),  # two overflows
        (512, 1, 0), (512, 2, 0), (1024, 0, 0),
    ]  # fmt: skip
    for i, wanted in enumerate(expected):
        overflows = wanted[2] > 0
        before = steps.state()
        loss, norm, rate, _ = steps(i, 1e5 if overflows else 1.0)
        assert steps.scale() == wanted
        updates = sum(each[2] == 0 for each in expected[: i + 1])
        assert float(steps.optimizer.global_step.asnumpy().reshape(())) == updates
        if overflows:
            assert not np.isfinite(norm)
            assert_equal(steps.state(), before)  # weights, both moments, counter
        else:
            assert np.isfinite([loss, norm]).all()
            assert not np.array_equal(steps.state()["weight"], before["weight"])
            assert rate == pytest.approx(0.1 * (1 - (updates - 1) / 100), rel=1e-6)  # by updates made


def test_a_fixed_scale_stays() -> None:
    steps = Steps(FIXED, ms.float16)
    for i, factor in enumerate((1.0, 1e5, 1.0, 1.0, 1.0)):
        before = steps.state()
        steps(i, factor)
        assert steps.scale()[0] == 1024
        assert steps.scale()[2] == (1 if factor > 1 else 0)
        assert np.array_equal(steps.state()["weight"], before["weight"]) == (factor > 1)


def test_an_overflow_in_one_micro_batch_skips_the_step() -> None:
    steps = Steps(DYNAMIC, ms.float16, accumulation_steps=2)
    before = steps.state()
    steps(0, 1e5)
    _, norm, _, tokens = steps(1)
    assert not np.isfinite(norm)
    assert tokens == 10
    assert_equal(steps.state(), before)
    steps(2)  # nothing of it is left in the sums
    loss, norm, _, _ = steps(3)
    assert np.isfinite([loss, norm]).all()
    assert steps.scale() == (512, 1, 0)


def test_small_gradients_vanish_without_a_scale() -> None:
    """Gradients of 1e-8 are 0 in float16, and as they should be with a scale."""
    x = 2e-5
    norms = {}
    for name, scale, dtype in (
        ("float32", None, ms.float32),
        ("bare", None, ms.float16),
        ("scaled", FIXED, ms.float16),
    ):
        norms[name] = Steps(scale, dtype)(0, x)[1]
    assert norms["scaled"] == pytest.approx(norms["float32"], rel=0.02)  # float16 has 11 bits
    assert abs(norms["bare"] / norms["float32"] - 1) > 0.05


class ForcedOverflows(nn.Cell):
    """A detector that finds what it is told to."""

    steps: tuple[int, ...] = ()

    def __init__(self, _: Any = None) -> None:
        super().__init__(auto_prefix=False)
        self.count = Parameter(Tensor(0, ms.int32), name="forced_count", requires_grad=False)
        self.forced = Tensor(np.isin(np.arange(100), self.steps))

    def watch(self, loss: Tensor, _: tuple[Tensor, ...]) -> Tensor:
        return loss

    def construct(self, norm: Tensor) -> Tensor:
        found = ops.logical_or(ops.gather(self.forced, self.count, 0), norm < 0)
        return ops.depend(found, ops.assign_add(self.count, ops.depend(Tensor(1, ms.int32), found)))


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch):
    """force(steps): overflows at these steps, from 0."""
    from glm_ms.engine.step import train_step

    def run(*steps: int) -> None:
        monkeypatch.setattr(ForcedOverflows, "steps", steps)
        monkeypatch.setattr(train_step, "OverflowDetector", ForcedOverflows)

    return run


def test_forced_overflows(force) -> None:
    force(1, 2)
    forced, free = Steps(DYNAMIC), Steps(None)
    for i in range(5):
        before = forced.state()
        forced(i)
        if i in (1, 2):
            assert_equal(forced.state(), before)
            continue
        free(i)
    np.testing.assert_allclose(forced.state()["weight"], free.state()["weight"], **LOSS_CURVE)
    assert forced.scale() == (256, 2, 0)


class Register(nn.Cell):
    """The overflow register of a card that saturates: set by the micro batches in `flagged`."""

    flagged: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.count = Parameter(Tensor(0, ms.int32), name="register_count", requires_grad=False)
        self.flags = Tensor(np.isin(np.arange(100), self.flagged).astype(np.float32))

    def construct(self, computed: tuple[Tensor, ...]) -> Tensor:
        flag = ops.depend(ops.gather(self.flags, self.count, 0), computed)
        return ops.depend(flag, ops.assign_add(self.count, ops.depend(Tensor(1, ms.int32), flag)))


def test_the_register_of_a_saturating_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite gradients, but the register was set while micro batch 2 of the second step was computed."""
    from glm_ms.engine.step import loss_scale

    monkeypatch.setattr(loss_scale, "saturates", lambda: True)
    monkeypatch.setattr(loss_scale, "FloatStatus", Register)
    monkeypatch.setattr(Register, "flagged", (2,))
    steps = Steps(DYNAMIC, accumulation_steps=2)
    skipped = []
    for step in range(3):
        before = steps.state()
        steps(2 * step)
        assert np.isfinite(steps(2 * step + 1)).all()
        skipped.append(np.array_equal(steps.state()["weight"], before["weight"]))
    assert skipped == [False, True, False]
    assert steps.scale() == (512, 1, 0)


def test_a_network_learns_in_float16(vocabulary: Path) -> None:
    """Computed in float16 indeed: the step is called directly, since run_glm.py computes in float32 on a CPU."""
    from glm_ms.engine.step.adamw import GLMAdamW
    from glm_ms.engine.step.network import TrainingNetwork
    from glm_ms.engine.step.train_step import GLMTrainOneStep
    from glm_ms.model.config import GLMConfig
    from glm_ms.model.glm import GLMNetwork

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    sizes = {"num_layers": 1, "padded_vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
             "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 16}  # fmt: skip
    network = TrainingNetwork(GLMNetwork(GLMConfig(**sizes, compute_dtype="float16", hidden_dropout=0.1)), 16)
    optimizer = GLMAdamW(network.trainable_params(), 0.01)
    scale = {**DYNAMIC, "loss_scale_value": 2.0**26, "scale_window": 1000}
    cell = GLMTrainOneStep(network, optimizer, 1.0, loss_scale=scale)
    cell.set_train()
    ids = np.random.default_rng(0).integers(2, 60, (4, 16)).astype(np.int32)
    batch = [Tensor(x) for x in (ids, ids, np.ones_like(ids), np.tile(np.arange(16, dtype=np.int32), (4, 1)))]
    losses, skipped = [], 0
    for i in range(40):
        loss, norm, _, _ = (float(value.asnumpy()) for value in cell(*batch, Tensor(np.arange(4, dtype=np.int32) + i)))
        skipped += cell.loss_scale.skipped()
        assert cell.loss_scale.skipped() == (not np.isfinite(norm))
        losses.append(loss)
    assert skipped >= 1  # 2^26 is too much to begin with
    assert cell.loss_scale.value() == 2.0**26 / 2**skipped
    assert losses[-1] < losses[0] / 2


SCALED = [f"runner_wrapper.scale_sense.{name}={value}" for name, value in DYNAMIC.items()]


def test_a_run_with_overflows_resumes_alike(finetune, force, tmp_path: Path) -> None:
    """Scale and counters go on from the checkpoint; skipped steps have their lines."""
    force(1, 6)
    arguments = (*SCALED, "checkpoint.save_steps=4", "checkpoint.keep_max=9", "logging.log_steps=5")
    whole = finetune(tmp_path / "whole", *arguments)
    lines = read_jsonl(whole / "metrics.jsonl")
    assert [(line["step"], line["overflow"]) for line in lines] == [
        (2, True), (5, False), (7, True), (10, False), (12, False),
    ]  # fmt: skip
    assert [line["loss"] is None for line in lines] == [True, False, True, False, False]
    assert [line["loss_scale"] for line in lines] == [512, 1024, 512, 1024, 1024]
    force(2)  # what was step 6 is the third step after the checkpoint of step 4
    line = [*arguments, "--resume_training", str(whole / "checkpoint" / "step_00000004")]
    rest = finetune(tmp_path / "rest", *line)
    assert curve(rest) == curve(whole)[1:]
    ends = [run / "checkpoint" / "step_00000012" / "optimizer.safetensors" for run in (whole, rest)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_run_that_only_overflows_stops(
    force, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine_helpers import SMALL_TRAINING

    force(*range(2, 100))
    line = tiny_arguments(
        "finetune", vocabulary, *SMALL_TRAINING, *SCALED, "runner_wrapper.scale_sense.loss_scale_value=2",
        "checkpoint.save_steps=1", "--output_dir", tmp_path
    )  # fmt: skip
    assert run_here(line) == 1
    shown = capsys.readouterr().err
    assert "step 4, learning rate" in shown
    assert "2 updates in a row have overflowed and the loss scale has fallen below 1" in shown
    assert str(tmp_path / "nan_step_00000004.json") in shown
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_fixed_scale_gives_up_too() -> None:
    from glm_ms.engine.step.loss_scale import MOST_OVERFLOWS, LossScale

    scale = LossScale(**FIXED)
    for number in (1, MOST_OVERFLOWS - 1):
        scale.overflows.set_data(Tensor(number, ms.int32))
        assert scale.exhausted() is None
    scale.overflows.set_data(Tensor(MOST_OVERFLOWS, ms.int32))
    assert scale.exhausted() == f"{MOST_OVERFLOWS} updates in a row have overflowed at loss scale 1024"
