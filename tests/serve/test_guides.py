"""Grammars: whatever the scores are, what is generated follows them; wrong grammars are refused in a sentence."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="llguidance is missing: pip install glm_ms[serve]")

from glm_ms.serve.call_grammar import SchemaError, calls_grammar, not_enforced
from glm_ms.serve.guides import GuideError, Guides, choice, json_schema, lark, regex
from glm_ms.tokenizer import AnswerParser, ChatGLM3Tokenizer, ToolCall

PADDING = 8
OPENING = '" "? "\\n" " "?'
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
    "required": ["value", "next"],
}
SCHEMAS = {
    "none": {"type": "object"},
    "required and not": {
        "type": "object",
        "properties": {
            "city": {"enum": ["北京", "O'Hare", 'say "hi"\n']},
            "days": {"type": "integer"},
            "exact": {"type": ["boolean", "null"]},
        },
        "required": ["days"],
    },
    "lists": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"const": "x"}, "minItems": 2, "maxItems": 3},
            "empty": {"type": "array", "maxItems": 0},
            "pair": {"type": "object", "properties": {"a b": {"const": 1.5}}, "required": ["a b"]},
        },
        "required": ["tags", "empty", "pair"],
    },
    "recursive": {"type": "object", "properties": {"node": {"$ref": "#/$defs/node"}}, "$defs": {"node": NODE}},
    "any names": {"type": "object", "additionalProperties": {"const": 0}},
}


@pytest.fixture(scope="module")
def guides(tokenizer):
    return Guides(tokenizer, tokenizer.vocab_size + PADDING)


def generate(tokenizer, new_guide, seed, length=600):
    """Ids of an answer from random scores, which prefer the end slightly; and whether it ended."""
    generator, guide = np.random.default_rng(seed), new_guide()
    ids: list[int] = []
    while len(ids) < length and not guide.finished():
        allowed = guide.mask()
        assert allowed.shape == (tokenizer.vocab_size + PADDING,)
        assert allowed.dtype == bool
        assert allowed.any()
        assert not allowed[-PADDING:].any()
        scores = generator.standard_normal(len(allowed))
        scores[tokenizer.stop_token_ids] += 1
        # Closing characters end strings and lists soon.
        for text in "'\"]})":
            scores[tokenizer.convert_tokens_to_ids(text)] += 3
        token = int(np.where(allowed, scores, -np.inf).argmax())
        if token in tokenizer.stop_token_ids:
            return ids, True
        ids.append(token)
        guide.accept(token)
    return ids, guide.finished()


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


def test_json_of_a_schema(tokenizer, guides):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    new_guide = guides.compile(json_schema(schema), f"start: {OPENING} @body")
    answers = set()
    for seed in range(10):
        ids, ended = generate(tokenizer, new_guide, seed)
        assert ended
        text = text_of(tokenizer, ids)
        assert text.lstrip(" ").startswith("\n")
        value = json.loads(text)
        assert set(value) == {"name", "age"}
        assert isinstance(value["age"], int)
        assert value["age"] <= 99
        assert len(value["name"]) <= 5
        answers.add(text)
    assert len(answers) > 5


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        (regex(r"\d{3}-[a-c]{2,4}"), r"[0-9]{3}-[a-c]{2,4}"),
        (choice(["yes", 'no "no"', "也许"]), r'yes|no "no"|也许'),
        (lark('start: "a" b+\nb: "1" | "2"'), r"a[12]+"),
    ],
)
def test_other_grammars(tokenizer, guides, body, pattern):
    new_guide = guides.compile(body)
    for seed in range(5):
        ids, ended = generate(tokenizer, new_guide, seed)
        assert ended
        assert re.fullmatch(pattern, text_of(tokenizer, ids))


def test_the_end_is_allowed_only_where_the_text_is_complete(tokenizer, guides):
    guide = guides.compile(lark('start: "a" "b"?'))()
    assert not guide.mask()[tokenizer.stop_token_ids].any()
    guide.accept(tokenizer.convert_tokens_to_ids("a"))
    assert guide.mask()[tokenizer.stop_token_ids].all()
    assert not guide.finished()
    guide.accept(tokenizer.convert_tokens_to_ids("b"))
    assert guide.finished()
    assert set(np.flatnonzero(guide.mask())) == set(tokenizer.stop_token_ids)


def test_guides_of_one_grammar_are_independent(tokenizer, guides):
    new_guide = guides.compile(lark('start: "a" "b"'))
    first, second = new_guide(), new_guide()
    first.accept(tokenizer.convert_tokens_to_ids("a"))
    assert (second.mask() == new_guide().mask()).all()
    assert not (first.mask() == second.mask()).all()


def test_a_token_that_is_not_allowed_is_refused(tokenizer, guides):
    guide = guides.compile(lark('start: "a"'))()
    with pytest.raises(GuideError):
        guide.accept(tokenizer.convert_tokens_to_ids("b"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lark("start: missing"), "missing"),
        (lark("nonsense ::= 1"), ""),
        (regex("("), "regex"),
        (regex("(?=a)b"), "regex"),
        (json_schema({"type": "objekt"}), "objekt"),
        (json_schema({"type": "object", "not": {}}), "not"),
    ],
)
def test_wrong_grammars_are_refused_in_a_line(guides, body, words):
    with pytest.raises(GuideError) as error:
        guides.compile(body)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_schema_must_be_an_object():
    with pytest.raises(GuideError, match="must be an object"):
        json_schema([1])


@pytest.mark.parametrize("name", SCHEMAS)
def test_calls_can_be_read_and_follow_the_schema(tokenizer, guides, name):
    schema = SCHEMAS[name]
    grammar = calls_grammar([("one", schema), ("other-tool", SCHEMAS["none"])], True, "<|assistant|>")
    new_guide = guides.compile(None, grammar)
    seen = set()
    for seed in range(12):
        ids, ended = generate(tokenizer, new_guide, seed, length=1500)
        if not ended:  # a list of any length, or a recursion
            continue
        parser = AnswerParser(["one", "other-tool"], "<|assistant|>")
        parts = [*parser.push(text_of(tokenizer, ids)), *parser.close()]
        assert parts
        assert all(isinstance(part, ToolCall) for part in parts), parts
        for part in parts:
            seen.add(part.name)
            if part.name == "one":
                check(json.loads(part.arguments), schema, schema)
    assert seen == {"one", "other-tool"}


def check(value, schema, root):
    """Asserts that a value is what a schema of SCHEMAS describes."""
    if "$ref" in schema:
        schema = root["$defs"]["node"]
    if "anyOf" in schema:
        schema = schema["anyOf"][value is not None]
        return check(value, schema, root)
    if "const" in schema:
        assert value == schema["const"]
    elif "enum" in schema:
        assert value in schema["enum"]
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        assert set(schema.get("required", ())) <= set(value)
        for key, item in value.items():
            check(item, properties[key] if key in properties else schema["additionalProperties"], root)
    elif isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        for item in value:
            check(item, schema["items"], root)
    else:
        kinds = {"integer": int, "boolean": bool, "null": type(None)}
        given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert type(value) in [kinds[kind] for kind in given]
    return None


WEATHER = {"type": "object", "properties": {"location": {"type": "string"}, "days": {"type": "integer"}}}
CODE = "```python\ntool_call(location='北京', days=3)\n```"


def assert_follows(tokenizer, new_guide, ids):
    guide = new_guide()
    for token in ids:
        assert guide.mask()[token], tokenizer.convert_ids_to_tokens(token)
        guide.accept(token)
    assert guide.mask()[tokenizer.stop_token_ids].all()


def assert_accepts_messages_of_the_template(tokenizer):
    """Grammars allow the very ids of the records that the model learns from."""
    own = Guides(tokenizer, tokenizer.vocab_size)
    call = tokenizer.build_single_message("assistant", "get_weather", CODE)
    calls = own.compile(None, calls_grammar([("get_weather", WEATHER)], True, "<|assistant|>"))
    assert_follows(tokenizer, calls, call[1:])
    assert_follows(tokenizer, calls, [*call[1:], *call])
    text = tokenizer.build_single_message("assistant", "", '{"city": "北京", "days": [1, 2.5, null]}')
    body = own.compile(json_schema({"type": "object"}), f"start: {OPENING} @body")
    assert_follows(tokenizer, body, text[1:])


def test_messages_of_the_template_follow_the_grammars(tokenizer):
    assert_accepts_messages_of_the_template(tokenizer)


def test_messages_of_the_template_follow_the_grammars_with_the_released_vocabulary(vocab_file):
    assert_accepts_messages_of_the_template(ChatGLM3Tokenizer(vocab_file))


def test_one_call_without_parallel_calls(tokenizer, guides):
    new_guide = guides.compile(None, calls_grammar([("one", SCHEMAS["none"])], False, "<|assistant|>"))
    ids, ended = generate(tokenizer, new_guide, 0)
    assert ended
    assert text_of(tokenizer, ids).strip().startswith("one\n")
    assert tokenizer.get_command("<|assistant|>") not in ids


def test_a_text_or_calls(tokenizer, guides):
    grammar = calls_grammar([("one", SCHEMAS["none"])], True, "<|assistant|>", f"{OPENING} /[ab]{{1,9}}/")
    new_guide = guides.compile(None, grammar)
    kinds = set()
    for seed in range(12):
        ids, ended = generate(tokenizer, new_guide, seed)
        assert ended
        parser = AnswerParser(["one"], "<|assistant|>")
        parts = [*parser.push(text_of(tokenizer, ids)), *parser.close()]
        kinds.add(tuple(type(part).__name__ for part in parts)[:2])
    assert {kind[0] for kind in kinds} == {"Text", "ToolCall"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": 5}}, r"f\.properties\.a: must be a JSON schema"),
        ({"properties": {"a": {"type": "strin"}}}, r"f\.properties\.a\.type: must be one of"),
        ({"properties": {"a": {"type": {}}}}, "must be one of"),
        ({"properties": {"a": {}}, "required": ["b"]}, r"f\.required: must be a list of names in properties"),
        ({"properties": {"a": {}}, "required": "a"}, "must be a list of names"),
        ({"properties": {"a": {"enum": []}}}, "with a value"),
        ({"properties": {"a": {"anyOf": []}}}, "list of JSON schemas"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "must name an entry of"),
        ({"properties": {"a": {"$ref": 5}}}, "must name an entry of"),
        ({"properties": {"a": {"type": "array", "minItems": -1}}}, "must be a number"),
        ({"properties": {"a": {"type": "array", "minItems": 3, "maxItems": 2}}}, "is below minItems"),
        ({"anyOf": [{}]}, "list the properties"),
    ],
)
def test_schemas_that_cannot_become_a_grammar(schema, words):
    with pytest.raises(SchemaError, match=words):
        calls_grammar([("f", schema)], True, "<|assistant|>")


def test_keywords_that_a_grammar_does_not_enforce():
    assert not_enforced(SCHEMAS["lists"]) is None
    assert not_enforced(SCHEMAS["recursive"]) is None
    assert not_enforced({"properties": {"a": {"type": "string", "pattern": "x"}}}) == "properties.a.pattern"
    assert not_enforced({"properties": {"a": {"anyOf": [{}, {"items": {"minimum": 1}}]}}}) == (
        "properties.a.anyOf[1].items.minimum"
    )


def test_values_are_python():
    grammar = calls_grammar([("f", {"properties": {"a": {"const": {"b": [True, None, "'"]}}}})], True, "x")
    line = next(line for line in grammar.splitlines() if "a=" in line)
    literal = json.loads(line[line.index('"{') : line.rindex('}"') + 2])
    assert ast.literal_eval(literal) == {"b": [True, None, "'"]}
