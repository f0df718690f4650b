"""Another type of adapter is added through the table of adapters alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from reference import fresh_golden_model

from glm_ms.convert.adapter_files import AdapterFiles
from glm_ms.peft import ADAPTERS, AdapterType, is_adapter_folder
from glm_ms.peft.adapter import Adapter, read_adapter

IDS = np.random.default_rng(3).integers(0, 512, (2, 20))
FILES = AdapterFiles("shift.json", "shift.safetensors", "", (".shift",))


@dataclass(frozen=True)
class ShiftConfig:
    kind: ClassVar[str] = "shift"
    module: str = "output_layer"
    dropout: float = 0.0


class Shift(nn.Cell):
    """A trained vector, added to the result of a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = Parameter(Tensor(np.zeros(width, np.float32)))
        self.mul, self.add = ops.Mul(), ops.Add()

    def construct(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """x [B, S, in] -> [1, 1, out]."""
        return self.shift.reshape((1, 1, -1))


class ShiftAdapter(Adapter):
    kind = "shift"
    config_class = ShiftConfig

    @classmethod
    def attach(cls, network: Any, config: ShiftConfig, seed: int, stored: Any) -> ShiftAdapter:
        adapter, name = cls(network, config), f"transformer.{config.module}"
        linear = network.linears()[name]
        linear.lora = Shift(linear.out_features)
        linear.lora.shift.name = f"{name}.shift"
        adapter._parameters = {linear.lora.shift.name: linear.lora.shift}
        return adapter

    def detach(self) -> None:
        self.network.linears()[f"transformer.{self.config.module}"].lora = None

    @classmethod
    def stored_config(cls, path: Path, tensors: Mapping[str, np.ndarray]) -> ShiftConfig:
        return ShiftConfig(**json.loads((path.parent / FILES.config).read_text()))

    @classmethod
    def write_config(cls, folder: Path, config: ShiftConfig, network: Any, base_model: str) -> None:
        (folder / FILES.config).write_text(json.dumps({"module": config.module}))

    @classmethod
    def shapes(cls, config: ShiftConfig, network: Any, base: Mapping[str, tuple]) -> dict[str, tuple]:
        name = f"transformer.{config.module}"
        return {f"{name}.shift": base[f"{name}.weight"][:1]}


def test_a_type_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ADAPTERS, "shift", AdapterType(f"{__name__}:ShiftAdapter", FILES, {"module": "module"}))
    model = fresh_golden_model("glm2_tiny")
    before = model(IDS).asnumpy()
    adapter = model.add_adapter(ADAPTERS["shift"].config(ShiftConfig()))
    assert [p.name for p in model.network.trainable_params()] == ["transformer.output_layer.shift"]
    values = np.random.default_rng(0).normal(size=adapter.parameters()[0].shape).astype(np.float32)
    adapter.assign({"transformer.output_layer.shift": values}, Path("drawn"))
    np.testing.assert_allclose(model(IDS).asnumpy(), before + values, atol=1e-5)
    adapter.save(tmp_path)
    assert is_adapter_folder(tmp_path)
    again = fresh_golden_model("glm2_tiny")
    report = again.load_adapter(read_adapter(tmp_path))
    assert (report.kind, report.tensors) == ("shift", 1)
    np.testing.assert_array_equal(again(IDS).asnumpy(), model(IDS).asnumpy())
