"""Data sets with a small vocabulary: shapes, counts, settings that cannot be used."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from data_helpers import adgen_encoder, adgen_prompts, adgen_rows

from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.encoder import Columns
from glm_ms.data.messages import message_ids
from glm_ms.data.records import read_prompt_and_answer
from glm_ms.storage.errors import DataError

COLUMNS = ("content", "summary")
RECORDS = [
    {"content": "类型#上衣*颜色#白色", "summary": "白色的上衣，清新自然。"},
    {"content": "类型#裙", "summary": ""},
    {"content": "类型#裤*颜色#黑色", "summary": "黑色的裤子，百搭。"},
    {"content": None, "summary": "x"},
]


def test_rows(records_file, any_tokenizer):
    dataset = adgen_rows(records_file(RECORDS), any_tokenizer, COLUMNS, 32, 48)
    assert (len(dataset), dataset.skipped, dataset.seq_length) == (2, 2, 81)
    for row in dataset:
        assert sorted(row) == ["attention_mask", "input_ids", "labels", "position_ids"]
        assert all(values.shape == (81,) and values.dtype == np.int32 for values in row.values())
        counted = row["labels"] != -100
        assert (row["labels"][counted] == row["input_ids"][counted]).all()
        assert row["labels"][counted][-1] == any_tokenizer.eos_token_id
    answer = any_tokenizer.decode(row["labels"][counted])
    assert answer.strip() == RECORDS[2]["summary"]
    assert "2 records used, 2 skipped with an empty" in dataset.describe()
    assert dataset.seq_length == 32 + 48 + 1
    twin = pickle.loads(pickle.dumps(dataset))  # worker processes get it this way
    assert all((twin[1][name] == values).all() for name, values in row.items())


def test_padding_side(records_file, glm2, glm3):
    path = records_file(RECORDS)
    right = adgen_rows(path, glm2, COLUMNS, 64, 64)[0]
    assert right["input_ids"][:2].tolist() == glm2.prefix_tokens
    assert right["input_ids"][-1] == glm2.pad_token_id
    assert right["attention_mask"].all()
    assert right["position_ids"].tolist() == list(range(129))
    left = adgen_rows(path, glm3, COLUMNS, 64, 64)[0]
    size = int(left["attention_mask"].sum())
    assert left["input_ids"][-size : 2 - size].tolist() == glm3.prefix_tokens
    assert left["input_ids"][-1] == glm3.eos_token_id
    assert left["position_ids"].tolist() == [0] * (129 - size) + list(range(size))
    assert not left["attention_mask"][:-size].any()


def test_rows_without_labels_are_left_out_and_counted(records_file, glm2, glm3):
    """A prompt that fills the row leaves a ChatGLM3 row nothing to predict: its mean loss would be 0 / 0."""
    long = {"content": "颜色" * 200, "summary": "白色"}
    path = records_file([long, RECORDS[0]])
    dataset = adgen_rows(path, glm3, COLUMNS, 32, 32)
    assert (len(dataset), dataset.without_labels, dataset.skipped) == (1, 1, 0)
    assert "1 skipped with a prompt longer" in dataset.describe()
    assert len(adgen_rows(path, glm2, COLUMNS, 32, 32)) == 2
    with pytest.raises(DataError, match="0 records used, 1 skipped with a prompt longer"):
        adgen_rows(records_file([long], "long.json"), glm3, COLUMNS, 32, 32)


def test_label_count_at_the_edge(glm3, records_file):
    """`has_labels` says exactly when a row has a label."""
    path = records_file(RECORDS[:1])
    seen = set()
    for source in range(3, 24):
        _, labels = message_ids(glm3, read_prompt_and_answer(RECORDS[0], "here", Columns(*COLUMNS)))
        some = any(label != -100 for label in labels[: source + 2])
        seen.add(some)
        if some:
            assert len(adgen_rows(path, glm3, COLUMNS, source, 1)) == 1
        else:
            with pytest.raises(DataError, match="0 records used"):
                adgen_rows(path, glm3, COLUMNS, source, 1)
    assert seen == {True, False}


def test_history_becomes_earlier_messages(records_file, glm2, glm3):
    item = {"q": "好", "a": "是", "h": [["你", "我"]]}
    path = records_file([item])
    row = adgen_rows(path, glm3, ("q", "a", "h"), 64, 64)[0]
    want = glm3.build_chat_input("好", [{"role": "user", "content": "你"}, {"role": "assistant", "content": "我"}])[
        "input_ids"
    ]
    size = int(row["attention_mask"].sum())
    assert row["input_ids"][-size:].tolist()[: len(want)] == want
    prompt = adgen_prompts(path, glm2, ("q", "a", "h"), 64, 64)[0]["input_ids"].tolist()
    assert prompt == glm2.build_chat_input("好", [("你", "我")])["input_ids"]
    assert adgen_prompts(path, glm3, ("q", "a", "h"), 64, 64)[0]["input_ids"].tolist() == want


def test_system_and_tools_come_first(records_file, glm3):
    tools, introduction = (
        [{"name": "f"}],
        "Answer the following questions as best as you can. You have access to the following tools:",
    )
    path = records_file([{"content": "好", "summary": "是", "s": "简短", "t": tools, "h": [["你", "我"]]}])
    columns = {"system_column": "s", "tools_column": "t", "history_column": "h"}
    encoder = adgen_encoder(glm3, max_source_length=400, max_target_length=64, **columns)
    history = [
        {"role": "system", "content": introduction, "tools": tools}, {"role": "system", "content": "简短"},
        {"role": "user", "content": "你"}, {"role": "assistant", "content": "我"},
    ]  # fmt: skip
    want = glm3.build_chat_input("好", history)["input_ids"]
    assert EvalDataset(path, encoder)[0]["input_ids"].tolist() == want
    row = TrainDataset(path, encoder)[0]
    assert row["input_ids"][row["attention_mask"] == 1].tolist()[: len(want)] == want


def test_eval_items(records_file, any_tokenizer):
    dataset = adgen_prompts(records_file(RECORDS), any_tokenizer, COLUMNS, 64, 64)
    assert (len(dataset), dataset.skipped, dataset.too_long) == (2, 2, 0)
    item = dataset[0]
    assert item["prompt"] == RECORDS[0]["content"]
    assert item["reference"] == RECORDS[0]["summary"]
    assert item["input_ids"].dtype == item["labels"].dtype == np.int32
    want = any_tokenizer.build_chat_input(RECORDS[0]["content"])["input_ids"]
    assert item["input_ids"].tolist() == want


def test_num_samples_reads_no_further(records_file, any_tokenizer):
    good = json.dumps(RECORDS[0], ensure_ascii=False)
    path = records_file(f"{good}\n{good}\nbroken\n")
    assert len(adgen_rows(path, any_tokenizer, COLUMNS, 32, 32, num_samples=2)) == 2
    assert len(adgen_prompts(path, any_tokenizer, COLUMNS, 32, 32, num_samples=1)) == 1
    with pytest.raises(DataError, match=r"records\.json:3: not valid JSON"):
        adgen_rows(path, any_tokenizer, COLUMNS, 32, 32, num_samples=3)
    with pytest.raises(DataError, match="num_samples=0: must be at least 1"):
        adgen_rows(path, any_tokenizer, COLUMNS, 32, 32, num_samples=0)


@pytest.mark.parametrize("content", ["", " \n\n", "[]"])
def test_files_without_records(records_file, glm3, content):
    path = records_file(content)
    for build in (adgen_rows, adgen_prompts):
        with pytest.raises(DataError, match="has no records") as caught:
            build(path, glm3)
        assert str(caught.value).startswith(str(path))


def test_settings_that_cannot_be_used(records_file, glm2, glm3):
    path = records_file(RECORDS)
    for lengths, message in (
        ((2, 8), "max_source_length = 2: must be an integer of at least 3"),
        ((8, 0), "max_target_length = 0"),
        ((8.0, 8), "max_source_length = 8.0"),
        ((8, True), "max_target_length = True"),
    ):
        with pytest.raises(DataError, match=message):
            adgen_rows(path, glm2, COLUMNS, *lengths)
    with pytest.raises(DataError, match="is not possible with ChatGLM3Tokenizer"):
        adgen_rows(path, glm3, COLUMNS, 32, 32, ignore_pad_token_for_loss=False)
    with pytest.raises(DataError, match="0 records used, 2 skipped with an empty"):
        adgen_rows(records_file(RECORDS[1::2], "empty.json"), glm2, COLUMNS, 32, 32)
