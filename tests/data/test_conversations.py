"""Conversations: what is taken, and how each fault is reported."""

from __future__ import annotations

import json

import pytest
from data_helpers import conversation_encoder, tool_encoder

from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.encoder import Lengths
from glm_ms.data.records import (
    Message,
    format_tool_call,
    parse_conversation,
    parse_tool_conversation,
    tool_call_problem,
)
from glm_ms.data.statistics import measure
from glm_ms.storage.errors import DataError
from glm_ms.tokenizer.answers import parse_tool_call

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": {"y": [2]}}


def conversation(*messages, **more):
    return {"conversations": list(messages), **more}


def test_messages():
    system, observation = {"role": "system", "content": "s"}, {"role": "observation", "content": "o"}
    assert parse_conversation(conversation(system, USER, ANSWER, observation, ANSWER), "f:1") == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a", loss=True),
        Message("observation", "o", loss=True),
        Message("assistant", "a", loss=True),
    )
    # A flag that says what holds anyway, and keys of the user's own.
    assert parse_conversation(conversation(USER, {**ANSWER, "loss": True, "id": 3}, source="x"), "f:1")
    assert parse_conversation(conversation(USER, ANSWER, tools=None), "f:1")


def test_messages_with_tools():
    tools = [{"name": "f", "说明": "x"}]
    system = {"role": "system", "content": "s"}
    found = parse_tool_conversation(
        conversation(system, USER, {**ANSWER, "loss": False}, TOOL, ANSWER, tools=tools), "f:1"
    )
    assert found[0].role == "system"
    introduction, _, listing = found[0].content.partition("\n")
    assert introduction.endswith("the following tools:")
    assert listing == json.dumps(tools, indent=4, ensure_ascii=False)
    assert found[1:] == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a", loss=False),
        Message("assistant", "```python\ntool_call(x=1)\n```", "f", loss=True),
        Message("observation", '{"y": [2]}'),
        Message("assistant", "a", loss=True),
    )
    quiet = parse_tool_conversation(conversation(USER, {**TOOL, "loss": False, "observation": "o"}), "f:1")
    assert [message.loss for message in quiet] == [False, False, False]
    assert quiet[2] == Message("observation", "o")


def test_tools_in_every_form():
    tools = [{"name": "f", "说明": "x"}, "g"]
    (system, *_) = parse_tool_conversation(conversation(USER, ANSWER, tools=tools), "f:1")
    for form in (json.dumps(tools), json.dumps(tools, ensure_ascii=False), [json.dumps(tools[0]), "g"]):
        assert parse_tool_conversation(conversation(USER, ANSWER, tools=form), "f:1")[0] == system
    assert parse_tool_conversation(conversation(USER, ANSWER, tools=""), "f:1")[0] == Message("user", "q")
    objects, twice = {"f": {}}, '[{"a": 1, "a": 2}]'
    for form in (5, True, objects, json.dumps(objects), "5", "f", "[", [5], [None], [""], [[objects]], ["{"], twice):
        with pytest.raises(DataError, match=r"^f:1: 'tools'.* must be a list of"):
            parse_tool_conversation(conversation(USER, ANSWER, tools=form), "f:1")


def test_keys_without_effect_are_told_by_name(records_file, glm3):
    record = conversation(USER, {**ANSWER, "id": 3, "time": ""}, source="x", empty=None)
    path = records_file([record, conversation(USER, ANSWER)])
    line = "2 records used; not used: key 'id' of messages, key 'source'"
    for encoder in (conversation_encoder(glm3, 31, 32), tool_encoder(glm3, 64)):
        for kind in (TrainDataset, EvalDataset):
            assert line in kind(path, encoder).describe()
    assert measure(path, tool_encoder(glm3, 64)).left_out == {"key 'id' of messages", "key 'source'"}


