"""Preparation of examples against the official scripts of both models, with the genuine vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import adgen_prompts, adgen_rows, conversation_encoder

from glm_ms.data.rows import left_padded_row, right_padded_row
from glm_ms.data.source_target import source_target_ids
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer


@pytest.fixture(scope="module")
def want(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "data_pipeline.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def glm2(vocab_file: Path) -> ChatGLM2Tokenizer:
    return ChatGLM2Tokenizer(vocab_file)


@pytest.fixture(scope="module")
def glm3(vocab_file: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(vocab_file)


def _chosen(want: dict[str, Any], records: str | list[int]) -> list[dict[str, str]]:
    assert records == "all 20" or isinstance(records, list)
    everything = want["records"]
    return everything if records == "all 20" else [everything[i] for i in records]


def _check(row: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in set(row) & set(expected):
        assert row[name].tolist() == expected[name], name
    assert {"input_ids", "labels"} <= set(expected)


def test_glm2_train(want, glm2, records_file):
    for case in want["glm2_ptuning_train"]:
        lengths = case["max_source_length"], case["max_target_length"]
        ignore = case["ignore_pad_token_for_loss"]
        chosen = _chosen(want, case["records"])
        assert len(chosen) == len(case["rows"]) > 0
        prefix = case.get("source_prefix", "")
        dataset = adgen_rows(
            records_file(chosen), glm2, ("content", "summary"), *lengths, ignore_pad_token_for_loss=ignore
        )
        for number, expected in enumerate(case["rows"]):
            prompt = prefix + glm2.build_prompt(chosen[number]["content"])
            ids = source_target_ids(glm2, prompt, chosen[number]["summary"], *lengths, ignore)
            _check(right_padded_row(*ids, sum(lengths) + 1, 0, -100 if ignore else 0), expected)
            if not prefix:
                _check(dataset[number], expected)


def test_glm2_skips_empty(want, glm2, records_file):
    case = want["glm2_ptuning_train_skips_empty"]
    lengths = case["max_source_length"], case["max_target_length"]
    dataset = adgen_rows(records_file(case["records"]), glm2, ("content", "summary"), *lengths)
    assert len(dataset) == len(case["rows"])
    assert dataset.skipped == len(case["records"]) - len(case["rows"]) > 0
    for row, expected in zip(dataset, case["rows"]):
        _check(row, expected)


def test_glm2_history(want, glm2, records_file):
    case = want["glm2_ptuning_train_history"]
    lengths = case["max_source_length"], case["max_target_length"]
    dataset = adgen_rows(records_file(case["records"]), glm2, case["columns"], *lengths)
    assert len(dataset) == len(case["rows"]) > 0
    for row, expected in zip(dataset, case["rows"]):
        _check(row, expected)


def test_glm2_collated(want, glm2, records_file):
    source, expected = want["glm2_ptuning_train"][2], want["glm2_collated"]
    assert expected["from"] == "glm2_ptuning_train[2].rows[0:2]"
    lengths = source["max_source_length"], source["max_target_length"]
    chosen = _chosen(want, source["records"])[:2]
    dataset = adgen_rows(records_file(chosen), glm2, ("content", "summary"), *lengths)
    for number, row in enumerate(dataset):
        assert sorted(row) == ["attention_mask", "input_ids", "labels", "position_ids"]
        for name, values in row.items():
            assert values.tolist() == expected[name][number], name


def test_glm2_eval(want, glm2, records_file):
    case = want["glm2_ptuning_eval"]
    lengths = case["max_source_length"], case["max_target_length"]
    chosen = _chosen(want, case["records"])
    dataset = adgen_prompts(records_file(chosen), glm2, ("content", "summary"), *lengths)
    assert len(dataset) == len(case["input_ids"]) > 0
    padded = glm2.pad([{"input_ids": item["input_ids"]} for item in dataset])
    for name, values in padded.items():
        assert values == case[name], name
    assert [item["labels"].tolist() for item in dataset] == case["labels"]
    for item, record in zip(dataset, chosen):
        assert item["prompt"] == record["content"]
        assert record["summary"].startswith(item["reference"])
        assert item["reference"]


def test_glm3_conversations(want, glm3):
    for case in want["glm3_process_batch"]:
        lengths = case["max_input_length"], case["max_output_length"]
        assert len(case["records"]) == len(case["rows"]) > 0
        for conversation, expected in zip(case["records"], case["rows"]):
            encoder = conversation_encoder(glm3, *lengths)
            input_ids, labels = encoder.train_ids(encoder.read(conversation, "here"))
            assert input_ids == expected["input_ids"]
            assert labels == expected["labels"]


def test_glm3_collated(want, glm3):
    source, expected = want["glm3_process_batch"][1], want["glm3_collated_train"]
    assert expected["from"] == "glm3_process_batch[1].rows[1:4]"
    for number, row in enumerate(source["rows"][1:4]):
        length = len(expected["input_ids"][number])
        got = left_padded_row(row["input_ids"], row["labels"], length, glm3.pad_token_id)
        for name, values in got.items():
            assert values.tolist() == expected[name][number], name


def test_glm3_eval(want, glm3):
    for case in want["glm3_process_batch_eval"]:
        lengths = case["max_input_length"], case["max_output_length"]
        encoder = conversation_encoder(glm3, *lengths)
        rows = [
            (row.input_ids, row.labels)
            for conversation in case["records"]
            for row in encoder.eval_rows(encoder.read(conversation, "here"))
            if row is not None
        ]
        assert rows == [(row["input_ids"], row["output_ids"]) for row in case["rows"]]
    expected = want["glm3_collated_eval"]
    padded = glm3.pad({"input_ids": [row[0] for row in rows[:3]]})
    for name, values in padded.items():
        assert values == expected[name], name
    assert [row[1] for row in rows[:3]] == expected["output_ids"]


def test_glm3_records_are_conversations(want, glm3, records_file):
    """The data set gives for records what the official function gives for the conversations of them."""
    case = want["glm3_process_batch"][0]
    lengths = case["max_input_length"], case["max_output_length"]
    pairs = [
        (conversation["conversations"], row)
        for conversation, row in zip(case["records"], case["rows"])
        if [message["role"] for message in conversation["conversations"]] == ["user", "assistant"]
    ]
    assert pairs
    records = [{"content": first["content"], "summary": second["content"]} for (first, second), _ in pairs]
    dataset = adgen_rows(records_file(records), glm3, ("content", "summary"), *lengths)
    for row, (_, expected) in zip(dataset, pairs):
        size = len(expected["input_ids"])
        assert row["input_ids"].shape == (sum(lengths) + 1,)
        assert row["input_ids"][-size:].tolist() == expected["input_ids"]
        assert row["labels"][-size:].tolist() == expected["labels"]
        assert not row["input_ids"][:-size].any()
        assert set(row["labels"][:-size].tolist()) == {-100}


def test_glm3_plain_prompt(want, glm3, records_file):
    case = want["glm3_inputoutput_legacy"]
    lengths = case["max_source_length"], case["max_target_length"]
    plain, path = ChatGLM3Tokenizer(glm3.vocab_file, template="plain"), records_file(case["records"])
    dataset = adgen_rows(path, plain, ("prompt", "response"), *lengths)
    assert len(dataset) == len(case["records"]) == len(case["rows"]) > 0
    for row, expected in zip(dataset, case["rows"]):
        _check(row, expected)
    for item, record in zip(adgen_prompts(path, plain, ("prompt", "response"), 200, 300), case["records"]):
        assert item["input_ids"].tolist() == glm3.encode(record["prompt"])
        assert item["labels"].tolist() == glm3.encode(record["response"], add_special_tokens=False)
        assert (item["prompt"], item["reference"]) == (record["prompt"], record["response"])


def test_all_adgen_records(adgen_file, glm2, glm3):
    for tok in (glm2, glm3):
        dataset = adgen_rows(adgen_file, tok)
        assert (len(dataset), dataset.skipped, dataset.without_labels) == (1070, 0, 0)
        for row in dataset:
            assert all(values.shape == (193,) and values.dtype == "int32" for values in row.values())
            assert (row["labels"] != -100).any()
    # The release of ChatGLM3 leaves prompts of max_source_length ids and more out of the evaluation.
    short, roomy = (
        adgen_prompts(adgen_file, glm3),
        adgen_prompts(adgen_file, glm3, max_source_length=128),
    )
    assert (len(short) + short.too_long, len(roomy), roomy.too_long) == (1070, 1070, 0)
    assert short.too_long > 0
    assert f"{short.too_long} skipped" in short.describe()
