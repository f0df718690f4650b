"""MindFormers' own interfaces with the classes and YAMLs of this project: Auto classes and pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import UserList
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from engine_helpers import CONFIGS
from legacy_yaml import legacy_yaml
from mindformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    MindFormerConfig,
    Trainer,
    pipeline,
)
from mindformers.generation import GenerationConfig, TextStreamer
from mindformers.models import build_processor, build_tokenizer
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers_helpers import QUESTION, TEXT, yaml_of
from mindspore import Tensor
from safetensors.numpy import load_file, save_file
from tolerances import LOGITS

from glm_ms import ChatGLM2Tokenizer, ChatGLM3Tokenizer, load_pretrained
from glm_ms.mindformers_api import (
    GLM2Tokenizer,
    GLM3Tokenizer,
    GLMTextGenerationTrainer,
    MindFormersGLM,
    MindFormersGLMConfig,
)
from glm_ms.mindformers_api.released import MODEL_NAMES
from glm_ms.mindformers_api.run_yaml import is_run_yaml
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer, GLMTextProcessor
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import MANIFEST

TEXTS = ["你好", "", "类型#裤*版型#宽松*颜色#蓝色", "a <|user|> b </s>", " spaces  \n and lines "]


@pytest.fixture(scope="module")
def model(weights: Path) -> MindFormersGLM:
    """The model of that checkpoint; tests leave it as it is."""
    return AutoModel.from_pretrained(str(weights))


# ------------------------------------------------------------------ registry


def test_the_registry_knows_our_classes_and_keeps_its_own():
    for name, kind, cls in (
        ("GLMConfig", MindFormerModuleType.CONFIG, MindFormersGLMConfig),
        ("MindFormersGLMConfig", MindFormerModuleType.CONFIG, MindFormersGLMConfig),
        ("GLMForCausalLM", MindFormerModuleType.MODELS, MindFormersGLM),
        ("MindFormersGLM", MindFormerModuleType.MODELS, MindFormersGLM),
        ("GLM3Tokenizer", MindFormerModuleType.TOKENIZER, GLM3Tokenizer),
    ):
        assert MindFormerRegister.get_cls(kind, name) is cls
    stock = MindFormerRegister.get_cls(MindFormerModuleType.TOKENIZER, "ChatGLM3Tokenizer")
    assert stock.__module__.startswith("mindformers.")


def test_a_name_that_is_taken_is_an_error(monkeypatch: pytest.MonkeyPatch):
    from glm_ms.engine.mindformers_internals import NameTakenError
    from glm_ms.mindformers_api.registration import register

    register()  # again: nothing happens
    table = MindFormerRegister.registry[MindFormerModuleType.MODELS]
    other = type("GLMForCausalLM", (), {"__module__": "somebody.else"})
    monkeypatch.setitem(table, "GLMForCausalLM", other)
    with pytest.raises(NameTakenError, match=r"somebody\.else\.GLMForCausalLM"):
        register()
    assert table["GLMForCausalLM"] is other


@pytest.mark.parametrize("argument", ["model_name", "model"])
def test_model_names_stand_for_yamls(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert all((CONFIGS.parent / path).is_file() for path in MODEL_NAMES.values())
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(task="text_generation", **{argument: "glm3_tiny"})
    assert type(trainer.trainer) is GLMTextGenerationTrainer
    assert trainer.config.model.model_config.num_layers == 2


# Prints whether a run of run_glm.py loads the package, and everything that its import replaces.
REPLACED = """
import logging, os, sys
from mindformers import Trainer
import glm_ms.engine.run

def members():
    found = {("", "logging.disable"): logging.root.manager.disable, ("", "environment"): dict(os.environ)}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mindformers":
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found.update({(name, f"{key}.{part}"): member for part, member in vars(value).items()})
    return found