@pytest.mark.parametrize("parse", [parse_conversation, parse_tool_conversation])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["x"], "f:3: a record must be a JSON object .* found list"),
        ({}, "f:3: no key 'conversations', the record has none"),
        ({"content": "x", "summary": "y"}, "no key 'conversations', the record has 'content', 'summary'"),
        ({"conversation": []}, "key 'conversation' is not known; did you mean 'conversations'"),
        ({"conversations": "x"}, "'conversations' must be a list of messages, found str"),
        ({"conversations": None}, "'conversations' must be a list of messages, found NoneType"),
        ({"conversations": {}}, "'conversations' must be a list of messages, found dict"),
        (conversation(), "'conversations' is empty; remove the record"),
        (conversation("x"), "message 1 must be an object .* found str"),
        (conversation(USER, {"content": "x"}), "message 2: no key 'role', the message has 'content'"),
        (conversation({"from": "human", "value": "x"}), "'value'; 'from' and 'value' are called 'role' and"),
        (conversation(USER, {}), "message 2: no key 'role', the message has none"),
        (conversation({**USER, "role": "usr"}), "message 1: role 'usr' is not known; did you mean user"),
        (conversation({**USER, "role": "human"}), "role 'human' is not known; the roles are system, user"),
        (conversation({**USER, "role": None}), "role None is not known"),
        (conversation({**USER, "role": ["user"]}), r"role \['user'\] is not known"),
        (conversation({"role": "user"}, ANSWER), "message 1: no key 'content', the message has 'role'"),
        (conversation({"role": "user", "contents": "x"}), "key 'contents' is not known; did you mean 'content'"),
        (conversation({"role": "user", "content": None}), "message 1: 'content' must be a string, found None"),
        (conversation({"role": "user", "content": 5}), "message 1: 'content' must be a string, found int: 5"),
        (conversation({"role": "user", "content": ["x"]}), "'content' must be a string, found list"),
        (conversation({"role": "user", "content": "\ud83d"}), "'content' has half of a surrogate pair"),
        (conversation(USER), "no message of the assistant, so there is nothing to learn"),
        (conversation(USER, {"role": "observation", "content": "o"}), "no message of the assistant"),
        (
            conversation({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER, ANSWER),
            "2 system messages; at most one is allowed",
        ),
        (conversation(USER, {"role": "system", "content": "b"}, ANSWER), "must be the first one; move it"),
        (conversation(USER, {**ANSWER, "loss": 0}), "message 2: 'loss' must be true or false, found int: 0"),
        (conversation(USER, {**ANSWER, "los": False}), "key 'los' is not known; did you mean 'loss'"),
        (conversation(USER, {**ANSWER, "Loss": False}), "key 'Loss' is not known; did you mean 'loss'"),
        (conversation({**USER, "loss": True}, ANSWER), "message 1: 'loss'.* has no effect"),
        (conversation(USER, {**ANSWER, "metadata": "f"}), "message 2: 'metadata' has no effect"),
        (conversation({"role": "system", "content": "s", "tools": [{}]}, USER, ANSWER), "1: 'tools' has no effect"),
        (conversation(USER, {**ANSWER, "tool_calls": [{}]}), "message 2: 'tool_calls' has no effect; write tools"),
        (conversation(USER, {**ANSWER, "function_call": {"name": "f"}}), "message 2: 'function_call' has no effect"),
        (conversation({**USER, "name": "bob"}, ANSWER), "message 1: 'name' has no effect with role 'user'; remove it"),
        (conversation(USER, ANSWER, system="s"), "'system' has no effect beside 'conversations'; write it"),
        (conversation(USER, ANSWER, history=[["a", "b"]]), "'history' has no effect beside 'conversations'"),
    ]
)  # fmt: skip
def test_faults(parse, record, message):
    with pytest.raises(DataError, match=message) as caught:
        parse(record, "f:3")
    assert str(caught.value).startswith("f:3: ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation(USER, TOOL), "message 2: role 'tool' is not known to ConversationDataLoader; use data_loader"),
        (conversation(USER, ANSWER, tools=[]), "'tools' is not known to ConversationDataLoader; remove it, or use"),
        (conversation(USER, {**ANSWER, "loss": False}), "message 2: 'loss' has no effect with ConversationData"),
    ]
)  # fmt: skip
def test_what_needs_the_other_loader(record, message):
    with pytest.raises(DataError, match=message):
        parse_conversation(record, "f:1")
    assert parse_tool_conversation(record, "f:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "message 2: 'name' must be a string, found None"),
        ({"name": " "}, "message 2: 'name' must be the name of the tool"),
        ({"name": "a\nb"}, "message 2: 'name' must be the name of the tool"),
        ({"parameters": "{}"}, "message 2: 'parameters' must be an object, found str"),
        ({"parameters": None}, "message 2: 'parameters' must be an object, found NoneType"),
        ({"parameters": {"page-size": 1}}, "message 2: parameter 'page-size' cannot be the name of an argument"),
        ({"parameters": {"from": 1}}, "message 2: parameter 'from' cannot be the name of an argument"),
        ({"parameters": {"": 1}}, "message 2: parameter '' cannot be the name of an argument"),
        ({"parameters": {"x": float("nan")}}, "cannot be written as Python values"),
        ({"parameters": {"x": [float("inf")]}}, "cannot be written as Python values"),
        ({"observation": "\ud83d"}, "message 2: 'observation' has half of a surrogate pair"),
        ({"content": "x"}, "message 2: 'content' has no effect with role 'tool'"),
        ({"parameter": {}}, None),
    ]
)  # fmt: skip
def test_faults_of_tool_messages(change, message):
    record = conversation(USER, {**TOOL, **change})
    if message is None:  # a key of the user's own, beside the known one
        assert parse_tool_conversation(record, "f:1")
        return
    with pytest.raises(DataError, match=message):
        parse_tool_conversation(record, "f:1")


