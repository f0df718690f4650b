"""Data sets of conversations against the official scripts of ChatGLM3, with the genuine vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import conversation_encoder, tool_encoder

from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.encoder import Encoder
from glm_ms.data.messages import message_ids
from glm_ms.data.records import format_tool_call, parse_tool_conversation
from glm_ms.storage.errors import DataError
from glm_ms.tokenizer import ChatGLM3Tokenizer
from glm_ms.tokenizer.answers import parse_tool_call


@pytest.fixture(scope="module")
def want(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "data_pipeline.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def glm3(vocab_file: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(vocab_file)


def _both_ways(path: Path, encoder: Encoder, folder: Path) -> list[TrainDataset]:
    return [TrainDataset(path, encoder), TrainDataset(path, encoder, cache=CacheRequest(folder))]


def test_conversations(want, glm3, records_file, tmp_path):
    for case in want["glm3_process_batch"]:
        lengths = case["max_input_length"], case["max_output_length"]
        encoder = conversation_encoder(glm3, *lengths)
        for dataset in _both_ways(records_file(case["records"]), encoder, tmp_path / "cache"):
            labelled = [row for row in case["rows"] if set(row["labels"]) != {-100}]
            assert len(dataset) == len(labelled) > 0
            assert dataset.without_labels == len(case["rows"]) - len(labelled)
            for row, expected in zip(dataset, labelled):
                size, length = len(expected["input_ids"]), sum(lengths) + 1
                assert row["input_ids"].tolist() == [0] * (length - size) + expected["input_ids"]
                assert row["labels"].tolist() == [-100] * (length - size) + expected["labels"]
                assert row["attention_mask"].tolist() == [0] * (length - size) + [1] * size
                assert row["position_ids"].tolist() == [0] * (length - size) + list(range(size))


def test_collated(want, glm3, records_file):
    """The collator pads to the longest of a batch, a data set to one length for all: the ends are the same."""
    case, expected = want["glm3_process_batch"][1], want["glm3_collated_train"]
    assert expected["from"] == "glm3_process_batch[1].rows[1:4]"
    encoder = conversation_encoder(glm3, case["max_input_length"], case["max_output_length"])
    records = case["records"][1:4]
    for number, record in enumerate(records):
        row = TrainDataset(records_file([record]), encoder)[0]
        for name, values in row.items():
            assert values[-len(expected[name][number]) :].tolist() == expected[name][number], name


def test_answers(want, glm3, records_file):
    for case in want["glm3_process_batch_eval"]:
        encoder = conversation_encoder(glm3, case["max_input_length"], case["max_output_length"])
        dataset = EvalDataset(records_file(case["records"]), encoder)
        # An answer of white space has nothing to be compared with.
        rows = [row for row in case["rows"] if glm3.decode(row["output_ids"]).strip()]
        assert len(dataset) == len(rows) > 0
        assert dataset.blank == len(case["rows"]) - len(rows)
        for item, row in zip(dataset, rows):
            assert item["input_ids"].tolist() == row["input_ids"]
            assert item["labels"].tolist() == row["output_ids"]
            assert item["prompt"].startswith("[gMASK]sop<|")
            assert item["prompt"].endswith("<|assistant|>")
    collated = want["glm3_collated_eval"]
    padded = glm3.pad({"input_ids": [dataset[i]["input_ids"].tolist() for i in range(2)]})
    assert {name: collated[name] for name in padded} == padded


def test_what_the_official_script_refuses(want, glm3, records_file):
    encoder = conversation_encoder(glm3, 256, 512)
    cases = want["glm3_process_batch_raises"]
    assert len(cases) == 2
    for case, message in zip(cases, ("'tools' is not known", "message 2: role 'tool' is not known")):
        path = records_file(case["records"])
        for kind in (TrainDataset, EvalDataset):
            with pytest.raises(DataError, match=message) as caught:
                kind(path, encoder)
            assert str(caught.value).startswith(f"{path}:1: ")
            assert "ToolAlpacaDataLoader" in str(caught.value)


def test_tools(want, glm3, records_file, tmp_path):
    for case in want["glm3_multiturn_legacy"]:
        length = case["max_seq_length"]
        assert len(case["records"]) == len(case["rows"]) > 0
        path = records_file(case["records"])
        encoder = tool_encoder(glm3, length)
        for dataset in _both_ways(path, encoder, tmp_path / "cache"):
            labelled = [row for row in case["rows"] if set(row["labels"]) != {-100}]
            assert len(dataset) == len(labelled) > 0
            assert dataset.without_labels == len(case["rows"]) - len(labelled)
            for row, expected in zip(dataset, labelled):
                assert row["input_ids"].tolist() == expected["input_ids"]
                assert row["labels"].tolist() == expected["labels"]
                assert row["attention_mask"].tolist() == [1] * length
                assert row["position_ids"].tolist() == list(range(length))
        # The rows without a label, too, which data sets leave out.
        for record, expected in zip(case["records"], case["rows"]):
            ids, labels = message_ids(glm3, parse_tool_conversation(record, "here"))
            row = encoder.row(ids[:length], labels[:length])
            assert row["input_ids"].tolist() == expected["input_ids"]
            assert row["labels"].tolist() == expected["labels"]
    assert dataset.without_labels > 0


def test_tool_calls(want):
    cases = want["format_function_call"]
    assert len(cases) > 3
    for case in cases:
        assert case["name"] == "tool_call"
        assert format_tool_call(case["parameters"]) == case["code"]
        assert parse_tool_call(case["code"]) == case["parameters"]


def test_answers_with_tools(want, glm3, records_file):
    """One for each message that bears loss; it begins where `<|assistant|>` ends, and the row has the same ids."""
    case = want["glm3_multiturn_legacy"][0]
    encoder = tool_encoder(glm3, case["max_seq_length"])
    for record, row in zip(case["records"], case["rows"]):
        if set(row["labels"]) == {-100}:
            continue
        dataset = EvalDataset(records_file([record]), encoder)
        wanted = [
            message
            for message in record["conversations"]
            if message["role"] in ("assistant", "tool") and message.get("loss", True)
        ]
        assert len(dataset) == len(wanted)
        for item, message in zip(dataset, wanted):
            size = len(item["input_ids"])
            assert item["input_ids"].tolist() == row["input_ids"][:size]
            answer = item["labels"].tolist()
            assert answer[:-1] == row["input_ids"][size : size + len(answer) - 1]
            assert answer[-1] == glm3.eos_token_id
            labels = np.array(row["labels"][size : size + len(answer) - 1])
            assert (labels == answer[:-1]).all()
            if message["role"] == "tool":
                code = format_tool_call(message["parameters"])
                assert item["reference"] == f"{message['name']}\n ```python\n{code}\n```"
            else:
                assert item["reference"] == message["content"].strip()
