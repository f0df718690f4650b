"""`chat` and `stream_chat`: prompts, stop tokens, histories and tool calls of both families."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_helpers import write_small_vocabulary

from glm_ms import ChatGLM2Tokenizer, ChatGLM3Tokenizer, GLMConfig, GLMForCausalLM
from glm_ms.generation.chat import Round
from glm_ms.tokenizer import SentencePieceTokenizer

CALL = "get_weather\n ```python\ntool_call(city='北京')\n```"
SYSTEM = {"role": "system", "content": "你好", "tools": [{"name": "get_weather"}]}


class Parrot(GLMForCausalLM):
    """Says given texts in turn, and remembers what it was asked."""

    def __init__(self, tokenizer: SentencePieceTokenizer, *answers: str, stop: str = "<eos>") -> None:
        self.config = SimpleNamespace(seq_length=2048)
        self.tokenizer, self.answers, self.stop = tokenizer, list(answers), stop
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    def _next(self, ids: list[int], options: dict[str, Any]) -> list[int]:
        self.asked.append((ids, options))
        parts = self.answers.pop(0).split("<|assistant|>")
        found = self.tokenizer.encode(parts[0], add_special_tokens=False)
        for part in parts[1:]:
            found += [self.tokenizer.get_command("<|assistant|>")]
            found += self.tokenizer.encode(part, add_special_tokens=False)
        return [*found, self.tokenizer.get_command(self.stop)]

    def generate(self, ids: Any, **options: Any) -> list[list[int]]:  # type: ignore[override]
        return [[*ids, *self._next(ids, options)]]

    def stream(self, ids: Any, **options: Any) -> Iterator[np.ndarray]:  # type: ignore[override]
        for token in self._next(ids, options):
            yield np.array([token], np.int32)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def glm2(vocabulary: Path) -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(vocabulary)


@pytest.fixture(scope="module")
def glm3(vocabulary: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(vocabulary)


def test_pairs_of_chatglm2(glm2: ChatGLM2Tokenizer) -> None:
    history = [("你好", "好"), ["上衣", "白色"]]
    before = copy.deepcopy(history)
    model = Parrot(glm2, "  [[训练时间]]的裙子 \n", "红色")
    answer, after = model.chat(glm2, "推荐裙子", history)
    assert (answer, after) == ("2023年的裙子", [*before, ("推荐裙子", "2023年的裙子")])
    assert history == before
    ids, options = model.asked[0]
    assert ids == glm2.build_chat_input("推荐裙子", before)["input_ids"]
    assert options == {"max_length": 2048, "do_sample": True, "top_p": 0.8, "temperature": 0.8,
                       "max_new_tokens": 2048 - len(ids), "eos_token_id": [glm2.eos_token_id]}  # fmt: skip
    after[0] = after[1] = None
    assert model.chat(glm2, "问", history)[1] == [*before, ("问", "红色")]


def test_messages_of_chatglm2_stay_messages(glm2: ChatGLM2Tokenizer) -> None:
    history = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    answer, after = Parrot(glm2, "红色").chat(glm2, "颜色", history)
    assert after == [*history, {"role": "user", "content": "颜色"}, {"role": "assistant", "content": answer}]
    assert len(history) == 2
    assert after[0] is not history[0]


@pytest.mark.parametrize("stop", ["<eos>", "<|user|>", "<|observation|>"])
def test_messages_of_chatglm3(glm3: ChatGLM3Tokenizer, stop: str) -> None:
    history = [{"role": "system", "content": "简短"}]
    model = Parrot(glm3, "\n 红色[[训练时间]]", stop=stop)
    answer, after = model.chat(glm3, "颜色", history)
    assert answer == "红色2023年"
    message = {"role": "assistant", "metadata": "", "content": "红色[[训练时间]]"}
    assert after == [{"role": "system", "content": "简短"}, {"role": "user", "content": "颜色"}, message]
    assert history == [{"role": "system", "content": "简短"}]
    assert model.asked[0][1]["eos_token_id"] == glm3.stop_token_ids
    assert model.asked[0][0] == glm3.build_chat_input("颜色", history)["input_ids"]


def test_tools_of_chatglm3(glm3: ChatGLM3Tokenizer) -> None:
    call = {"name": "get_weather", "parameters": {"city": "北京"}}
    model = Parrot(
        glm3, f"\n 我来查<|assistant|>{CALL}", "\n 晴", f"{CALL}<|assistant|>{CALL}", "get_weather\ntool_call("
    )
    answer, history = model.chat(glm3, "天气", [SYSTEM])
    assert answer == call
    assert [message.get("metadata") for message in history] == [None, None, "", " get_weather"]
    answer, history = model.chat(glm3, '{"weather": "晴"}', history, role="observation")
    assert answer == "晴"
    assert history[-2] == {"role": "observation", "content": '{"weather": "晴"}'}
    assert model.asked[1][0] == glm3.build_chat_input('{"weather": "晴"}', history[:-2], "observation")["input_ids"]
    assert model.chat(glm3, "天气", [SYSTEM])[0] == [call, call]
    with pytest.warns(UserWarning, match="cannot be read"):
        assert model.chat(glm3, "天气", [SYSTEM])[0] == "get_weather\ntool_call("


TEXTS = ["好", "", " ", "😀", "一\n\n二", "裙子👨‍👩‍👧很好 ", "[[训练时间]]", "[[训练"]


@pytest.mark.parametrize("kind", ["glm2", "glm3"])
def test_streams_lose_and_repeat_nothing(request: pytest.FixtureRequest, kind: str) -> None:
    tok = request.getfixturevalue(kind)
    for text in TEXTS if kind == "glm2" else [*TEXTS, *(f"\n {text}" for text in TEXTS)]:
        whole = Parrot(tok, text).chat(tok, "问")
        items = list(Parrot(tok, text).stream_chat(tok, "问"))
        assert items[-1] == whole
        texts = [item[0] for item in items]
        assert not any("\ufffd" in shown for shown in texts)
        assert all(later.startswith(shown) for shown, later in zip(texts, texts[1:]))
        assert len(texts) > (whole[0] not in ("", "[[训练"))  # something before the end
        for shown, history in items:
            last = history[-1]
            assert len(history) == len(whole[1])
            assert (last[1] if isinstance(last, tuple) else last["content"]).replace("[[训练时间]]", "2023年") == shown


def test_a_stream_shows_the_text_before_a_call(glm3: ChatGLM3Tokenizer) -> None:
    model = Parrot(glm3, f"\n 我来查<|assistant|>{CALL}")
    items = list(model.stream_chat(glm3, "天气", [SYSTEM]))
    assert [answer for answer, _ in items][-2:] == ["我来查", {"name": "get_weather", "parameters": {"city": "北京"}}]
    assert [len(history) for _, history in items] == [3] * (len(items) - 1) + [4]


def test_a_stream_can_be_stopped(glm2: ChatGLM2Tokenizer) -> None:
    answers = iter([False] * 8 + [True])
    one = Round(Parrot(glm2, "一二三四五六"), glm2, "问", None, "user", {})
    items = list(one.stream(lambda: next(answers)))
    assert one.stopped
    assert items[-1][1] == [("问", items[-1][0])]
    assert 0 < len(items[-1][0]) < 6


def test_loops_of_the_released_demonstrations(glm3: ChatGLM3Tokenizer) -> None:
    model = Parrot(glm3, "\n 好", "\n 红色")
    history: Any = []
    past = None
    for query in ("你好", "颜色"):
        stream = model.stream_chat(
            glm3, query, history=history, past_key_values=past, return_past_key_values=True, top_p=1, temperature=0.01
        )
        *_, (answer, history, past) = stream
        assert isinstance(answer, str)
    assert [message["content"] for message in history] == ["你好", "好", "颜色", "红色"]
    assert model.asked[1][1]["temperature"] == 0.01
    with pytest.raises(ValueError, match="past_key_values: must be None"):
        model.stream_chat(glm3, "问", past_key_values=((),))


def test_options_of_the_caller_win(glm2: ChatGLM2Tokenizer) -> None:
    model = Parrot(glm2, *"abcd")
    model.chat(glm2, "问", do_sample=False, max_new_tokens=7, eos_token_id=[5])
    assert model.asked[0][1] == {"max_length": 2048, "max_new_tokens": 7, "do_sample": False, "eos_token_id": [5]}
    model.chat(glm2, "问", num_beams=3)
    assert "do_sample" not in model.asked[1][1]
    model.chat(glm2, "问", max_length=100, seed=3)
    ids, options = model.asked[2]
    assert options["max_new_tokens"] == 100 - len(ids)
    assert options["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 5}, "max_length = 5: the conversation has .* shorten the history"),
        ({"max_length": None}, "max_length = None: give a number"),
        ({"num_return_sequences": 2}, "num_return_sequences: a conversation has one answer"),
        ({"role": "system"}, "ChatGLM2 knows questions of the user only"),
        ({"history": [{"role": "system", "content": "a"}]}, "needs user and assistant in turn"),
        ({"history": "你好"}, "must be a list"),
        ({"tokenizer": None}, "tokenizer: NoneType: give a ChatGLM2Tokenizer"),
    ],
)
def test_wrong_arguments(glm2: ChatGLM2Tokenizer, arguments: dict[str, Any], message: str) -> None:
    given = {"tokenizer": glm2, "query": "问", **arguments}
    for call in (Parrot(glm2).chat, Parrot(glm2).stream_chat):
        with pytest.raises(ValueError, match=message):
            call(**given)


@pytest.fixture(scope="module")
def small_model(glm3: ChatGLM3Tokenizer) -> GLMForCausalLM:
    config = GLMConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, kv_channels=8, seq_length=1024,
        padded_vocab_size=glm3.vocab_size + 7, param_init_type="float32", compute_dtype="float32",
    )  # fmt: skip
    return GLMForCausalLM(config)


def test_a_network_streams_what_it_answers(small_model: GLMForCausalLM, glm3: ChatGLM3Tokenizer) -> None:
    """Random weights write ids beyond the vocabulary, too."""
    options: dict[str, Any] = {"max_new_tokens": 12, "max_length": 64, "seed": 3}
    answer, history = small_model.chat(glm3, "你好", **options)
    assert list(small_model.stream_chat(glm3, "你好", **options))[-1] == (answer, history)
    with pytest.raises(ValueError, match="unknown option 'top_q'"):
        small_model.chat(glm3, "你好", top_q=1)


@pytest.mark.slow
def test_memory_stays_flat_over_200_rounds(small_model: GLMForCausalLM, glm3: ChatGLM3Tokenizer) -> None:
    """As a demonstration keeps them: the last rounds of a conversation are the history."""
    history: list[Any] = []
    sizes = []
    tracemalloc.start()
    try:
        for number in range(200):
            _, history = small_model.chat(glm3, f"第{number}个问题", history[-6:], max_new_tokens=2, seed=number)
            if number in (99, 199):
                sizes.append((tracemalloc.get_traced_memory()[0], _resident_bytes()))
    finally:
        tracemalloc.stop()
    (objects, resident), (objects_later, resident_later) = sizes
    assert objects_later - objects < 100_000
    assert resident_later - resident < 20 << 20
    assert len(json.dumps(history)) < 10_000


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
