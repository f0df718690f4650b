"""/v1/completions, /tokenize and the demo interface, over a decoder without a network."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from serve.fakes import FakeDecoder, scripted
from serve.service import PADDING, client_of, running_engine

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def client(tokenizer):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        yield client


def complete(client, **body):
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client, **body):
    """The events of a stream, without the last one, which is [DONE]."""
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def continued(tokenizer, text, answer, prompt=PROMPT):
    """A client of a server whose network continues `prompt` with `answer`, a list of texts and ids."""
    ids = tokenizer.encode(prompt)
    tokens = [token for part in answer for token in ([part] if isinstance(part, int) else part)]
    return FakeDecoder(
        tokenizer.vocab_size + PADDING, capacity=128, scores=scripted(tokenizer.vocab_size + PADDING, ids, tokens)
    )


def pieces(tokenizer, text):
    """Ids of a text in the middle of another one, with the space before it if it has one."""
    return tokenizer.encode(text.removeprefix(" "), add_special_tokens=False)


def test_an_answer_in_the_form_of_openai(client, tokenizer):
    found = complete(client, max_tokens=5, temperature=0)
    assert found["id"].startswith("cmpl-")
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] in ("stop", "length")
    prompt = len(tokenizer.encode(PROMPT))
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
        "prompt_tokens_details": {"cached_tokens": found["usage"]["prompt_tokens_details"]["cached_tokens"]},
    }


def test_a_stream_has_the_text_of_the_whole_answer(client):
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 3}
    whole = complete(client, **options)
    events = stream(client, **options, stream_options={"include_usage": True})
    *parts, last = events
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in parts if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in parts)
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in stream(client, max_tokens=2))


def test_seeds_repeat_and_answers_differ(client):
    first, second, other = (complete(client, max_tokens=8, n=2, seed=seed, temperature=2) for seed in (1, 1, 2))
    assert first["choices"] == second["choices"] != other["choices"]
    assert first["choices"][0]["text"] != first["choices"][1]["text"]


def test_several_greedy_answers_are_equal(client):
    one = complete(client, max_tokens=6, temperature=0)["choices"][0]
    two = complete(client, max_tokens=6, temperature=0, n=2)["choices"]
    assert [choice["text"] for choice in two] == [one["text"]] * 2


def test_ids_and_texts_give_the_same(client, tokenizer):
    options = {"max_tokens": 6, "temperature": 0}
    ids = tokenizer.encode(PROMPT)
    expected = complete(client, **options)["choices"][0]["text"]
    assert complete(client, prompt=ids, **options)["choices"][0]["text"] == expected
    several = complete(client, prompt=[ids, tokenizer.encode("hello there")], n=2, **options)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in several["choices"][:2]] == [expected] * 2
    texts = complete(client, prompt=[PROMPT, "hello there"], n=2, **options)
    assert [one["text"] for one in texts["choices"]] == [one["text"] for one in several["choices"]]


def test_special_tokens_in_text_stay_text_and_can_be_left_out(client, tokenizer):
    found = complete(client, prompt="<|user|>", max_tokens=1)
    assert found["usage"]["prompt_tokens"] == len(tokenizer.encode("<|user|>"))
    bare = complete(client, prompt="hello", add_special_tokens=False, max_tokens=1)
    assert bare["usage"]["prompt_tokens"] == len(tokenizer.encode("hello", add_special_tokens=False))


def test_logprobs_are_those_of_the_scores(tokenizer):
    vocab_size = tokenizer.vocab_size + PADDING
    decoder = FakeDecoder(vocab_size, capacity=128)
    ids = tokenizer.encode(PROMPT)
    with running_engine(tokenizer, decoder) as engine, client_of(engine) as client:
        options = {"temperature": 0, "max_tokens": 3, "logprobs": 2, "echo": True}
        (choice,) = complete(client, prompt=ids, **options)["choices"]
        found = choice["logprobs"]
        assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert {len(column) for column in found.values()} == {len(ids) + 3}
        tokens = [*ids]
        for place in range(1, len(ids) + 3):
            scores = decoder._scores(tokens[:place], None).astype(np.float64)
            logprobs = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
            if place >= len(ids):
                tokens.append(int(scores.argmax()))
            assert found["token_logprobs"][place] == pytest.approx(logprobs[tokens[place]], abs=1e-5)
            assert max(found["top_logprobs"][place].values()) == pytest.approx(logprobs.max(), abs=1e-5)
            assert found["tokens"][place] == engine.token_text(tokens[place])
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        # The form that lm-eval reads: all tokens of the prompt, and one that is not used.
        alone = complete(client, prompt=ids, **{**options, "max_tokens": 1})["choices"][0]["logprobs"]
        assert alone["token_logprobs"][:-1] == found["token_logprobs"][:-3]
        nothing = complete(client, prompt=ids, **{**options, "max_tokens": 0})
        assert nothing["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][: len(ids)]
        assert nothing["usage"]["completion_tokens"] == 0


def test_echo_begins_with_the_prompt(client):
    alone = complete(client, max_tokens=4, temperature=0)["choices"][0]["text"]
    assert complete(client, max_tokens=4, temperature=0, echo=True)["choices"][0]["text"] == PROMPT + alone
    texts = [event["choices"][0]["text"] for event in stream(client, max_tokens=4, temperature=0, echo=True)]
    assert "".join(texts) == PROMPT + alone
    assert texts[0].startswith(PROMPT)


def test_text_offsets_point_into_the_text(tokenizer):
    """Where a token is whole text, the text at its offset is that token."""
    answer = [*pieces(tokenizer, " lazy dog"), tokenizer.get_command("<|user|>")]
    with running_engine(tokenizer, continued(tokenizer, PROMPT, [answer])) as engine, client_of(engine) as client:
        (choice,) = complete(client, temperature=0, logprobs=0, echo=True)["choices"]
        assert choice["text"] == PROMPT + " lazy dog"
        assert choice["finish_reason"] == "stop"
        found = choice["logprobs"]
        rows = list(zip(found["tokens"], found["text_offset"]))
        shown = [(token, offset) for token, offset in rows if token in choice["text"]]
        assert len(shown) >= len(rows) - 2  # the first space, the stop token
        for token, offset in shown[1:]:
            assert choice["text"][offset : offset + len(token)] == token
        assert found["tokens"][: len(pieces(tokenizer, PROMPT))] == [
            engine.token_text(one) for one in tokenizer.encode(PROMPT)[2:]
        ]
        assert all(list(top) == [token] for token, top in zip(found["tokens"], found["top_logprobs"]))


def test_an_answer_keeps_the_space_before_it(tokenizer):
    answer = [*pieces(tokenizer, " jumps over"), tokenizer.eos_token_id]
    with running_engine(tokenizer, continued(tokenizer, PROMPT, [answer])) as engine, client_of(engine) as client:
        assert complete(client, temperature=0)["choices"][0]["text"] == " jumps over"
        events = stream(client, temperature=0)
        assert "".join(event["choices"][0]["text"] for event in events) == " jumps over"


def test_stop_texts_and_stop_ids(tokenizer):
    answer = [*pieces(tokenizer, " jumps over the dog"), tokenizer.eos_token_id]
    with running_engine(tokenizer, continued(tokenizer, PROMPT, [answer])) as engine, client_of(engine) as client:
        (choice,) = complete(client, temperature=0, max_tokens=50, stop=["nothing", " the"])["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" jumps over", "stop", " the")
        options = {"temperature": 0, "max_tokens": 50, "stop": " the", "include_stop_str_in_output": True}
        assert complete(client, **options)["choices"][0]["text"] == " jumps over the"
        (choice,) = complete(client, temperature=0, max_tokens=50, stop_token_ids=[answer[2]])["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", answer[2])
        unending = complete(client, temperature=0, max_tokens=len(answer) + 3, ignore_eos=True)
        assert unending["choices"][0]["finish_reason"] == "length"
        assert unending["usage"]["completion_tokens"] == len(answer) + 3


def test_emoji_are_whole_in_streams(tokenizer):
    answer = [*pieces(tokenizer, "好🌶️👩‍👧"), tokenizer.eos_token_id]
    with running_engine(tokenizer, continued(tokenizer, PROMPT, [answer])) as engine, client_of(engine) as client:
        texts = [event["choices"][0]["text"] for event in stream(client, temperature=0, max_tokens=60)]
        assert "".join(texts).strip() == "好🌶️👩‍👧"
        assert not any("\ufffd" in text for text in texts)
        found = complete(client, temperature=0, max_tokens=60, logprobs=0)["choices"][0]["logprobs"]
        assert any(token.startswith("bytes:\\x") for token in found["tokens"])


def test_bias_and_penalties_reach_the_sampler(client, tokenizer):
    token = pieces(tokenizer, "fox")[-1]
    found = complete(client, max_tokens=3, temperature=0, logit_bias={str(token): 100}, logprobs=0)
    assert len(set(found["choices"][0]["logprobs"]["tokens"])) == 1
    varied = complete(
        client, max_tokens=3, temperature=0, logit_bias={str(token): 100}, logprobs=0, repetition_penalty=50.0
    )
    assert len(set(varied["choices"][0]["logprobs"]["tokens"])) > 1
    assert all(math.isfinite(value) for value in varied["choices"][0]["logprobs"]["token_logprobs"])


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["object"] == "model"
    assert client.get("/v1/models/tiny").json() == model


def test_tokens_there_and_back(client, tokenizer):
    text = "hello there 🌶️ <|user|>"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    bare = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert bare == tokenizer.encode(text, add_special_tokens=False)
    assert client.post("/detokenize", json={"tokens": bare}).json() == {"prompt": text}
    wrong = client.post("/detokenize", json={"tokens": [tokenizer.vocab_size]})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "tokens"


def test_tokenizer_info(client, tokenizer):
    found = client.get("/tokenizer_info").json()
    assert found["eos_token"] == "</s>"
    assert found["stop_token_ids"] == tokenizer.stop_token_ids
    assert found["vocab_size"] == tokenizer.vocab_size


def test_metrics_count(tokenizer):
    with running_engine(tokenizer) as engine, client_of(engine) as client:
        complete(client, max_tokens=5, n=2)
        lines = client.get("/metrics").text.splitlines()
        numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        label = '{model_name="tiny"}'
        assert float(numbers[f"glm_ms:prompt_tokens_total{label}"]) == len(tokenizer.encode(PROMPT))
        assert 2 <= float(numbers[f"glm_ms:generation_tokens_total{label}"]) <= 10
        proposed, right = (
            float(numbers[f"glm_ms:spec_decode_num_{name}_tokens_total{label}"]) for name in ("draft", "accepted")
        )
        assert 0 <= right <= proposed
        assert float(numbers[f"glm_ms:num_requests_running{label}"]) == 0
        assert float(numbers[f"glm_ms:time_to_first_token_seconds_count{label}"]) == 1
        assert float(numbers[f"glm_ms:e2e_request_latency_seconds_count{label}"]) == 1
        ended = [float(value) for key, value in numbers.items() if key.startswith("glm_ms:request_success_total")]
        assert sum(ended) == 2


def test_the_demo_interface(client):
    first = client.post("/", json={"prompt": "你好", "history": [], "max_length": 24}).json()
    assert first["status"] == 200, first
    assert first["history"] == [["你好", first["response"]]]
    second = client.post("/", json={"prompt": "再见", "history": first["history"], "max_length": 128, "top_p": 0.5})
    assert second.status_code == 200, second.text
    assert second.json()["history"] == [*first["history"], ["再见", second.json()["response"]]]
    messages = [{"role": "system", "content": "短"}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}]  # fmt: skip
    third = client.post("/", json={"prompt": "你好", "history": messages, "max_length": 128, "temperature": 0})
    assert third.json()["history"][:3] == messages
    assert third.json()["history"][3:] == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": third.json()["response"]},
    ]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"history": "x"}, "history"),
        ({"history": [["a"]]}, "history[0]"),
        ({"history": [{"role": "boss", "content": "x"}]}, "history"),
        ({"history": [{"content": "x"}]}, "history"),
        ({"max_length": 5}, "max_length"),
        ({"promt": "x"}, "promt"),
    ],
)
def test_wrong_demo_requests(client, change, param):
    answer = client.post("/", json={"prompt": "你好", **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
