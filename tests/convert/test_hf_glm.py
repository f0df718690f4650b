"""Folders for `GlmForCausalLM`: weights, tokenizer and chat template against the goldens and against SentencePiece."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from marks import slow_unless
from tolerances import HF_GLM

from glm_ms.convert.conversion import HF_GLM as TARGET
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.fast_tokenizer import GUARD, tokenizer_json
from glm_ms.convert.hf_glm import text_files
from glm_ms.model.config import GLMConfig
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from tools.convert_weight import main as convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = ["类型#裙*材质#针织*风格#复古", "这款上衣简约大方，清新自然。你好", "the quick brown fox, sop and eop"]
BPE = {
    "model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1,
}  # fmt: skip
SPELLED = "[gMASK]sop<sop>[MASK]<|user|>\n 你</s><unk><s><|assistant|>"
ODD = [
    "",
    " ",
    "\t\t a",
    "ａｂＣ　１２",
    "a\u200bb\ufeff",
    "👩\u200d👩\u200d👧😀",
    "\0\x7f\u2028",
    "▁a ▁",
    "a  b   c    d",
    "\r\n\n",
    "e\u0301",
]
KINDS = {2: ChatGLM2Tokenizer, 3: ChatGLM3Tokenizer}
TOOLS = [{"name": "get_weather", "description": "天气", "parameters": {"city": {"type": "string"}}}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """small(**options): the file of a small BPE vocabulary."""

    def train(**options: object) -> Path:
        folder = tmp_path_factory.mktemp("vocabulary")
        (folder / "text").write_text("\n".join(SENTENCES * 20) + "\n", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.Train(
            input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), **{**BPE, **options}
        )
        return folder / "tokenizer.model"

    return train


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory):
    """exported(vocab_file, generation, case): the folder of a golden model, written by the tool; each once."""
    made: dict[tuple[Any, ...], Path] = {}

    def export(
        vocab_file: Path, generation: int, case: str = "glm3_tiny", config: dict[str, Any] | None = None
    ) -> Path:
        key = (vocab_file, generation, case)
        if key not in made:
            output = tmp_path_factory.mktemp("hf") / "glm"
            line = ["--input", golden / "models" / case, "--output", output, "--to", TARGET, "--tokenizer", vocab_file]
            assert convert([*map(str, line), "--model_generation", str(generation)]) == 0
            made[key] = output
        return made[key]

    return export


def test_text_has_the_ids_of_sentencepiece(small) -> None:
    rng = random.Random(0)
    runs = [character * count for character in " =-.\n0a好" for count in range(1, 30)]
    mixed = [
        "".join(rng.choice(" =.\n\ta好好的quick,，") * rng.choice([1, 1, 2, 5]) for _ in range(12)) for _ in range(300)
    ]
    for options in (
        {},
        {"add_dummy_prefix": False},
        {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
        {"bos_id": -1},
    ):
        ours = ChatGLM3Tokenizer(small(**options))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
        theirs.encode_special_tokens = True  # as split_special_tokens=True of transformers
        for text in (*SENTENCES, SPELLED, *ODD, *runs, *mixed):
            ids = ours.encode(text)
            assert theirs.encode(text).ids == ids, text
            assert theirs.encode(text, "你好").ids == ours.encode(text, "你好"), text
            if "▁" not in text:
                assert theirs.decode(ids) == text


def test_the_genuine_vocabulary(vocab_file: Path, golden: Path) -> None:
    ours = ChatGLM3Tokenizer(vocab_file)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    theirs.encode_special_tokens = True
    records = [row["text"] for row in json.loads((golden / "tokenizer_glm3.json").read_text("utf-8"))["texts"]]
    for text in (*records, *SENTENCES, SPELLED, *ODD):
        assert theirs.encode(text).ids == ours.encode(text), text


@pytest.mark.slow
def test_every_record_of_adgen(vocab_file: Path, adgen_file: Path) -> None:
    ours = ChatGLM3Tokenizer(vocab_file)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    for line in adgen_file.read_text("utf-8").splitlines():
        for text in json.loads(line).values():
            assert theirs.encode(text).ids == ours.encode(text), text


@pytest.mark.parametrize("generation", [2, 3])
def test_the_loaded_tokenizer(small, exported, generation: int) -> None:
    ours = KINDS[generation](small())
    theirs = transformers.AutoTokenizer.from_pretrained(exported(small(), generation))
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (ours.eos_token_id, 0, "left")
    texts = ["你好", "这款上衣简约大方"]
    for options in ({}, {"padding": True}, {"truncation": True, "max_length": 5}, {"add_special_tokens": False}):
        expected, found = ours(texts, **options), theirs(texts, **options)
        assert found["input_ids"] == expected["input_ids"]
        assert found["attention_mask"] == expected["attention_mask"]
    assert theirs(SPELLED, split_special_tokens=True)["input_ids"] == ours.encode(SPELLED)
    assert theirs.decode(ours.encode("你好")[2:]) == "你好"
    names = {"sop": "<sop>", "eop": "<eop>"}
    for token in ours.special_tokens:
        assert theirs.convert_tokens_to_ids(names.get(token, token)) == ours.get_command(token)
    assert theirs("a soprano sop")["input_ids"] == ours.encode("a soprano sop")


@pytest.mark.slow
def test_chat_templates_of_the_goldens(vocab_file: Path, exported, golden: Path, tmp_path: Path) -> None:
    for generation, key in ((2, "build_prompt"), (3, "build_chat_input")):
        rows = json.loads((golden / f"tokenizer_glm{generation}.json").read_text("utf-8"))[key]
        theirs = loaded_tokenizer(KINDS[generation](vocab_file), tmp_path / str(generation))
        for row in rows:
            question = {"role": row.get("role", "user"), "content": row["query"]}
            messages = [*as_messages(row["history"]), question]
            found = theirs.apply_chat_template(messages, add_generation_prompt=True)
            assert found == row["input_ids"], row


def as_messages(history: list[Any] | None) -> list[dict[str, Any]]:
    """Messages of a history in either form."""
    messages = []
    for item in history or []:
        pair = zip(("user", "assistant"), item) if isinstance(item, list) else ()
        messages += [{"role": role, "content": text} for role, text in pair] or [item]
    return messages


def loaded_tokenizer(ours: ChatGLM2Tokenizer | ChatGLM3Tokenizer, folder: Path) -> Any:
    """The exported tokenizer, without weights."""
    folder.mkdir()
    for name, text in text_files(GLMConfig(), "float32", ours).items():
        (folder / name).write_text(text, encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_chat_templates(small, tmp_path: Path) -> None:
    for generation, options in ((2, {}), (3, {}), (3, {"add_dummy_prefix": False})):
        ours = KINDS[generation](small(**options))
        theirs = loaded_tokenizer(ours, tmp_path / f"{generation}{len(options)}")
        for text in (*SENTENCES, SPELLED, *ODD, GUARD):
            history = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            expected = ours.build_chat_input(text.replace(GUARD, ""), [
                {**item, "content": item["content"].replace(GUARD, "")} for item in history
            ])["input_ids"]  # fmt: skip
            messages = [*history, history[0]]
            assert theirs.apply_chat_template(messages, add_generation_prompt=True) == expected, text
            whole = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert theirs(whole, add_special_tokens=False)["input_ids"] == expected  # as servers do
    with pytest.raises(Exception, match="knows the roles system, user"):
        theirs.apply_chat_template([{"role": "bot", "content": "a"}])
    glm2 = transformers.AutoTokenizer.from_pretrained(tmp_path / "20")
    for roles in (["system", "user"], ["user", "user"]):
        with pytest.raises(Exception, match="user and assistant in turn"):
            glm2.apply_chat_template([{"role": role, "content": "a"} for role in roles])


def test_tools_in_the_chat_template(small, tmp_path: Path) -> None:
    ours = ChatGLM3Tokenizer(small())
    theirs = loaded_tokenizer(ours, tmp_path / "3")
    system = {"role": "system", "content": "Answer.", "tools": TOOLS}
    call = {
        "role": "assistant",
        "metadata": "get_weather",
        "content": "```python\ntool_call(city='北\\n京', days=[1, True])\n```",
    }
    earlier = [system, {"role": "user", "content": "天气？"}, call]
    expected = ours.build_chat_input('{"t": 5}', earlier, role="observation")["input_ids"]
    observed = {"role": "observation", "content": '{"t": 5}'}
    assert theirs.apply_chat_template([*earlier, observed], add_generation_prompt=True) == expected
    # The same in the form of OpenAI's API.
    function = {"name": "get_weather", "arguments": {"city": "北\n京", "days": [1, True]}}
    calls = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    messages = [system, earlier[1], calls, {**observed, "role": "tool", "tool_call_id": "1"}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True) == expected
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    text = theirs.apply_chat_template(earlier[1:2], tools=wrapped, tokenize=False)
    assert text.startswith("[gMASK]<sop><|system|>\n Answer the following questions")
    assert json.dumps(TOOLS, indent=4, ensure_ascii=False) in text
    text_arguments = {**function, "arguments": "{}"}
    with pytest.raises(Exception, match="arguments of a tool call must be an object"):
        theirs.apply_chat_template([{"role": "assistant", "tool_calls": [{"function": text_arguments}]}])


CASES = ["glm3_tiny", "glm2_mha", "glm2_tiny", "glm3_32k_tiny"]


@pytest.mark.parametrize("case", slow_unless(CASES[:2], CASES))
def test_logits_and_greedy_answers_are_those_of_the_reference(case: str, small, exported, golden: Path) -> None:
    folder = exported(small(), 2 if case.startswith("glm2") else 3, case)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is transformers.GlmForCausalLM
    numbers = np.load(golden / "models" / case / "golden.npz")
    ids, mask, positions = (torch.tensor(numbers[name]) for name in ("input_ids", "attention_mask", "position_ids"))
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).logits.numpy()
    real = numbers["attention_mask"] == 1
    np.testing.assert_allclose(found[real], numbers["logits"][real], **HF_GLM)
    length = numbers["greedy_sequences"].shape[1]
    prompt = length - 16 if length > ids.shape[1] else ids.shape[1]
    first = torch.tensor(numbers["greedy_sequences"][:1, :prompt])
    answer = model.generate(first, max_length=length, do_sample=False, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(answer.numpy(), numbers["greedy_sequences"][:1])


def test_files_of_the_folder(small, exported, golden: Path, tmp_path: Path) -> None:
    folder = exported(small(), 3)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"], config["rope_theta"]) == ("glm", 2, 10000.0)
    assert not list(folder.glob("*.py"))
    ours = ChatGLM3Tokenizer(small())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ours.stop_token_ids
    assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    base = ChatGLM3Tokenizer(small(), template="plain")
    assert "chat_template" not in json.loads(text_files(GLMConfig(), "float32", base)["tokenizer_config.json"])
    plan_conversion(
        golden / "models" / "glm3_tiny", tmp_path / "b", target=TARGET, tokenizer=ours, dtype="bfloat16",
        max_shard_size=100_000
    ).run()  # fmt: skip
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_what_cannot_be_exported(small, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = golden / "models" / "glm3_tiny", tmp_path / "out"
    ours = ChatGLM3Tokenizer(small())
    for case, words in (("glm2_bias_layernorm", "rmsnorm: false"), ("glm2_no_final_norm", "post_layer_norm: false")):
        with pytest.raises(CheckpointError, match=f"{case}.*{words}.*: GlmForCausalLM has no such network"):
            plan_conversion(golden / "models" / case, output, target=TARGET, tokenizer=ours)
    for options, words in (
        ({"model_type": "unigram"}, "not BPE"), ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"), ({"byte_fallback": False}, "lacks byte fallback"),
        ({"user_defined_symbols": "<n>"}, "user-defined symbols"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"tokenizer\.model: .*{words}"):
            plan_conversion(source, output, target=TARGET, tokenizer=ChatGLM3Tokenizer(small(**options)))
    large = ChatGLM3Tokenizer(small(vocab_size=600, **{"input_sentence_size": 0}))
    if large.vocab_size > 512:
        with pytest.raises(CheckpointError, match="padded_vocab_size = 512; give the tokenizer of the model"):
            plan_conversion(source, output, target=TARGET, tokenizer=large)
    with pytest.raises(CheckpointError, match="a tokenizer is needed for hf-glm"):
        plan_conversion(source, output, target=TARGET)
    line = ["--input", str(source), "--output", str(output)]
    assert convert([*line, "--to", TARGET]) == 1
    assert convert([*line, "--model_generation", "3"]) == 1
    assert convert([*line, "--to", TARGET, "--tokenizer", str(small())]) == 1
    assert convert(["--input", str(source), "--output", "a.ckpt", "--to", TARGET]) == 1
    said = capsys.readouterr().err
    for words in (
        "no tokenizer.model here", "--model_generation: is for --to hf-glm or gguf only",
        "does not tell which one this is", "no tokenizer.model here",
    ):  # fmt: skip
        assert words in said
    assert not output.exists()