loaded = "glm_ms.mindformers_api" in sys.modules
before = members()
import glm_ms.mindformers_api
after = members()
print(loaded, sorted(key[1] for key in before if after.get(key) is not before[key] and after.get(key) != before[key]))
"""


def test_the_import_replaces_six_methods_and_nothing_else(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", REPLACED],
        cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True
    )  # fmt: skip
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
    replaced = [*(f"{name}.from_pretrained" for name in classes), "MindFormerConfig._file2dict"]
    assert done.stdout.splitlines()[-1] == f"False {replaced}"


def test_other_yamls_are_read_as_ever(tmp_path: Path):
    path = tmp_path / "other.yaml"
    path.write_text(
        "trainer: {type: CausalLanguageModelingTrainer}\nmodel: {model_config: {type: LlamaConfig, top_k: 3}}\n"
    )
    config = MindFormerConfig(str(path))
    assert config.model.model_config.type == "LlamaConfig"
    assert "glm_ms" not in config


# ------------------------------------------------------------------ AutoConfig


def test_auto_config_of_a_yaml_a_folder_and_a_file(run: Path, weights: Path, monkeypatch: pytest.MonkeyPatch):
    stored = load_pretrained(run).config
    for source in (run / "settings.yaml", run, weights, weights / "config.json"):
        with monkeypatch.context() as patch:
            patch.delattr("glm_ms.convert.reader.open_checkpoint")  # weights of 12 GB take time
            config = AutoConfig.from_pretrained(str(source))
        assert isinstance(config, MindFormersGLMConfig)
        assert config.architecture().to_dict() == stored.to_dict()
        assert config.vocab_size == stored.padded_vocab_size
    assert AutoConfig.from_pretrained(str(weights), num_layers=5).num_layers == 5


def test_auto_config_of_every_yaml_of_the_project():
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        if path.parent.name in ("glm2", "glm3"):
            assert AutoConfig.from_pretrained(str(path)).num_layers == 28


@pytest.mark.parametrize("save_json", [True, False])
def test_a_saved_config_is_read_again(weights: Path, tmp_path: Path, save_json: bool):
    config = AutoConfig.from_pretrained(str(weights))
    config.save_pretrained(str(tmp_path), save_json=save_json)
    path = tmp_path / ("config.json" if save_json else "mindspore_model.yaml")
    assert AutoConfig.from_pretrained(str(path)).architecture() == config.architecture()


# ------------------------------------------------------------------ AutoModel


def test_auto_model_has_the_weights_and_the_released_names(weights: Path):
    expected = load_pretrained(weights).parameters()
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(str(weights))
        found = {parameter.name: parameter for parameter in model.get_parameters()}
        assert list(found) == list(expected)
        for name, parameter in expected.items():
            np.testing.assert_array_equal(found[name].asnumpy(), parameter.asnumpy(), err_msg=name)


def test_auto_model_of_a_released_folder_has_the_reference_logits(golden: Path, tmp_path: Path):
    folder = tmp_path / "chatglm3"
    shutil.copytree(golden / "models" / "glm3_tiny", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.X",
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(str(folder))
    expected = np.load(folder / "golden.npz")
    logits = model.core(*(expected[name] for name in ("input_ids", "attention_mask", "position_ids"))).asnumpy()
    seen = expected["attention_mask"] == 1
    np.testing.assert_allclose(logits[seen], expected["logits"][seen], **LOGITS)


def test_from_config_loads_the_weights_that_the_yaml_names(run: Path, tmp_path: Path, weights: Path):
    path = yaml_of(run, tmp_path, load_checkpoint=str(run))
    expected = load_pretrained(weights).parameters()["transformer.output_layer.weight"].asnumpy()
    for model in (AutoModel.from_config(path), AutoModel.from_config(AutoConfig.from_pretrained(path))):
        found = model.core.parameters()["transformer.output_layer.weight"].asnumpy()
        np.testing.assert_array_equal(found, expected)
    untrained = AutoModel.from_config(yaml_of(run, tmp_path, load_checkpoint=""))
    assert not np.array_equal(untrained.core.parameters()["transformer.output_layer.weight"].asnumpy(), expected)


def test_construct_gives_the_logits_and_the_loss_of_the_core(model: MindFormersGLM):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 800, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    labels = np.where(rng.random(ids.shape) < 0.5, ids, -100)
    tensors = {name: Tensor(value, ms.int32) for name, value in
               (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}  # fmt: skip
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        logits = model(tensors["input_ids"], attention_mask=tensors["attention_mask"])
        loss = model(tensors["input_ids"], tensors["labels"], tensors["attention_mask"])
    finally:
        ms.set_context(mode=mode)
    np.testing.assert_allclose(logits.asnumpy(), model.core(ids, mask).asnumpy(), **LOGITS)
    expected = model.core(ids, mask, labels=labels)
    np.testing.assert_allclose(loss.asnumpy(), expected.asnumpy(), atol=2e-5, rtol=0)


def test_generate_is_that_of_the_core(model: MindFormersGLM, vocabulary: Path):
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    prompts = [tokenizer.encode(QUESTION), tokenizer.encode("类型#上衣")]
    expected = model.core.generate(prompts, max_new_tokens=6, eos_token_id=[])
    options = {"max_new_tokens": 6, "eos_token_id": [], "do_sample": False}
    length = max(map(len, prompts))
    left = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    right = np.array([prompt + [0] * (length - len(prompt)) for prompt in prompts])
    mask = (np.array(left) != 0).astype(int)
    for ids, more in ((prompts, {}), (left, {}), (right, {}), (Tensor(left), {"attention_mask": mask})):
        sequences = model.generate(ids, **options, **more)
        assert [sequence.tolist() for sequence in sequences] == expected
        assert all(sequence.dtype == np.int32 for sequence in sequences)
    for ids in (UserList(prompts[0]), range(5, 9), np.array(prompts[0], dtype=object)):
        assert model.generate(ids, **options)[0].tolist() == model.core.generate(
            list(ids), max_new_tokens=6, eos_token_id=[]
        )[0]  # fmt: skip
    with pytest.raises(ValueError, match="expected the token ids of one or several prompts, found 'text'"):
        model.generate("text", **options)
    single = model.generate(prompts[0], max_length=len(prompts[0]) + 6, eos_token_id=[], top_k=None)
    assert single[0].tolist() == expected[0]
    own = GenerationConfig(max_new_tokens=6, eos_token_id=831)
    assert model.generate(prompts[0], generation_config=own)[0].tolist() == expected[0]
    answer = model.generate(prompts[0], return_dict_in_generate=True, **options)
    assert answer["sequences"][0].tolist() == expected[0]
    sampled = model.generate(prompts[0], max_new_tokens=6, do_sample=True, temperature=5.0, seed=3)
    assert sampled[0].tolist() == model.core.generate(
        prompts[0], max_new_tokens=6, do_sample=True, temperature=5.0, seed=3
    )[0]  # fmt: skip


def test_generate_streams(model: MindFormersGLM, vocabulary: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = GLM3Tokenizer(str(vocabulary))
    ids = tokenizer(QUESTION)["input_ids"]
    sequence = model.generate(
        ids, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=5, eos_token_id=[]
    )[0]
    assert sequence.tolist() == model.core.generate(ids, max_new_tokens=5, eos_token_id=[])[0]
    assert capsys.readouterr().out.strip() == tokenizer.decode(sequence[len(ids) :]).strip()


def test_a_saved_model_is_loaded_again(model: MindFormersGLM, tmp_path: Path):
    model.save_pretrained(str(tmp_path / "saved"))
    again = AutoModel.from_pretrained(str(tmp_path / "saved"))
    for one, other in zip(model.get_parameters(), again.get_parameters()):
        assert one.name == other.name
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


# ------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize(("kind", "core"), [(GLM2Tokenizer, ChatGLM2Tokenizer), (GLM3Tokenizer, ChatGLM3Tokenizer)])
def test_tokenizer_gives_the_same_ids(vocabulary: Path, kind: type, core: type):
    tokenizer, ours = kind(str(vocabulary)), core(vocabulary)
    for text in TEXTS:
        assert dict(tokenizer(text)) == ours(text)
        assert tokenizer.encode(text) == ours.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
        assert tokenizer.tokenize(text) == ours.tokenize(text)
        assert tokenizer.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert dict(tokenizer(TEXTS, padding=True)) == ours(TEXTS, padding=True)
    assert dict(tokenizer(TEXTS, padding="max_length", max_length=40)) == ours(
        TEXTS, padding="max_length", max_length=40
    )
    cut = {"truncation": True, "max_length": 5}
    assert dict(tokenizer(TEXTS[2], **cut)) == ours(TEXTS[2], **cut)
    assert dict(tokenizer("问", "答")) == ours("问", "答")
    features = [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    assert dict(tokenizer.pad(features)) == ours.pad(features)
    batch = [ours.encode(text) for text in TEXTS]
    assert tokenizer.decode(batch) == tokenizer.batch_decode(batch) == [ours.decode(ids) for ids in batch]
    assert len(tokenizer) == tokenizer.vocab_size == ours.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (ours.pad_token_id, ours.eos_token_id)
    assert tokenizer.decode([*ours.encode("你"), 831]) == ours.decode(
        ours.encode("你")
    )  # a padded row of the vocabulary


@pytest.mark.parametrize("generation", [2, 3])
def test_tokenizer_gives_the_reference_ids(vocab_file: Path, golden: Path, generation: int):
    tokenizer = {2: GLM2Tokenizer, 3: GLM3Tokenizer}[generation](str(vocab_file))
    cases = json.loads((golden / f"tokenizer_glm{generation}.json").read_text(encoding="utf-8"))["texts"]
    for case in cases:
        assert tokenizer(case["text"])["input_ids"] == case["input_ids"]
        assert tokenizer.decode(case["input_ids"]) == case["decoded"]
    assert len(cases) > 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding_side": "right"}, "[1, 1, 1, 0]"),
        ({"padding_side": "left"}, "[0, 1, 1, 1]"),
    ],
)
def test_the_side_of_padding_is_an_argument_of_class_and_call_and_an_attribute(
    vocabulary: Path, options: dict[str, str], text: str
):
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7, 8]}]
    given, later = GLM3Tokenizer(str(vocabulary), **options), GLM3Tokenizer(str(vocabulary))
    later.padding_side = options["padding_side"]
    for tokenizer in (given, later):
        assert str(tokenizer.pad(features)["attention_mask"][0]) == text
        assert tokenizer.core.padding_side == options["padding_side"]
    called = GLM3Tokenizer(str(vocabulary)).pad(features, **options)
    assert str(called["attention_mask"][0]) == text


def test_options_of_the_tokenizers_have_their_effect(vocabulary: Path, tmp_path: Path):
    tokenizer = GLM3Tokenizer(str(vocabulary), truncation_side="left", encode_special_tokens=True)
    role, whole = tokenizer.get_command("<|user|>"), tokenizer.core.encode(QUESTION, add_special_tokens=False)
    cut = {"truncation": True, "max_length": 3, "add_special_tokens": False}
    assert tokenizer(QUESTION, **cut)["input_ids"] == whole[-3:]
    assert tokenizer("<|user|>")["input_ids"][-1] == role
    tokenizer.encode_special_tokens, tokenizer.truncation_side = False, "right"
    assert role not in tokenizer("<|user|>")["input_ids"]
    assert tokenizer(QUESTION, **cut)["input_ids"] == whole[:3]
    tokenizer.model_max_length, tokenizer.model_input_names = 4, ["input_ids"]
    assert {name: len(row) for name, row in tokenizer(QUESTION, truncation=True).items()} == {"input_ids": 4}
    assert tokenizer.decode(tokenizer.core.encode("a , b"), clean_up_tokenization_spaces=True).endswith("a, b")
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path), truncation_side="left")
    assert (again.padding_side, again.truncation_side, again.model_max_length) == ("right", "left", 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("no_such_option", 1, "no_such_option: unknown option"),
        ("paddingside", "right", "paddingside: unknown option; did you mean padding_side"),
        ("padding_side", "up", "padding_side = 'up': must be 'left' or 'right'"),
        ("encode_special_tokens", "False", "encode_special_tokens = 'False': must be True or False"),
        ("pad_token", "</s>", "pad_token = '</s>': the vocabulary determines the special tokens"),
        ("additional_special_tokens", ["<x>"], "additional_special_tokens = '<x>': the vocabulary determines"),
        ("chat_template", "{{ messages }}", "chat_template = .*: not supported"),
        ("model_max_length", "8", "model_max_length = '8': not a value of this option"),
        ("add_bos_token", True, "add_bos_token: unknown option"),
    ],
)
def test_other_options_of_the_tokenizers_are_refused(vocabulary: Path, name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        GLM3Tokenizer(str(vocabulary), **{name: value})
    with pytest.raises(ValueError, match=message):
        setattr(GLM3Tokenizer(str(vocabulary)), name, value)


def test_unknown_options_of_calls_are_refused(vocabulary: Path):
    tokenizer = GLM2Tokenizer(str(vocabulary))
    with pytest.raises(ValueError, match="encode_special_tokens = True: not supported"):
        GLM2Tokenizer(str(vocabulary), encode_special_tokens=True)
    for call in (tokenizer, tokenizer.encode, tokenizer.tokenize):
        with pytest.raises(ValueError, match="no_such_option: unknown option"):
            call(QUESTION, no_such_option=1)
    with pytest.raises(ValueError, match="no_such_option: unknown option"):
        tokenizer.batch_decode([[5]], no_such_option=1)
    for name in ("return_token_type_ids", "is_split_into_words", "stride"):
        with pytest.raises(ValueError, match=f"{name}: GLM2Tokenizer does not support this option"):
            tokenizer([QUESTION], **{name: True})


def test_inherited_methods_of_the_tokenizer(vocabulary: Path, tmp_path: Path):
    tokenizer = GLM3Tokenizer(str(vocabulary))
    ids, pair = (tokenizer.encode(text, add_special_tokens=False) for text in (QUESTION, "是的"))
    for options in ({}, {"padding": "max_length", "max_length": 40}, {"truncation": True, "max_length": 6}):
        expected = tokenizer(QUESTION, "是的", **options)
        assert dict(tokenizer.prepare_for_model(ids, pair, **options)) == dict(expected)
    assert tokenizer.prepare_for_model(ids, add_special_tokens=False)["input_ids"] == ids
    for options, message in (
        ({"no_such_option": 1}, "no_such_option: unknown option"), ({"stride": 2}, "stride: GLM3Tokenizer does not"),
        ({"truncation": "only_first", "max_length": 6}, "only_first"), ({"truncation": True}, "max_length is missing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tokenizer.prepare_for_model(ids, **options)
    with pytest.raises(ValueError, match="prepare_seq2seq_batch: not supported"):
        tokenizer.prepare_seq2seq_batch([QUESTION], no_such_option=1)
    whole = tokenizer.build_inputs_with_special_tokens(ids, pair)
    mask = tokenizer.get_special_tokens_mask(ids, pair)
    assert mask == tokenizer.get_special_tokens_mask(whole, already_has_special_tokens=True)
    assert mask == [1, 1, *[0] * len(ids + pair), 1]
    assert tokenizer.convert_ids_to_tokens([*ids, 2, 0], skip_special_tokens=True) == tokenizer.tokenize(QUESTION)
    with pytest.raises(ValueError, match="safe_mode: unknown option"):
        tokenizer.save_pretrained(str(tmp_path), safe_mode=True)
    assert Path(tokenizer.save_vocabulary(str(tmp_path), "a")[0]).name == "a-tokenizer.model"


def test_a_broken_yaml_that_names_our_types_is_ours(tmp_path: Path):
    for number, line in enumerate(('type : "GLMConfig"', "{type: ChatGLM32kConfig, a: [}", '"type": GLMForCausalLM')):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"model:\n  model_config: {line}\n a: [\n", encoding="utf-8")
        assert is_run_yaml(path)
    path.write_text("model:\n  model_config: {type: LlamaConfig, a: [}\n", encoding="utf-8")
    assert not is_run_yaml(path)


def test_a_tokenizer_config_applies_or_is_refused_with_its_path(vocabulary: Path, tmp_path: Path):
    tokenizer = GLM3Tokenizer(str(vocabulary))
    tokenizer.save_pretrained(str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    stored = {**json.loads(path.read_text()), "added_tokens_decoder": {"801": {"content": "[gMASK]"}}, "legacy": True}
    path.write_text(json.dumps({**stored, "padding_side": "right", "eos_token": {"content": "</s>"}}))
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json: legacy: no effect here"):
        assert AutoTokenizer.from_pretrained(str(tmp_path)).padding_side == "right"
    path.write_text(json.dumps({**stored, "added_tokens_decoder": {"900": {"content": "<x>"}}}))
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: added_tokens_decoder: 900: the vocabulary has the ids"
    ):
        AutoTokenizer.from_pretrained(str(tmp_path))
    path.write_text(json.dumps({**stored, "pad_token": "<x>"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: GLM3Tokenizer: pad_token = '<x>'"):
        AutoTokenizer.from_pretrained(str(tmp_path))


def test_tensors_of_texts(vocabulary: Path):
    tokenizer = GLM3Tokenizer(str(vocabulary))
    array = tokenizer(QUESTION, return_tensors="np")["input_ids"]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == tokenizer.encode(QUESTION)
    tensor = tokenizer(TEXTS, padding=True, return_tensors="ms")["input_ids"]
    assert isinstance(tensor, Tensor)
    assert tensor.asnumpy().tolist() == ChatGLM3Tokenizer(vocabulary)(TEXTS, padding=True)["input_ids"]


@pytest.mark.parametrize("kind", [GLM2Tokenizer, GLM3Tokenizer])
def test_a_built_prompt_keeps_its_role_tokens_and_text_gains_none(vocabulary: Path, kind: type):
    tokenizer = kind(str(vocabulary))
    expected = tokenizer.core.build_chat_input(QUESTION)["input_ids"]
    prompt = tokenizer.build_prompt(QUESTION)
    assert tokenizer(prompt)["input_ids"] == expected
    assert tokenizer([prompt, prompt], padding=True)["input_ids"] == [expected, expected]
    assert tokenizer.build_chat_input(QUESTION)["input_ids"].tolist() == [expected]
    if kind is GLM3Tokenizer:
        role = tokenizer.get_command("<|assistant|>")
        assert role in expected
        assert role not in tokenizer(str.__str__(prompt) + "")["input_ids"]


def test_auto_tokenizer_finds_yaml_run_and_folder(run: Path, vocabulary: Path, tmp_path: Path):
    for source in (run / "settings.yaml", run):
        assert isinstance(AutoTokenizer.from_pretrained(str(source)), GLM3Tokenizer)
    GLM2Tokenizer(str(vocabulary)).save_pretrained(str(tmp_path))
    saved = AutoTokenizer.from_pretrained(str(tmp_path))
    assert isinstance(saved, GLM2Tokenizer)
    assert saved(QUESTION)["input_ids"] == ChatGLM2Tokenizer(vocabulary).encode(QUESTION)
    # As in the released folders: the class is named, and the model.
    released = {"name_or_path": "THUDM/chatglm3-6b", "remove_space": False, "do_lower_case": False,
                "tokenizer_class": "ChatGLMTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(released))
    assert isinstance(AutoTokenizer.from_pretrained(str(tmp_path)), GLM3Tokenizer)
    assert isinstance(AutoTokenizer.from_pretrained(str(tmp_path), model_generation=2), GLM2Tokenizer)
    config = MindFormerConfig(str(run / "settings.yaml"))
    assert isinstance(build_tokenizer(config.processor.tokenizer), GLM3Tokenizer)


# ------------------------------------------------------------------ MindFormers' YAML files and names, code in folders


@pytest.mark.parametrize("generation", [2, 3])
def test_auto_classes_of_a_mindformers_yaml(vocabulary: Path, tmp_path: Path, generation: int, capfd: Any):
    sizes = (
        ("num_layers: 28", "num_layers: 1"),
        ("hidden_size: 4096", "hidden_size: 32"),
        ("kv_channels: 128", "kv_channels: 8"),
    )
    more = ("num_attention_heads: 32", "num_attention_heads: 4"), ("ffn_hidden_size: 13696", "ffn_hidden_size: 48")
    path = tmp_path / "mindformers.yaml"
    path.write_text(legacy_yaml(*sizes, *more, ("/path/to/tokenizer.model", str(vocabulary)), generation=generation))
    kind = {2: GLM2Tokenizer, 3: GLM3Tokenizer}[generation]
    config = AutoConfig.from_pretrained(str(path))
    assert (type(config), config.hidden_size) == (MindFormersGLMConfig, 32)
    assert "model.model_config.type: ChatGLM2Config is GLMConfig here" in capfd.readouterr().err
    model = AutoModel.from_config(str(path))
    assert type(model) is MindFormersGLM
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    assert type(tokenizer) is kind
    assert model.generation_config.eos_token_id == tokenizer.stop_token_ids
    for processor in (
        AutoProcessor.from_pretrained(str(path)),
        build_processor(MindFormerConfig(str(path)).processor),
    ):
        assert (type(processor), type(processor.tokenizer)) == (GLMTextProcessor, kind)
        ids = processor("你好")["text"].asnumpy()
        assert ids[0, -len(tokenizer.encode("你好")) :].tolist() == tokenizer.encode("你好")
        assert ids.shape == (1, 128)
    assert type(Trainer(args=str(path), task="text_generation").trainer) is GLMTextGenerationTrainer
    assert "ChatGLM2Config" not in capfd.readouterr().err  # told once
    with pytest.raises(CheckpointError, match=r"mindformers\.yaml: load_checkpoint: names no weights"):
        AutoModel.from_pretrained(str(path))
    ms.save_checkpoint(model, str(tmp_path / "mindformers.ckpt"))
    shutil.copy(vocabulary, tmp_path / "tokenizer.model")
    loaded = AutoModel.from_pretrained(str(tmp_path))
    for one, other in zip(model.get_parameters(), loaded.get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy(), err_msg=one.name)
    assert type(AutoTokenizer.from_pretrained(str(tmp_path))) is kind
    path.write_text(
        path.read_text().replace("    type: ChatGLM2ForConditionalGeneration", "    type: LlamaForCausalLM")
    )
    with pytest.raises(ValueError, match=r"model\.arch\.type: LlamaForCausalLM: another network"):
        AutoConfig.from_pretrained(str(path))


def test_names_of_models_stand_for_local_files(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    place = Path("checkpoint_download", "glm3")
    for load in (AutoModel.from_pretrained, lambda name: pipeline("text_generation", model=name)):
        with pytest.raises(ValueError, match=r"checkpoint_download.glm3.glm3_6b\.ckpt: no such file"):
            load("glm3_6b")
    for auto_class in (AutoTokenizer, AutoProcessor):
        with pytest.raises(ValueError, match=r"checkpoint_download.glm3.tokenizer\.model: no such file"):
            auto_class.from_pretrained("glm3_6b")
    with pytest.raises(ValueError, match=r"'glm3_7b' is not supported by 'glm3', please select from \[.*'glm3_6b'"):
        AutoModel.from_pretrained("glm3_7b")
    place.mkdir(parents=True)
    shutil.copy(vocabulary, place / "tokenizer.model")
    config = AutoConfig.from_pretrained("glm3_tiny")
    stored = MindFormersGLM(config)
    stored.save_pretrained(str(place / "glm3_tiny"))
    for name in ("glm3_tiny", "mindspore/glm3_tiny"):
        model = AutoModel.from_pretrained(name)
        for one, other in zip(model.get_parameters(), stored.get_parameters()):
            np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())
        assert type(AutoTokenizer.from_pretrained(name)) is GLM3Tokenizer
        assert type(AutoProcessor.from_pretrained(name).tokenizer) is GLM3Tokenizer
    assert pipeline("text_generation", model="glm3_tiny").network.weights_from == str(place / "glm3_tiny")
    trainer = Trainer(task="text_generation", model="glm3_tiny")
    assert trainer.config.glm_ms.load_checkpoint == str(place / "glm3_tiny")


def test_no_python_file_of_a_folder_runs(weights: Path, vocabulary: Path, tmp_path: Path):
    folder = tmp_path / "released"
    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(MANIFEST))
    GLM3Tokenizer(str(vocabulary)).save_pretrained(str(folder))
    classes = {
        "AutoConfig": "evil.A",
        "AutoModel": "evil.B",
        "AutoTokenizer": ["evil.C", None],
        "AutoProcessor": "evil.D",
    }
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": classes}))
    (folder / "evil.py").write_text("raise SystemExit('the code of the folder runs')\n")
    path, trusted = str(folder), {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(path, **trusted)
    assert type(config) is MindFormersGLMConfig
    assert type(AutoModel.from_pretrained(path, **trusted)) is MindFormersGLM
    assert type(AutoModel.from_config(config, **trusted)) is MindFormersGLM
    assert type(AutoTokenizer.from_pretrained(path, **trusted)) is GLM3Tokenizer
    assert type(AutoProcessor.from_pretrained(path, **trusted).tokenizer) is GLM3Tokenizer
    assert type(pipeline("text_generation", model=path, **trusted).network) is MindFormersGLM


# ------------------------------------------------------------------ ends of answers, chat


@pytest.fixture(scope="module")
def ending(weights: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and tokenizer whose model answers the question with <|user|> alone."""
    model, tokenizer = AutoModel.from_pretrained(str(weights)), GLM3Tokenizer(str(vocabulary))
    ids = tokenizer.build_prompt(QUESTION).token_ids
    logits, role = model.core(ids).asnumpy()[0, -1], tokenizer.get_command("<|user|>")
    output = model.core.parameters()["transformer.output_layer.weight"]
    rows = output.asnumpy().copy()
    rows[[int(logits.argmax()), role]] = rows[[role, int(logits.argmax())]]
    output.set_data(Tensor(rows))
    folder = tmp_path_factory.mktemp("ending") / "folder"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def test_answers_end_at_the_stop_tokens_in_every_door(ending: Path, vocabulary: Path, tmp_path: Path):
    tokenizer = GLM3Tokenizer(str(vocabulary))
    ids, prompt = tokenizer.build_prompt(QUESTION).token_ids, tokenizer.build_prompt(QUESTION)
    expected = [*ids, tokenizer.get_command("<|user|>")]
    core = load_pretrained(ending)
    assert core.stop_token_ids == tokenizer.stop_token_ids
    assert core.generate(ids, max_new_tokens=4) == [expected]
    assert [int(tokens[0]) for tokens in core.stream(ids, max_new_tokens=4)] == expected[-1:]
    model = AutoModel.from_pretrained(str(ending))
    assert model.generation_config.eos_token_id == tokenizer.stop_token_ids
    # A model that does not know its tokenizer, in a pipeline that does.
    core.stop_token_ids = None
    model = MindFormersGLM(model.config, core=core)
    assert model.generation_config.eos_token_id == [2]
    assert model.generate(tokenizer(prompt)["input_ids"], max_new_tokens=4)[0].tolist() == expected
    assert len(model.generate(tokenizer(prompt)["input_ids"], max_new_tokens=4, eos_token_id=[])[0]) == len(ids) + 4
    generator = pipeline("text_generation", model=model, tokenizer=tokenizer)
    for prompts, count in ((prompt, 1), ([prompt, prompt], 2)):
        assert generator(prompts, max_new_tokens=4, batch_size=count) == [{TEXT: [tokenizer.decode(expected)] * count}]
    printed = []
    streamer = SimpleNamespace(put=printed.append, end=lambda: printed.append("end"))
    assert model.generate(tokenizer(prompt)["input_ids"], streamer=streamer, max_new_tokens=4)[0].tolist() == expected
    assert printed == [ids, "end"]  # the end of an answer is no text of it
    history = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    before = json.dumps(history)
    answer, after = model.chat(tokenizer, QUESTION, history, max_new_tokens=4, do_sample=True, seed=1)
    assert json.dumps(history) == before
    assert after[:3] == [*history, {"role": "user", "content": QUESTION}]
    assert (after[3]["role"], after[3]["content"]) == ("assistant", answer)
    assert model.chat(tokenizer, QUESTION, max_new_tokens=4)[0] == ""
    old = GLM2Tokenizer(str(vocabulary))
    answer, pairs = model.chat(old, "问", [("你好", "好")], max_new_tokens=2)
    assert pairs == [("你好", "好"), ("问", answer)]
    with pytest.raises(ValueError, match="instruction: only without history"):
        model.chat(tokenizer, QUESTION, history, instruction="简短回答")
    with pytest.raises(ValueError, match="unknown option 'no_such_option'"):
        model.chat(tokenizer, QUESTION, no_such_option=1)


