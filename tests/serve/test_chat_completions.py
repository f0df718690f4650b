"""/v1/chat/completions: prompts, texts, streams, tools, grammars, errors."""

from __future__ import annotations

import json

import pytest
from serve.chat_helpers import CLOCK, WEATHER, called, chat_client, events_of

from glm_ms.serve.guides import GuideError, Guides
from glm_ms.tokenizer import ChatGLM2Tokenizer

URL = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}]}
ASK_TOOL = {**HELLO, "tools": [WEATHER, CLOCK]}


def post(client, body, status=200, **more):
    response = client.post(URL, json={**body, **more})
    assert response.status_code == status, response.text
    return response.json()


def chunks_of(client, body, **more):
    """Chunks of a stream without its last event, which is [DONE]."""
    events = events_of(client.post(URL, json={**body, **more, "stream": True}))
    assert [name for name, _ in events] == [None] * len(events)
    assert events[-1][1] == "[DONE]"
    return [value for _, value in events[:-1]]


def assembled(chunks):
    """Message and reason of each choice of a stream; the role comes first, and the reason once."""
    choices = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            index, delta = part["index"], part["delta"]
            if index not in choices:
                assert delta == {"role": "assistant", "content": ""}
                choices[index] = {"content": "", "tool_calls": [], "finish_reason": None}
                continue
            one = choices[index]
            assert one["finish_reason"] is None, "news after the end"
            assert "role" not in delta
            one["content"] += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                assert call.pop("index") == len(one["tool_calls"])
                one["tool_calls"].append(call)
            one["finish_reason"] = part["finish_reason"]
    assert all(one["finish_reason"] for one in choices.values())
    return choices


def test_an_answer(chat, tokenizer):
    client, speaker = chat
    count = len(speaker.say("\n the quick fox 🦊"))
    found = post(client, HELLO, temperature=0)
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "the quick fox 🦊", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    prompt = tokenizer.build_chat_input("hello there")["input_ids"]
    assert speaker.prompts[-1] == prompt
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == count
    assert usage["total_tokens"] == len(prompt) + count
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_a_stream_says_the_same(chat):
    client, speaker = chat
    speaker.say("\n the quick fox 🦊 jumps")
    chunks = chunks_of(client, HELLO, temperature=0, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert assembled(chunks)[0] == {
        "content": "the quick fox 🦊 jumps",
        "tool_calls": [],
        "finish_reason": "stop",
    }
    assert len(chunks) > 5, "the text comes in pieces"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(speaker.answer)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_stream_without_usage_has_none(chat):
    client, speaker = chat
    speaker.say("\n hello")
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks_of(client, HELLO))


def test_several_choices(chat):
    client, speaker = chat
    speaker.say("\n hello")
    found = post(client, HELLO, n=3, temperature=0.5)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in found["choices"]} == {"hello"}
    streamed = assembled(chunks_of(client, HELLO, n=3))
    assert sorted(streamed) == [0, 1, 2]


def test_the_limit_of_tokens(chat):
    client, speaker = chat
    speaker.say("\n the quick brown fox jumps over the lazy dog")
    (choice,) = post(client, HELLO, max_tokens=5)["choices"]
    assert choice["finish_reason"] == "length"
    (other,) = post(client, HELLO, max_completion_tokens=5)["choices"]
    assert choice["message"] == other["message"]
    assert post(client, HELLO, max_tokens=None)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_not_what_precedes_it(chat, stream):
    client, speaker = chat
    speaker.say("\n the quick\nbrown fox")
    options = {"stop": ["\n", "fox"], "temperature": 0}
    if stream:
        chunks = chunks_of(client, HELLO, **options)
        assert assembled(chunks)[0]["content"] == "the quick"
        assert chunks[-1]["choices"][0]["stop_reason"] == "\n"
        return
    (choice,) = post(client, HELLO, **options)["choices"]
    assert choice["message"]["content"] == "the quick"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "\n"
    (choice,) = post(client, HELLO, **options, include_stop_str_in_output=True)["choices"]
    assert choice["message"]["content"] == "the quick\n"