def test_keys_of_the_wrong_role():
    for key in ("name", "parameters", "observation"):
        with pytest.raises(DataError, match=f"message 1: no key '{key}'|did you mean"):
            parse_tool_conversation(conversation({k: v for k, v in TOOL.items() if k != key}), "f:1")
        with pytest.raises(DataError, match=f"message 1: '{key}' has no effect with role 'user'"):
            parse_tool_conversation(conversation({**USER, key: "x"}, ANSWER), "f:1")
    systems = [{"role": "system", "content": "a"}] * 2
    with pytest.raises(DataError, match="2 system messages"):
        parse_tool_conversation(conversation(*systems, USER, ANSWER, tools=[{}]), "f:1")


def test_every_call_that_is_taken_can_be_read_back():
    for parameters in (
        {},
        {"a": 1, "b": -1.5e300, "c": None, "d": True, "e": [1, [2, {"k": "v"}]], "f": {}},
        {"城市": 'it\'s "北京"\n\\', "_x1": "\u200b\x00😀"},
        {"n": 10**40},
    ):
        assert tool_call_problem(parameters) is None
        assert parse_tool_call(format_tool_call(parameters)) == parameters


def test_rows_and_counts(records_file, glm3):
    long = conversation({"role": "user", "content": "颜色" * 200}, ANSWER)
    quiet = conversation(USER, {**ANSWER, "loss": False})
    path = records_file([conversation(USER, ANSWER), long, quiet])
    dataset = TrainDataset(path, tool_encoder(glm3, 64))
    assert (len(dataset), dataset.skipped, dataset.without_labels) == (1, 0, 2)
    assert dataset.seq_length == 64
    assert "1 records used, 2 skipped with nothing to learn within max_seq_length tokens" in dataset.describe()
    path = records_file([conversation(USER, ANSWER), long], "two.json")
    dataset = TrainDataset(path, conversation_encoder(glm3, 31, 32))
    assert (len(dataset), dataset.without_labels, dataset.seq_length) == (1, 1, 64)
    assert "1 skipped with no answer within max_source_length + max_target_length" in dataset.describe()
    with pytest.raises(DataError, match="0 records used, 1 skipped with no answer"):
        TrainDataset(records_file([long], "long.json"), conversation_encoder(glm3, 31, 32))
    with pytest.raises(DataError, match="has no records"):
        TrainDataset(records_file("\n", "empty.json"), conversation_encoder(glm3, 31, 32))