# ------------------------------------------------------------------ pipeline


def test_pipeline_writes_what_the_core_generates(
    model: MindFormersGLM, weights: Path, vocabulary: Path, tmp_path: Path
):
    tokenizer = GLM3Tokenizer(str(vocabulary))
    prompts = [tokenizer.build_prompt(QUESTION), tokenizer.build_prompt("类型#上衣")]
    expected = [tokenizer.decode(model.core.generate(prompt.token_ids, max_new_tokens=5)[0]) for prompt in prompts]
    generator = pipeline("text_generation", model=model, tokenizer=tokenizer)
    assert generator(prompts[0], max_new_tokens=5, do_sample=False) == [{TEXT: [expected[0]]}]
    assert generator(prompts, batch_size=2, max_new_tokens=5) == [{TEXT: expected}]
    shutil.copytree(weights, tmp_path / "folder")
    tokenizer.save_pretrained(str(tmp_path / "folder"))
    by_path = pipeline("text_generation", model=str(tmp_path / "folder"))
    assert by_path(prompts[0], max_new_tokens=5) == [{TEXT: [expected[0]]}]


# ------------------------------------------------------------------ mistakes


def test_unknown_keys_of_a_yaml_are_named(run: Path, tmp_path: Path):
    path = yaml_of(run, tmp_path, runner_config__epoch=2)
    for read in (MindFormerConfig, AutoConfig.from_pretrained, AutoModel.from_config):
        with pytest.raises(ValueError, match=r"run\.yaml:\d+: runner_config\.epoch: unknown key; did you mean epochs"):
            read(path)


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel, AutoTokenizer, AutoProcessor])
def test_a_yaml_that_is_missing_has_its_neighbour_named(auto_class: Any, run: Path):
    with pytest.raises(ValueError, match=r"setings\.yaml: no such file; did you mean settings\.yaml"):
        auto_class.from_pretrained(str(run / "setings.yaml"))