def test_a_stop_string_of_one_choice_does_not_end_the_others(chat):
    client, speaker = chat
    speaker.say("\n the quick brown fox")
    found = post(client, HELLO, stop="brown", n=2)
    assert [choice["message"]["content"] for choice in found["choices"]] == ["the quick "] * 2
    assert found["usage"]["completion_tokens"] < 2 * len(speaker.answer)


def test_the_scheduler_ends_a_choice_at_its_stop_string(chat):
    client, speaker = chat
    speaker.say("\n the quick brown fox")
    finished = client.app.state.engine.scheduler.stats.finished
    post(client, HELLO, stop="brown", n=2)
    now = client.app.state.engine.scheduler.stats.finished
    assert now["stop"] == finished.get("stop", 0) + 2
    assert now.get("cancelled", 0) == finished.get("cancelled", 0)


def test_stop_tokens_of_the_request(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n hello there")
    token = speaker.answer[-3]
    (choice,) = post(client, HELLO, stop_token_ids=[token])["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == token


def test_log_probabilities(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n hello 🦊")
    options = {"logprobs": True, "top_logprobs": 2, "temperature": 0}
    content = post(client, HELLO, **options)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode().strip() == "hello 🦊"
    for one in content:
        assert one["logprob"] == pytest.approx(0, abs=1e-3)
        assert len(one["top_logprobs"]) == 2
        assert one["top_logprobs"][0]["token"] == one["token"]
        assert one["top_logprobs"][0]["logprob"] > one["top_logprobs"][1]["logprob"]
    streamed = []
    for chunk in chunks_of(client, HELLO, **options):
        for choice in chunk["choices"]:
            streamed += (choice["logprobs"] or {"content": []})["content"]
    assert streamed == content
    bare = post(client, HELLO, logprobs=True, temperature=0)["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in bare] == [[]] * len(content)


def test_conversations_use_the_template(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n hello")
    messages = [
        {"role": "developer", "content": "be short", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "hi", "refusal": None, "annotations": []},
        {"role": "user", "content": "<|assistant|> the quick fox"},
    ]
    post(client, {"messages": messages})
    history = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hello\nthere"},
        {"role": "assistant", "content": "hi"},
    ]
    expected = tokenizer.build_chat_input("<|assistant|> the quick fox", history)["input_ids"]
    assert speaker.prompts[-1] == expected
    assert expected.count(tokenizer.get_command("<|assistant|>")) == 2, "text does not become a special token"


def test_chatglm2(tokenizer):
    old = ChatGLM2Tokenizer(tokenizer.vocab_file)
    with chat_client(old) as (client, speaker):
        speaker.say("hello there")
        rounds = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        last = {"role": "user", "content": "the fox"}
        found = post(client, {"messages": [{"role": "system", "content": "be short. "}, *rounds, last]})
        assert found["choices"][0]["message"]["content"] == "hello there"
        assert speaker.prompts[-1] == old.build_chat_input("be short. the fox", rounds)["input_ids"]
        for messages in (rounds, [last, last], [*rounds, {"role": "tool", "tool_call_id": "a", "content": "b"}]):
            post(client, {"messages": messages}, status=400)
        error = post(client, ASK_TOOL, status=400)["error"]
        assert "tools" in error["message"]
        found = post(client, HELLO, response_format={"type": "json_object"}, logit_bias={"5": -100}, max_tokens=40)
        assert found["choices"][0]["message"]["content"].startswith("{")


class TestTools:
    def test_a_call(self, chat, tokenizer):
        client, speaker = chat
        speaker.say(called("get_weather", "city='北京', days=3"), end="<|observation|>")
        (choice,) = post(client, ASK_TOOL, temperature=0)["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] is None
        (call,) = message["tool_calls"]
        assert call["type"] == "function"
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "北京", "days": 3}
        history = [
            {
                "role": "system",
                "content": "Answer the following questions as best as you can. You have access to the following tools:",
                "tools": [WEATHER["function"], {"name": "clock", "parameters": {"type": "object", "properties": {}}}],
            }
        ]
        assert speaker.prompts[-1] == tokenizer.build_chat_input("hello there", history)["input_ids"]

    def test_text_and_calls_are_streamed(self, chat):
        client, speaker = chat
        speaker.say("\n the quick fox", called("get_weather", "city='x'"), called("clock", ""), end="<|observation|>")
        one = assembled(chunks_of(client, ASK_TOOL, temperature=0))[0]
        assert one["content"] == "the quick fox"
        assert one["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in one["tool_calls"]] == ["get_weather", "clock"]
        assert [json.loads(call["function"]["arguments"]) for call in one["tool_calls"]] == [{"city": "x"}, {}]
        assert len({call["id"] for call in one["tool_calls"]}) == 2
        whole = post(client, ASK_TOOL, temperature=0)["choices"][0]["message"]
        assert whole["content"] == "the quick fox"
        assert [call["function"] for call in whole["tool_calls"]] == [call["function"] for call in one["tool_calls"]]

    def test_one_call_without_parallel_calls(self, chat):
        client, speaker = chat
        speaker.say(called("clock", ""), called("clock", ""), end="<|observation|>")
        message = post(client, ASK_TOOL, parallel_tool_calls=False, temperature=0)["choices"][0]["message"]
        assert len(message["tool_calls"]) == 1

    def test_a_call_that_cannot_be_read_is_text(self, chat):
        client, speaker = chat
        text = called("clock", "__import__('os')")
        speaker.say(text, end="<|observation|>")
        (choice,) = post(client, ASK_TOOL, temperature=0)["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text
        assert "tool_calls" not in choice["message"]

    def test_a_round_with_results_gives_the_prompt_of_the_template(self, chat, tokenizer):
        client, speaker = chat
        speaker.say("\n hello", called("get_weather", "city='北京'"), called("clock", ""), end="<|observation|>")
        first = post(client, ASK_TOOL, temperature=0)["choices"][0]["message"]
        weather, clock = (call["id"] for call in first["tool_calls"])
        results = [
            {"role": "tool", "tool_call_id": clock, "content": "12:00"},
            {"role": "tool", "tool_call_id": weather, "content": [{"type": "text", "text": "22"}]},
        ]
        speaker.say("\n it is 12:00")
        messages = [*HELLO["messages"], first, *results]
        post(client, ASK_TOOL, messages=messages)
        prompt = speaker.prompts[-1]
        # The answer, as the model wrote it, and the results follow the first prompt.
        before = speaker.prompts[-2]
        assert prompt[: len(before)] == before
        said = "<|assistant|>".join(
            (
                " \n hello",
                " get_weather\n ```python\ntool_call(city='北京')\n```",
                " clock\n ```python\ntool_call()\n```",
            )
        )
        rest = "<|observation|> \n 12:00<|observation|> \n 22<|assistant|>"
        assert tokenizer.decode(prompt) == tokenizer.decode(before) + said + rest

    def test_names_that_python_does_not_have(self, chat):
        client, speaker = chat
        properties = {"from": {"type": "string"}, "user-id": {"type": "integer"}, "user_id": {"type": "integer"}}
        tool = {
            "type": "function",
            "function": {
                "name": "trains",
                "parameters": {"type": "object", "properties": properties, "required": ["from"]},
            },
        }
        speaker.say(called("trains", "from_='a', user_id_=1, user_id=2"), end="<|observation|>")
        request = {**HELLO, "tools": [tool], "temperature": 0}
        message = post(client, request)["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"from": "a", "user-id": 1, "user_id": 2}
        assert '"from_"' in speaker.prompt
        assert '"from"' not in speaker.prompt
        result = {"role": "tool", "tool_call_id": call["id"], "content": "none"}
        post(client, request, messages=[*HELLO["messages"], message, result])
        assert "tool_call(from_='a', user_id_=1, user_id=2)" in speaker.prompt

    @pytest.mark.parametrize(
        ("choice", "names"),
        [("required", {"clock", "calendar"}), ({"type": "function", "function": {"name": "calendar"}}, {"calendar"})],
    )
    def test_a_required_call_whatever_the_model_would_say(self, chat, choice, names):
        client, speaker = chat
        speaker.say("\n no")
        tools = [CLOCK, {"type": "function", "function": {"name": "calendar"}}]
        found = post(client, HELLO, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        (choice,) = found["choices"]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] in names
        assert call["function"]["arguments"] == "{}"

    def test_none_hides_the_tools(self, chat):
        client, speaker = chat
        speaker.say(called("clock", ""))
        (choice,) = post(client, ASK_TOOL, tool_choice="none", temperature=0)["choices"]
        assert choice["message"]["content"].startswith("clock")
        assert "get_weather" not in speaker.prompt

    def test_null_is_the_default(self, chat):
        client, speaker = chat
        speaker.say(called("clock", ""))
        (choice,) = post(client, ASK_TOOL, tool_choice=None, parallel_tool_calls=None, temperature=0)["choices"]
        assert choice["finish_reason"] == "tool_calls"

    def test_strict_arguments(self, chat):
        client, speaker = chat
        strict = json.loads(json.dumps(WEATHER))
        strict["function"].update(strict=True)
        strict["function"]["parameters"]["properties"]["city"] = {"enum": ["a", "b"]}
        speaker.say(called("get_weather", "city='c'"), end="<|observation|>")
        (choice,) = post(client, HELLO, tools=[strict], temperature=0)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("a", "b")
        speaker.say("\n the fox")
        assert post(client, HELLO, tools=[strict], temperature=0)["choices"][0]["message"]["content"] == "the fox"


class TestFormats:
    def test_json_object(self, chat):
        client, speaker = chat
        speaker.say('\n {"a": [1, {"b": "fox"}]}')
        message = post(client, HELLO, response_format={"type": "json_object"}, temperature=0)["choices"][0]["message"]
        assert json.loads(message["content"]) == {"a": [1, {"b": "fox"}]}

    def test_json_schema(self, chat):
        client, speaker = chat
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [7, 8]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
        for text in ("\n hello", '\n {"n": 9}'):
            speaker.say(text)
            (choice,) = post(client, HELLO, response_format=wanted, temperature=0)["choices"]
            assert json.loads(choice["message"]["content"])["n"] in (7, 8)
            assert choice["finish_reason"] == "stop"

    def test_text_beside_tools(self, chat):
        client, speaker = chat
        speaker.say('\n {"a": 1}')
        body = {**ASK_TOOL, "response_format": {"type": "json_object"}, "temperature": 0}
        assert post(client, body)["choices"][0]["message"]["content"] == '{"a": 1}'
        speaker.say(called("clock", ""), end="<|observation|>")
        assert post(client, body)["choices"][0]["finish_reason"] == "tool_calls"

    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            ({"regex": r"\d{3}"}, str.isdecimal),
            ({"choice": ["yes", "no"]}, ("yes", "no").__contains__),
            ({"grammar": 'start: "x" "y"'}, "xy".__eq__),
            ({"json": {"const": 5}}, "5".__eq__),
            ({"json": '{"const": 5}'}, "5".__eq__),
        ],
    )
    def test_structured_outputs(self, chat, wanted, found):
        client, speaker = chat
        speaker.say("\n maybe")
        (choice,) = post(client, HELLO, structured_outputs=wanted)["choices"]
        assert found(choice["message"]["content"]), choice


def test_a_grammar_that_fails_on_the_way_is_an_error_of_the_request(chat, monkeypatch):
    client, speaker = chat
    speaker.say("\n hello")

    class Exhausted:
        def mask(self):
            raise GuideError("too many states")

        accept = finished = mask

    monkeypatch.setattr(Guides, "compile", lambda *_: Exhausted)
    error = post(client, HELLO, status=400, response_format={"type": "json_object"})["error"]
    assert (error["param"], error["message"]) == ("response_format", "response_format: too many states")
    body = {**HELLO, "response_format": {"type": "json_object"}, "stream": True}
    events = events_of(client.post(URL, json=body))
    assert events[0][1]["error"]["param"] == "response_format"
    assert not speaker.running, "a slot is lost"


USER = {"role": "user", "content": "hello"}
CALL = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "b"}


def call_with(**function):
    return [USER, {**ASSISTANT, "tool_calls": [{**CALL, "function": {**CALL["function"], **function}}]}, RESULT]


REQUIRED = "tools[0].function.parameters.required"


def tool_with(**function):
    return [{"type": "function", "function": {**CLOCK["function"], **function}}]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": None}, "messages", ""),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": ["a"]}, "messages[0]", "JSON object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "function", "name": "f", "content": "a"}]}, "messages[0].role", "role tool"),
        ({"messages": [{**USER, "audio": {"id": "a"}}]}, "messages[0].audio", "not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "reads text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text", ""),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0].type", ""),
        ({"messages": call_with(arguments="{")}, "messages[1].tool_calls[0].function.arguments", ""),
        ({"messages": call_with(arguments="[]")}, "messages[1].tool_calls[0].function.arguments", "JSON object"),
        ({"messages": call_with(arguments={"a": 1})}, "messages[1].tool_calls[0].function.arguments", "a text"),
        ({"messages": call_with(name="a\nb")}, "messages[1].tool_calls[0].function.name", ""),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": "x"}]}, "messages[1].tool_calls", "list of calls"),
        ({"messages": [USER, ASSISTANT]}, "messages[1]", "missing"),
        ({"messages": [USER, ASSISTANT, USER]}, "messages[1]", "missing"),
        ({"messages": [USER, RESULT]}, "messages[1].tool_call_id", "no call"),
        ({"messages": [USER, ASSISTANT, RESULT, RESULT]}, "messages[3].tool_call_id", "no call"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "function"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "two tools"),
        ({"tools": tool_with(name="")}, "tools[0].function.name", ""),
        ({"tools": tool_with(name="x" * 65)}, "tools[0].function.name", ""),
        ({"tools": tool_with(parameters=[])}, "tools[0].function.parameters", "JSON schema"),
        ({"tools": tool_with(parameters={"type": "array"})}, "tools[0].function.parameters", "JSON schema"),
        ({"tools": tool_with(parameters={"properties": []})}, "tools[0].function.parameters.properties", "object"),
        (
            {"tools": tool_with(strict=True, parameters={"properties": {"a": {"type": "string", "pattern": "b"}}})},
            "tools[0].function.strict",
            "properties.a.pattern",
        ),
        ({"tools": tool_with(parameters={"properties": {"a": 5}}), "tool_choice": "required"}, "tools", "JSON schema"),
        ({"tools": tool_with(parameters={"properties": {"from": {}}, "required": 5})}, REQUIRED, "list of names"),
        ({"tools": tool_with(parameters={"properties": {"a": {}}, "required": "a"})}, REQUIRED, "list of names"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "alwys", "tools": [CLOCK]}, "tool_choice", "must be none, auto, required"),
        ({"tool_choice": {"type": "function"}, "tools": [CLOCK]}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [CLOCK]}, "tool_choice", "clock"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format", ""),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ""),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differs"),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens", "at most 4096"),
        ({"model": "gpt"}, "model", "does not exist"),
        ({"mesages": []}, "mesages", "did you mean messages"),
        ({"modalities": ["audio"]}, "modalities[0]", ""),
    ],
)
def test_wrong_requests_name_the_field(chat, change, param, words):
    client, speaker = chat
    speaker.say("\n hello")
    error = post(client, HELLO, status=404 if "model" in change else 400, **change)["error"]
    assert error["param"] == param, error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in error["message"]
