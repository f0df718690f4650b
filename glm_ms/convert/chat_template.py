"""The prompt templates of ChatGLM2 and ChatGLM3 as Jinja templates of transformers, with the ids of `build_chat_input`.

Text of messages never becomes a special token: what spells one is written with `GUARD` in it, which the normalizer of
the exported tokenizer removes again.
"""

from __future__ import annotations

import json

from glm_ms.convert.fast_tokenizer import GUARD, special_spellings, spelling
from glm_ms.data.records import TOOLS_INTRODUCTION
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer, SentencePieceTokenizer
from glm_ms.tokenizer.base import PLAIN

# A string of the template may contain a `"` or a line break only as JSON writes it, which Jinja reads too.
_ROUNDS = """\
{{- OPENING -}}
{%- for message in messages -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('ChatGLM2 needs messages of user and assistant in turn, beginning with the user') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- ('' if loop.first else SEPARATOR) ~ '[Round ' ~ (loop.index0 // 2 + 1) ~ QUESTION -}}
        {{- plain(message.content) ~ ANSWER -}}
    {%- else -%}
        {{- plain(message.content) -}}
    {%- endif -%}
{%- endfor -%}
"""
_MESSAGES = """\
{%- macro said(role, metadata, content) -%}
    {%- set before = BEFORE_TEXT if content | replace(GUARD, '') else '' -%}
    {{- '<|' ~ role ~ '|>' ~ plain(metadata) ~ LINE_BREAK ~ before ~ plain(content) -}}
{%- endmacro -%}
{%- macro called(call) -%}
    {%- if call.arguments is not mapping -%}
        {{- raise_exception('the arguments of a tool call must be an object, not a text') -}}
    {%- endif -%}
    {%- set values = namespace(text='') -%}
    {%- for name, value in call.arguments.items() -%}
        {%- set values.text = values.text ~ ('' if loop.first else ', ') ~ name ~ '=' ~ '%r' | format(value) -%}
    {%- endfor -%}
    {{- said('assistant', call.name, CODE ~ 'tool_call(' ~ values.text ~ ')' ~ END_OF_CODE) -}}
{%- endmacro -%}
{{- OPENING -}}
{%- if tools -%}
    {%- set functions = namespace(items=[]) -%}
    {%- for tool in tools -%}
        {%- set functions.items = functions.items + [tool.function if tool.function is mapping else tool] -%}
    {%- endfor -%}
    {{- said('system', '', INTRODUCTION ~ functions.items | tojson(indent=4)) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'observation' if message.role == 'tool' else message.role -%}
    {%- if role not in ['system', 'user', 'assistant', 'observation'] -%}
        {{- raise_exception('ChatGLM3 knows the roles system, user, assistant and observation, not ' ~ message.role) -}}
    {%- endif -%}
    {%- if role == 'system' and message.tools is defined and message.tools is not none -%}
        {{- said(role, message.metadata or '', message.content ~ LINE_BREAK ~ message.tools | tojson(indent=4)) -}}
    {%- elif message.content or not message.tool_calls -%}
        {{- said(role, message.metadata or '', message.content or '') -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {{- called(call.function if call.function is mapping else call) -}}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def chat_template(tokenizer: SentencePieceTokenizer) -> str:
    """The Jinja template of a tokenizer; empty if its template is plain text.

    It takes the messages of `build_chat_input`, for ChatGLM3 also `tools` and calls in the form of OpenAI: a call is
    the text that the model learnt for it, a message of the role `tool` an observation.

    Raises:
        CheckpointError: another class of tokenizers.
    """
    if tokenizer.template == PLAIN:
        return ""
    body = {ChatGLM2Tokenizer: _ROUNDS, ChatGLM3Tokenizer: _MESSAGES}.get(type(tokenizer))
    if body is None:
        raise CheckpointError(f"{type(tokenizer).__name__}: its prompt template is not known as one of transformers")
    constants = {
        "OPENING": "".join(map(spelling, ("[gMASK]", "sop"))),
        "SEPARATOR": "\n\n", "QUESTION": "]\n\n问：", "ANSWER": "\n\n答：",
        "LINE_BREAK": "\n", "BEFORE_TEXT": " " if tokenizer.adds_space else "", "INTRODUCTION": TOOLS_INTRODUCTION,
        "GUARD": GUARD, "CODE": "```python\n", "END_OF_CODE": "\n```",
    }  # fmt: skip
    used = {name: value for name, value in constants.items() if name in body}
    return (
        "".join(f"{{%- set {name} = {_quoted(value)} -%}}\n" for name, value in used.items()) + _plain(tokenizer) + body
    )


def _plain(tokenizer: SentencePieceTokenizer) -> str:
    """The macro that writes text in which nothing is a special token."""
    guarded = "".join(
        f" | replace({_quoted(text)}, {_quoted(text[0] + GUARD + text[1:])})" for text in special_spellings(tokenizer)
    )
    return f"{{%- macro plain(text) -%}}\n    {{{{- text{guarded} -}}}}\n{{%- endmacro -%}}\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
