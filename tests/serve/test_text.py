"""Text of an answer: whole characters, stop strings wherever tokens begin and end."""

from __future__ import annotations

import random

import pytest

from glm_ms.serve.text import AnswerText

TEXTS = ["hello there 😀👋🏽 the dog", "白色的条纹清新自然。", " two  spaces\n\nand lines ", "", "aababaababc"]


def run(tokenizer, text: str, stop=(), include_stop=False) -> tuple[list[str], str | None]:
    answer = AnswerText(tokenizer, stop, include_stop)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [*(answer.push(token) for token in ids), answer.flush()], answer.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_lost_and_no_character_is_halved(tokenizer, text):
    parts, stopped = run(tokenizer, text, stop=("never",))
    assert "".join(parts) == text
    assert stopped is None
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["😀", "👋🏽", "re 😀", " the", "o there 😀👋🏽 t", "g"])
def test_stop_strings_over_any_tokens(tokenizer, stop, include):
    text = TEXTS[0]
    parts, stopped = run(tokenizer, text, stop=("no", stop), include_stop=include)
    before, found, _ = text.partition(stop)
    assert "".join(parts) == before + (found if include else "")
    assert stopped == stop


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (("abc", "babc"), ("babc", "aababaa")),  # both are complete at once: the one that began first
        (("babc", "abc"), ("babc", "aababaa")),
        (("abab", "ba"), ("ba", "aa")),  # the one that is complete first
        (("aababaababcd",), (None, "aababaababc")),  # never complete
    ],
)
def test_which_stop_string_counts(tokenizer, stops, want):
    parts, stopped = run(tokenizer, TEXTS[4], stop=stops)
    assert (stopped, "".join(parts)) == want


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer):
    answer = AnswerText(tokenizer, stop=("fox!",))
    ids = tokenizer.encode("the fox jumps", add_special_tokens=False)
    shown = ""
    for place, token in enumerate(ids):
        shown += answer.push(token)
        whole = tokenizer.decode(ids[: place + 1])
        assert whole.startswith(shown)
        assert whole[len(shown) :] in ("", "f", "fo", "fox")


def test_text_before_the_search_is_not_searched(tokenizer):
    answer = AnswerText(tokenizer, stop=("dog",))
    ids = tokenizer.encode("dog dog", add_special_tokens=False)
    first = len(tokenizer.encode("dog", add_special_tokens=False))
    text = "".join(answer.push(token, search=place >= first) for place, token in enumerate(ids))
    assert text + answer.flush() == "dog "
    assert answer.push(ids[0]) == answer.flush() == "", "nothing follows a stop string"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    answer = AnswerText(tokenizer)
    assert answer.push(tokenizer.vocab_size) == ""
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(answer.push(token) for token in ids) + answer.flush() == "hello"


def test_a_character_cut_at_the_end_is_shown_as_such(tokenizer):
    answer = AnswerText(tokenizer, stop=("x",))
    ids = tokenizer.encode("😀", add_special_tokens=False)[:-1]
    assert "".join(answer.push(token) for token in ids) == ""
    assert answer.flush() == tokenizer.decode(ids)


def test_any_text_with_any_stop_strings(tokenizer):
    """Against a search in the whole text, one character after the other."""
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(rng.choice("ab😀 色") for _ in range(rng.randrange(12)))
        stops = tuple("".join(rng.choice("ab😀 色") for _ in range(rng.randint(1, 3))) for _ in range(2))
        want, reason = text, None
        for end in range(1, len(text) + 1):
            found = [stop for stop in stops if text[:end].endswith(stop)]
            if found:
                reason = max(found, key=len)
                want = text[: end - len(reason)]
                break
        parts, stopped = run(tokenizer, text, stop=stops)
        assert ("".join(parts), stopped) == (want, reason), (text, stops)