def test_a_folder_without_weights_or_of_another_model(weights: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    shutil.copy(weights / "config.json", tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"empty: .*safetensors"):
        AutoModel.from_pretrained(str(tmp_path / "empty"))

    values = json.loads((weights / "config.json").read_text())
    values["model_type"] = "llama2"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="model_type = 'llama2': expected 'chatglm'"):
        MindFormersGLMConfig.from_pretrained(str(tmp_path / "other"))


@pytest.mark.slow
def test_weights_that_contain_an_adapter(golden: Path, tmp_path: Path):
    """As the P-Tuning code and MindFormers' LoRA save them: the model has both, from every door."""
    base = golden / "models" / "glm2_tiny"
    prefix, lora = (golden / "train" / name for name in ("ptuning_v2_proj/final.safetensors", "lora/final"))
    folder, joint = tmp_path / "prefixed", tmp_path / "glm.safetensors"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pre_seq_len": 8, "prefix_projection": True}))
    weights = load_file(base / "model.safetensors")
    save_file({**weights, **load_file(prefix)}, folder / "model.safetensors")
    tensors = load_file(lora / "adapter_model.safetensors")
    alpha = json.loads((lora / "adapter_config.json").read_text())["lora_alpha"]
    renamed = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.weight", "mindpet_delta_lora_a")
        .replace("lora_B.weight", "mindpet_delta_lora_b"): tensor
        for name, tensor in tensors.items()
    }
    save_file({**weights, **renamed}, joint)
    ids = np.arange(12)[None]
    expected = {path: load_pretrained(base, adapter=path)(ids).asnumpy() for path in (prefix, lora)}
    pet = {"pet_type": "lora", "lora_rank": 8, "lora_alpha": alpha}
    given = MindFormersGLM(MindFormersGLMConfig.from_pretrained(str(base)))
    given.load_weights(str(joint), lora_alpha=alpha)
    config = MindFormersGLMConfig.from_pretrained(str(base), checkpoint_name_or_path=str(joint), pet_config=pet)
    for model, path in (
        (MindFormersGLM.from_pretrained(str(folder)), prefix),
        (MindFormersGLM(config), lora),
        (given, lora),
    ):
        assert model.core.adapter is not None
        np.testing.assert_array_equal(model.core(ids).asnumpy(), expected[path])
    with pytest.raises(CheckpointError, match="contains an adapter, and the model has one already"):
        given.load_weights(str(joint), lora_alpha=alpha)


def test_a_tokenizer_that_is_missing_or_ambiguous(weights: Path, vocabulary: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no tokenizer\.model here"):
        AutoTokenizer.from_pretrained(str(weights))
    shutil.copy(vocabulary, tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="give model_generation=2 or model_generation=3"):
        ChatGLMTokenizer.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lenght": 5}, "unknown option 'max_lenght'; did you mean max_length"),
        ({"max_length": 3}, "max_length = 3: prompt 0 has .* tokens"),
        ({"min_length": 9}, "min_length: glm_ms does not support this option"),
        ({"logits_processor": [1]}, "logits_processor: not supported"),
    ],
)
def test_options_of_generation_are_checked(model: MindFormersGLM, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        model.generate([801, 803, 5, 6], **options)