def test_place_of_a_fault(records_file, glm3):
    path = records_file([conversation(USER, ANSWER), conversation(USER)])
    for kind in (TrainDataset, EvalDataset):
        for encoder in (conversation_encoder(glm3, 31, 32), tool_encoder(glm3, 64)):
            with pytest.raises(DataError) as caught:
                kind(path, encoder)
            assert str(caught.value).startswith(f"{path}:2: no message of the assistant")


def test_answers_left_out_are_counted(records_file, glm3):
    """An answer is left out where what stands before it leaves no room; the ones before it are used."""
    question = {"role": "user", "content": "颜色" * 20}
    path = records_file(
        [
            conversation(USER, ANSWER, question, ANSWER, USER, ANSWER),
            conversation(USER, {"role": "assistant", "content": " "}),
        ]
    )
    dataset = EvalDataset(path, conversation_encoder(glm3, 31, 32))
    assert (len(dataset), dataset.too_long, dataset.blank, dataset.skipped) == (1, 2, 1, 0)
    assert "1 records used, 1 skipped with an empty" in dataset.describe()
    roomy = EvalDataset(path, conversation_encoder(glm3, 500, 32))
    assert (len(roomy), roomy.too_long) == (3, 0)
    assert "3 answers of 1 records used" in roomy.describe()
    sizes = [len(item["input_ids"]) for item in roomy]
    assert sizes == sorted(sizes)
    # The network has room for the prompt and for what is to be generated.
    tools = EvalDataset(path, tool_encoder(glm3, 500, sizes[1]))
    assert (len(tools), tools.too_long) == (2, 1)
    assert len(tools[1]["input_ids"]) == sizes[1]
    assert len(EvalDataset(path, conversation_encoder(glm3, 500, 32), num_samples=1)) == 3


def test_answers_without_loss_are_not_asked_for(records_file, glm3):
    quiet = {**ANSWER, "content": "b", "loss": False}
    dataset = EvalDataset(records_file([conversation(USER, quiet, USER, ANSWER)]), tool_encoder(glm3, 100))
    assert [item["reference"] for item in dataset] == ["a"]
    assert "b" in dataset[0]["prompt"]


def test_lengths(glm3):
    record = parse_tool_conversation(conversation(USER, ANSWER), "f:1")
    ids, labels = tool_encoder(glm3, 500).train_ids(record)
    answer = sum(label != -100 for label in labels)
    whole = tool_encoder(glm3, 500).lengths(record)
    assert whole == Lengths(len(ids) - answer, answer, len(ids) - answer, answer)
    cut = tool_encoder(glm3, len(ids) - 2).lengths(record)
    assert cut == Lengths(len(ids) - answer, answer, len(ids) - answer, answer - 2)


def test_settings_that_cannot_be_used(glm2, glm3):
    for build in (lambda: conversation_encoder(glm2, 31, 32), lambda: tool_encoder(glm2, 64)):
        with pytest.raises(DataError, match="ChatGLM2Tokenizer has no roles"):
            build()
    with pytest.raises(DataError, match="max_seq_length = 3: must be an integer of at least 4"):
        tool_encoder(glm3, 3)
    with pytest.raises(DataError, match="max_source_length = 2"):
        conversation_encoder(glm3, 2, 32)
    with pytest.raises(DataError, match="max_target_length = 0"):
        conversation_encoder(glm3, 31, 0)
