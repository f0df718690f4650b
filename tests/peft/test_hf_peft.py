"""Adapters go back and forth between this project and the torch library `peft`, with the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from marks import slow_unless
from reference import FOLDER, fresh_golden_model
from tolerances import LOGITS

from glm_ms.peft.lora import LoraConfig

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TARGETS = {
    "a regex": r".*(query_key_value|dense_4h_to_h)",
    "endings": ("query_key_value", "dense", "dense_h_to_4h"),
    "with the output layer": ("output_layer",),
}
IDS = np.random.default_rng(3).integers(0, 512, (2, 20))


@pytest.fixture
def base():
    from torch_glm import TorchGLM

    def load(case: str) -> TorchGLM:
        return TorchGLM(FOLDER / case).eval()

    return load


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).numpy()


@pytest.mark.parametrize("case", slow_unless(["glm2_tiny"], ["glm2_tiny", "glm3_tiny"]))
def test_the_torch_network_is_the_same(case: str, base) -> None:
    logits = fresh_golden_model(case)(IDS).asnumpy()
    np.testing.assert_allclose(torch_logits(base(case)), logits, **LOGITS)


@pytest.mark.parametrize("name", slow_unless(["a regex"], TARGETS))
def test_peft_loads_ours(name: str, base, tmp_path: Path) -> None:
    model = fresh_golden_model("glm3_tiny")
    adapter = model.add_adapter(LoraConfig(4, 12.0, 0.1, TARGETS[name]), seed=1)
    draw = np.random.default_rng(2)
    values = {p.name: draw.normal(0, 0.2, p.shape).astype(np.float32) for p in adapter.parameters()}
    adapter.assign(values, tmp_path)
    plain = torch_logits(base("glm3_tiny"))
    adapter.save(tmp_path, "chatglm3")
    loaded = peft.PeftModel.from_pretrained(base("glm3_tiny"), str(tmp_path)).eval()
    ours, theirs = model(IDS).asnumpy(), torch_logits(loaded)
    np.testing.assert_allclose(theirs, ours, **LOGITS)
    assert np.abs(ours - plain).max() > 0.1
    names = {name for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert len(names) == len(values)


@pytest.mark.parametrize("use_rslora", slow_unless([False], [False, True]))
@pytest.mark.parametrize("name", slow_unless(["endings", "with the output layer"], TARGETS))
def test_we_load_theirs(name: str, use_rslora: bool, base, tmp_path: Path) -> None:
    targets = TARGETS[name]
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_rslora=use_rslora, lora_dropout=0.05, init_lora_weights=False,
        target_modules=targets if isinstance(targets, str) else list(targets), task_type="CAUSAL_LM"
    )  # fmt: skip
    theirs = peft.get_peft_model(base("glm2_tiny"), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = fresh_golden_model("glm2_tiny")
    report = model.load_adapter(tmp_path)
    assert report.tensors == sum(".lora_" in name for name, _ in theirs.named_parameters())
    np.testing.assert_allclose(model(IDS).asnumpy(), torch_logits(theirs), **LOGITS)
    changed = np.abs(torch_logits(theirs) - torch_logits(base("glm2_tiny"))).max()
    assert changed > 0.01


def test_bfloat16_and_pickled_adapters_load(base, tmp_path: Path) -> None:
    torch.manual_seed(6)
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["dense"])
    theirs = peft.get_peft_model(base("glm2_tiny"), config).eval()
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    expected = torch_logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    stored = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import load_file

    state = {name: tensor.bfloat16() for name, tensor in load_file(stored).items()}
    stored.unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    model = fresh_golden_model("glm2_tiny")
    model.load_adapter(tmp_path)
    np.testing.assert_allclose(model(IDS).asnumpy(), expected, **LOGITS)
