"""What holds for every vocabulary, and what wrong input gets."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer, VocabularyError

CONVERSATION = [
    {"role": "system", "content": "简短回答"},
    {"role": "user", "content": "你好\n世界"},
    {"role": "assistant", "metadata": "search", "content": " hello there"},
    {"role": "observation", "content": ""},
    {"role": "assistant", "content": "好"},
]


def test_special_ids_follow_the_pieces(any_vocabulary):
    for kind, count in ((ChatGLM2Tokenizer, 5), (ChatGLM3Tokenizer, 9)):
        tok = kind(any_vocabulary)
        pieces = tok.sp.GetPieceSize()
        assert tok.vocab_size == pieces + count
        assert [tok.get_command(token) for token in tok.special_tokens] == list(range(pieces, pieces + count))
        assert tok.prefix_tokens == [pieces + 1, pieces + 3]
        assert tok.pad_token_id == tok.sp.unk_id()
        assert tok.eos_token_id == tok.sp.eos_id()
    assert tok.stop_token_ids == [tok.eos_token_id, pieces + 6, pieces + 8]


def test_text_that_spells_special_tokens_stays_text(any_vocabulary):
    tok = ChatGLM3Tokenizer(any_vocabulary)
    specials = {tok.get_command(token) for token in tok.special_tokens} | {tok.eos_token_id}
    for token in (*tok.special_tokens, "</s>", "a<|user|>b", "[gMASK]sop<|user|> \n 你好"):
        assert not specials & set(tok.encode(token, add_special_tokens=False)), token
        assert not specials & set(tok.build_single_message("user", "", token)[1:]), token


def test_template_text_gives_the_ids_of_the_conversation(any_vocabulary):
    tok = ChatGLM3Tokenizer(any_vocabulary)
    ids = tok.build_chat_input("白色 上衣", CONVERSATION)["input_ids"]
    space = " " if tok.sp.EncodeAsPieces("a")[0].startswith("▁") else ""
    text = "[gMASK]sop" + "".join(
        f"<|{item['role']}|>{space}{item.get('metadata', '')}\n{space}{item['content']}"
        for item in [*CONVERSATION, {"role": "user", "content": "白色 上衣"}]
    )
    assert tok.is_template(text)
    assert tok.encode_template(text + "<|assistant|>") == ids
    assert tok.encode_template(text + "<|assistant|> ") == ids


@pytest.mark.parametrize("kind", [ChatGLM2Tokenizer, ChatGLM3Tokenizer])
def test_options_are_arguments_and_attributes(small_vocabulary, kind):
    tok = kind(small_vocabulary, padding_side="right", truncation_side="left")
    texts = ["你好", "a longer text"]
    whole = tok.encode(texts[1], add_special_tokens=False)
    assert tok.encode(texts[1], add_special_tokens=False, truncation=True, max_length=2) == whole[-2:]
    right = tok(texts, padding=True)
    assert right["input_ids"][0][0] == tok.prefix_tokens[0]
    assert (right["attention_mask"][0][-1], right["position_ids"][0][-1]) == (0, 0)
    assert tok(texts, padding=True, padding_side="left") == kind(small_vocabulary)(texts, padding=True)
    tok.padding_side = "left"
    assert tok(texts, padding=True)["attention_mask"][0][0] == 0
    for name, value in (("padding_side", "up"), ("truncation_side", None)):
        with pytest.raises(ValueError, match=f"{name} = {value!r}: must be 'left' or 'right'"):
            kind(small_vocabulary, **{name: value})
        with pytest.raises(ValueError, match=f"{name} = {value!r}: must be 'left' or 'right'"):
            setattr(tok, name, value)
    with pytest.raises(AttributeError, match="padding_sid cannot be set; did you mean padding_side"):
        tok.padding_sid = "left"
    with pytest.raises(AttributeError, match="pad_token_id cannot be set"):
        tok.pad_token_id = 3
    with pytest.raises(ValueError, match="max_length has no effect without truncation"):
        tok.encode("a", max_length=5)
    with pytest.raises(ValueError, match="pad_to_multiple_of = 8: needs padding"):
        tok("a", pad_to_multiple_of=8)


def test_only_chatglm3_encodes_special_tokens(small_vocabulary):
    tok = ChatGLM3Tokenizer(small_vocabulary)
    tok.encode_special_tokens = True
    assert tok.encode("<|user|>")[-1] == tok.get_command("<|user|>")
    with pytest.raises(ValueError, match="encode_special_tokens = 1: must be True or False"):
        tok.encode_special_tokens = 1
    with pytest.raises(AttributeError, match=r"ChatGLM2Tokenizer\.encode_special_tokens cannot be set"):
        ChatGLM2Tokenizer(small_vocabulary).encode_special_tokens = True


def test_template_round_trip(small_vocabulary):
    """`decode` of a conversation, read as template text, is the conversation."""
    tok = ChatGLM3Tokenizer(small_vocabulary)
    ids = tok.build_chat_input(" 你好😀\n\n世界 ", CONVERSATION)["input_ids"]
    assert tok.encode_template(tok.decode(ids)) == ids
    glm2 = ChatGLM2Tokenizer(small_vocabulary)
    prompt = glm2.build_prompt("你好", [("a", "b")])
    assert glm2.encode_template("[gMASK]sop " + prompt) == glm2.encode(prompt)


def test_template_errors(small_vocabulary):
    glm2, glm3 = ChatGLM2Tokenizer(small_vocabulary), ChatGLM3Tokenizer(small_vocabulary)
    assert not glm3.is_template("你好 [gMASK]sop")
    assert not glm3.is_template("")
    with pytest.raises(ValueError, match="must begin with"):
        glm3.encode_template("<|user|>\n你好")
    with pytest.raises(ValueError, match="a message is written"):
        glm3.encode_template("[gMASK]sop<|user|>你好<|assistant|>")
    with pytest.raises(ValueError, match="a message is written"):
        glm3.encode_template("[gMASK]sop<|user|><|assistant|>")
    with pytest.raises(ValueError, match="belong to ChatGLM3"):
        glm2.encode_template("[gMASK]sop<|user|>\n你好<|assistant|>")


def test_round_trip(small_vocabulary):
    for kind in (ChatGLM2Tokenizer, ChatGLM3Tokenizer):
        tok = kind(small_vocabulary)
        for text in ("你好，世界", "  two  spaces ", "😀👋🏽 emoji", "line\nbreak\ttab\r\n", "\x00", "龘𠮷"):
            assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_decode_takes_arrays_and_single_ids(small_vocabulary):
    tok = ChatGLM2Tokenizer(small_vocabulary)
    ids = tok.encode("hello there")
    assert tok.decode(np.array(ids, np.int32)) == tok.decode(tuple(ids)) == "hello there"
    assert tok.decode(ids[-1]) == tok.decode([ids[-1]])
    assert tok.decode(np.int64(ids[-1])) == tok.decode([ids[-1]])


def test_chat_input_is_called_alike(small_vocabulary):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}]
    glm2 = ChatGLM2Tokenizer(small_vocabulary)
    assert glm2.build_chat_input("好", messages) == glm2.build_chat_input("好", [("你好", "世界")])
    for tok in (glm2, ChatGLM3Tokenizer(small_vocabulary)):
        got = tok.build_chat_input("好", messages, role="user")
        size = len(got["input_ids"])
        assert got["attention_mask"] == [1] * size
        assert got["position_ids"] == list(range(size))
    with pytest.raises(ValueError, match="in turn"):
        glm2.build_chat_input("好", messages[:1])
    with pytest.raises(ValueError, match="pair of strings"):
        glm2.build_chat_input("好", [("a", None)])
    with pytest.raises(ValueError, match="questions of the user only"):
        glm2.build_chat_input("好", role="system")
    with pytest.raises(ValueError, match=r"history\[0\]"):
        ChatGLM3Tokenizer(small_vocabulary).build_chat_input("好", [("你好", "世界")])
    with pytest.raises(AssertionError, match="must be one of"):
        ChatGLM3Tokenizer(small_vocabulary).build_chat_input("好", role="tool")


def test_every_method_checks_its_history(small_vocabulary):
    glm2, glm3 = ChatGLM2Tokenizer(small_vocabulary), ChatGLM3Tokenizer(small_vocabulary)
    pairs, messages = [("你好", "世界")], CONVERSATION[1:2] + CONVERSATION[4:]
    assert glm2.build_prompt("好", messages) == glm2.build_prompt("好", [("你好\n世界", "好")])
    assert glm2.build_stream_input("好", messages) == glm2.build_stream_input("好", pairs)
    methods = {
        glm2: (glm2.build_prompt, glm2.build_chat_input, glm2.build_stream_input),
        glm3: (glm3.build_chat_input, glm3.process_response),
    }
    user, answer = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}
    wrong = (
        "你好", 5, {"role": "user"}, ["裙子", "很好"], [("a",)], [("a", None)], [5], [None], [["a", "b"], user],
        [user, {**answer, "content": None}], [user, {**answer, "content": ["世界"]}], [user, {"role": "assistant"}],
        [user, {"content": "世界"}], [{**user, "tool_calls": [{}]}, answer], [{**user, "metadata": 5}, answer],
        [{**user, "function_call": {"name": "f"}}, answer],
    )  # fmt: skip
    for tok, calls in methods.items():
        for call in calls:
            assert call("好", None if call is not glm3.process_response else [])
            for history in (*wrong, pairs if tok is glm3 else [{**user, "metadata": "f"}, answer]):
                with pytest.raises(ValueError, match="history"):
                    call("好", history)
    for text in (None, 5, ["a"]):
        for call in (*methods[glm2], glm3.build_chat_input):
            with pytest.raises(TypeError, match="must be a string"):
                call(text, [])


def test_nothing_is_no_metadata_and_no_tools(small_vocabulary):
    tok = ChatGLM3Tokenizer(small_vocabulary)
    plain = tok.build_chat_input("好", CONVERSATION[:2])
    empty = [{**item, "metadata": None, "tools": None} for item in CONVERSATION[:2]]
    assert tok.build_chat_input("好", empty) == plain
    assert tok.process_response("f\nx", empty)[0] == {"name": "f", "content": "x"}
    with_tools = [tok.build_chat_input("好", [{**CONVERSATION[0], "tools": tools}]) for tools in ([{}], "[{}]", ["{}"])]
    assert with_tools == with_tools[:1] * 3
    assert with_tools[0] != tok.build_chat_input("好", CONVERSATION[:1])
    for tools in (5, True, "x", [5], "[", [""]):
        with pytest.raises(ValueError, match=r"history\[0\]: tools must be a list of objects"):
            tok.build_chat_input("好", [{**CONVERSATION[0], "tools": tools}])
    for call in (tok.build_chat_input, tok.process_response):
        with pytest.warns(UserWarning, match=r"history\[1\]: tools belong to a system message; in one of the user"):
            call("f\nx", [CONVERSATION[0], {**CONVERSATION[1], "tools": [{}]}])
        with pytest.raises(AssertionError, match="role = 'bot'"):
            call("好", [{"role": "bot", "content": "好"}])


def test_keys_of_messages_without_effect_are_told(small_vocabulary):
    glm2, glm3 = ChatGLM2Tokenizer(small_vocabulary), ChatGLM3Tokenizer(small_vocabulary)
    turn = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
    for tok in (glm2, glm3):
        plain = tok.build_chat_input("好", turn)
        with pytest.warns(UserWarning, match=r"history\[1\]: 'weight': no effect; known are role, content, metadata"):
            assert tok.build_chat_input("好", [turn[0], {**turn[1], "weight": 1, "name": ""}]) == plain
        with pytest.raises(ValueError, match=r"history\[1\]: key 'metdata' is not known; did you mean 'metadata'"):
            tok.build_chat_input("好", [turn[0], {**turn[1], "metdata": "f"}])


def test_plain_text_for_base_models(small_vocabulary):
    for kind in (ChatGLM2Tokenizer, ChatGLM3Tokenizer):
        tok = kind(small_vocabulary, template="plain")
        assert tok.build_chat_input("你好")["input_ids"] == tok.encode("你好")
        assert tok.stop_token_ids == [tok.eos_token_id]
        for arguments in ({"history": CONVERSATION[1:2]}, {"history": [("a", "b")]}, {"role": "system"}):
            with pytest.raises(ValueError, match="template = 'plain': a prompt is one text"):
                tok.build_chat_input("你好", **arguments)
        assert pickle.loads(pickle.dumps(tok)).template == "plain"
        with pytest.raises(ValueError, match="template = 'none': must be 'chat' or 'plain'"):
            kind(small_vocabulary, template="none")


def test_pair_truncation_takes_from_the_longer(small_vocabulary):
    tok = ChatGLM2Tokenizer(small_vocabulary)
    first, second = (tok.encode(text, add_special_tokens=False) for text in ("a b c d e f", "x y z"))
    assert len(first) > len(second) > 1
    room = len(second) + 1
    ids = tok.encode("a b c d e f", "x y z", truncation=True, max_length=3 + room)
    kept = [*first[: room - room // 2], *second[: room // 2]]
    assert ids == [*tok.prefix_tokens, *kept, tok.eos_token_id]


def test_padding_rounds_up(small_vocabulary):
    tok = ChatGLM3Tokenizer(small_vocabulary)
    got = tok(["a", "a b c d e"], padding="longest", pad_to_multiple_of=16)
    assert {len(row) for name in got for row in got[name]} == {16}
    assert tok([], padding=True) == {"input_ids": [], "attention_mask": [], "position_ids": []}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "a", "max_length": 4}, "has no effect"),
        ({"text": "a", "truncation": True}, "needs max_length"),
        ({"text": "a", "truncation": True, "max_length": 2}, "leaves no room for text"),
        ({"text": "a", "padding": "max_length"}, "max_length goes with"),
        ({"text": "a", "padding": "left"}, "must be False, True"),
        ({"text": ["a", "b"], "text_pair": ["c"]}, "2 texts but 1 text pairs"),
        ({"text": "a\ud83d"}, "character 1 .* surrogate"),
    ],
)
def test_call_errors(small_vocabulary, call, message):
    with pytest.raises(ValueError, match=message):
        ChatGLM3Tokenizer(small_vocabulary)(**call)


def test_other_errors(small_vocabulary):
    tok = ChatGLM2Tokenizer(small_vocabulary)
    for text in (None, 5, b"bytes", ["nested"]):
        with pytest.raises(TypeError, match="must be a string"):
            tok.encode(text)
    with pytest.raises(ValueError, match="unknown key 'labels'"):
        tok.pad([{"input_ids": [1], "labels": [1]}])
    with pytest.raises(ValueError, match="input_ids is missing"):
        tok.pad([{}])
    with pytest.raises(ValueError, match="attention_mask has 1 values"):
        tok.pad([{"input_ids": [1, 2], "attention_mask": [1]}])
    with pytest.raises(IndexError, match="beyond the vocabulary"):
        tok.decode([tok.vocab_size])
    with pytest.raises(AssertionError, match=r"did you mean.*\[gMASK\]"):
        tok.get_command("gMASK")


def test_vocabulary_errors(tmp_path, small_vocabulary):
    whole = small_vocabulary.read_bytes()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not a model"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VocabularyError, match=rf"{name}: not a whole SentencePiece model"):
            ChatGLM3Tokenizer(tmp_path / name)
    (tmp_path / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(VocabularyError, match="Git LFS pointer"):
        ChatGLM2Tokenizer(tmp_path / "pointer")
    with pytest.raises(VocabularyError, match="no such file"):
        ChatGLM2Tokenizer(str(tmp_path / "absent.model"))
    with pytest.raises(VocabularyError, match="is a folder"):
        ChatGLM2Tokenizer(tmp_path)


def test_a_vocabulary_with_a_flipped_bit(tmp_path, small_vocabulary):
    """Refused, or another vocabulary that works; never a traceback."""
    content, path = small_vocabulary.read_bytes(), tmp_path / "tokenizer.model"
    for place in range(0, len(content), max(len(content) // 300, 1)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tok = ChatGLM3Tokenizer(path)
            tok.convert_ids_to_tokens(list(range(tok.vocab_size)))
        except VocabularyError as error:
            assert str(path) in str(error)  # noqa: PT017, many bits are harmless


def test_the_released_vocabulary_is_known_by_its_hash(tmp_path, vocab_file):
    content = bytearray(vocab_file.read_bytes())
    content[500_000] ^= 1
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(VocabularyError, match=r"tokenizer\.model: damaged: it has the size of .*fetch it again"):
        ChatGLM2Tokenizer(tmp_path / "tokenizer.model")


def test_pickle(small_vocabulary):
    tok = ChatGLM3Tokenizer(small_vocabulary, encode_special_tokens=True)
    twin = pickle.loads(pickle.dumps(tok))
    assert twin.encode("<|user|> 你好") == tok.encode("<|user|> 你好")


def _answer(tok: ChatGLM3Tokenizer, code: str) -> object:
    history = [{"role": "system", "content": "", "tools": []}, {"role": "user", "content": "q"}]
    return tok.process_response(f"weather\n```python\n{code}\n```", history)[0]


def test_tool_calls_are_read_not_run(small_vocabulary, tmp_path):
    tok = ChatGLM3Tokenizer(small_vocabulary)
    call = "tool_call(city='北京', days=-3, flags=[True, None], more={'a': (1, 2.5)})"
    parameters = {"city": "北京", "days": -3, "flags": [True, None], "more": {"a": (1, 2.5)}}
    assert _answer(tok, call) == {"name": "weather", "parameters": parameters}
    assert _answer(tok, "tool_call()") == {"name": "weather", "parameters": {}}
    mark = tmp_path / "mark"
    for code in (
        f"tool_call(a=open({str(mark)!r}, 'w'))",
        f"open({str(mark)!r}, 'w')",
        "tool_call(1)",
        "tool_call(**{'a': 1})",
        "tool_call(a=1, a=2)",
        "tool_call(a=",
        "tool_call(a=" + "(" * 5000 + ")",
        "tool_call(a=" + "-" * 20000 + "1)",
        "tool_call(a='\x00')",
        "",
    ):
        with pytest.warns(UserWarning, match="the call in it cannot be read: not a call"):
            assert _answer(tok, code) == f"weather\n```python\n{code}\n```"
    assert not mark.exists()


def test_light_import():
    """A chat client must not pay for a framework to tokenize."""
    code = (
        "import sys, glm_ms.tokenizer, glm_ms.data.datasets;"
        "print([n for n in ('mindspore', 'mindformers', 'transformers', 'torch') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
