"""Lengths of records: what is counted, what is cut, which lengths would be best, and how it is shown."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import adgen_encoder, adgen_rows, conversation_encoder, tool_encoder

from glm_ms.data import workers
from glm_ms.data.datasets import TrainDataset
from glm_ms.data.inspection import (
    LOSS,
    PADDING_LABEL,
    SILENT,
    advice_lines,
    cut_lines,
    histogram_lines,
    marked_lines,
    parts,
    summary_lines,
    write_length_plot,
)
from glm_ms.data.statistics import LengthStatistics, measure, quantile
from glm_ms.storage.errors import DataError

RECORDS = [{"content": "颜色" * n, "summary": "百搭。" * (n % 7 + 1)} for n in range(1, 41)]
LIMITS = {"whole": ("max_seq_length", 100)}


def statistics_of(prompt, answer, seq_length=100, limits=LIMITS):
    prompt, answer = np.array(prompt, np.int32), np.array(answer, np.int32)
    kept = np.minimum(prompt, seq_length), np.clip(seq_length - prompt, 0, answer)
    return LengthStatistics(prompt, answer, *kept, seq_length, limits)


def test_lengths_are_those_of_the_rows(any_tokenizer, records_file):
    path = records_file([*RECORDS, {"content": "", "summary": "x"}])
    roomy = adgen_encoder(any_tokenizer, max_source_length=200, max_target_length=200)
    narrow = adgen_encoder(any_tokenizer, max_source_length=40, max_target_length=10)
    whole, cut = measure(path, roomy), measure(path, narrow)
    assert whole.skipped == 1
    assert (whole.prompt == cut.prompt).all()
    assert (whole.answer == cut.answer).all()
    assert not any(whole.cut().values())
    dataset = TrainDataset(path, roomy)
    for number, row in enumerate(dataset):
        assert (row["labels"] != -100).sum() == whole.answer[number]
        ids, _ = dataset._rows[number]
        assert len(ids) == whole.whole[number]
    # The narrow rows: those without a label are no rows.
    kept = cut.kept_answer > 0
    rows = TrainDataset(path, narrow)
    assert len(rows) == kept.sum() == len(cut) - cut.cut()["all labels"]
    assert [(row["labels"] != -100).sum() for row in rows] == cut.kept_answer[kept].tolist()
    sizes = [len(rows._rows[number][0]) for number in range(len(rows))]
    assert sizes == (cut.kept_prompt + cut.kept_answer)[kept].tolist()
    assert cut.padding_share() == pytest.approx(1 - np.mean(sizes) / 51)
    assert cut.cut()["prompt"] == (cut.prompt > cut.kept_prompt).sum() > 0
    assert cut.cut()["answer"] > 0
    assert cut.cut()["anything"] < cut.cut()["prompt"] + cut.cut()["answer"]


@pytest.mark.parametrize("share", [1.0, 0.99, 0.9, 0.5])
def test_fitting_lengths_fit_and_shorter_ones_do_not(any_tokenizer, records_file, share):
    path = records_file(RECORDS)
    statistics = measure(path, adgen_encoder(any_tokenizer, max_source_length=40, max_target_length=10))
    seq_length, prompt = statistics.fitting(share)
    assert seq_length % 16 == 0

    def whole_share(keys):
        again = measure(path, adgen_encoder(any_tokenizer, **keys))
        assert again.seq_length == keys["max_source_length"] + keys["max_target_length"] + 1
        return 1 - again.cut()["anything"] / len(again)

    encoder = adgen_encoder(any_tokenizer)
    keys = encoder.length_keys(seq_length, prompt)
    assert sum(keys.values()) + 1 == seq_length
    assert whole_share(keys) >= share
    # One multiple less does not do, wherever the row is divided.
    shorter = seq_length - 16
    for source in range(3, shorter - 1):
        keys = {"max_source_length": source, "max_target_length": shorter - source - 1}
        assert whole_share(keys) < share


def test_quantiles_are_lengths_that_occur():
    values = np.array([5, 1, 9, 7, 3])
    assert [quantile(values, share) for share in (0.0, 0.2, 0.21, 0.5, 0.8, 0.99, 1.0)] == [
        1,
        1,
        3,
        5,
        7,
        9,
        9,
    ]
    assert quantile(np.arange(1, 101), 0.99) == 99
    assert quantile(np.arange(1, 1001), 0.95) == 950


def test_keys_of_each_loader(glm2, glm3):
    assert tool_encoder(glm3, 64).length_keys(96, 10) == {"max_seq_length": 96}
    keys = conversation_encoder(glm3, 100, 20).length_keys(64, 10)
    assert keys == {"max_source_length": 43, "max_target_length": 20}
    assert conversation_encoder(glm3, 100, 200).length_keys(16, 10) == {
        "max_source_length": 3,
        "max_target_length": 12,
    }
    for tokenizer in (glm2, glm3):
        keys = adgen_encoder(tokenizer).length_keys(32, 500)
        assert keys == {"max_source_length": 30, "max_target_length": 1}


def test_num_samples_measures_what_training_reads(glm3, records_file):
    path = records_file(RECORDS)
    encoder = adgen_encoder(glm3, max_source_length=20, max_target_length=10)
    for number in (1, 7):
        statistics = measure(path, encoder, number)
        assert (statistics.kept_answer > 0).sum() == number
        dataset = TrainDataset(path, encoder, number)
        assert len(statistics) == number + dataset.without_labels


@pytest.mark.parametrize("num_workers", [1, 2])
def test_processes_and_bad_records(glm3, records_file, monkeypatch, num_workers):
    monkeypatch.setattr(workers, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(workers, "_BATCH_BYTES", 500)
    records = [dict(record) for record in RECORDS]
    records[5]["content"] = 5
    del records[30]["summary"]
    path = records_file(records)
    encoder = adgen_encoder(glm3)
    with pytest.raises(DataError, match=r"records\.json:6: column 'content' must be a string"):
        measure(path, encoder, None, num_workers)
    statistics = measure(path, encoder, None, num_workers, skip_bad=True)
    assert len(statistics) == 38
    assert [line.rpartition("records.json:")[2].split(":")[0] for line in statistics.bad] == ["6", "31"]
    good = [record for number, record in enumerate(RECORDS) if number not in (5, 30)]
    expected = measure(records_file(good, "good.json"), encoder)
    assert (statistics.prompt == expected.prompt).all()
    assert (statistics.answer == expected.answer).all()


def test_nothing_to_measure(glm3, records_file):
    encoder = adgen_encoder(glm3)
    with pytest.raises(DataError, match="has no records"):
        measure(records_file(""), encoder)
    with pytest.raises(DataError, match="no record to measure; 1 are empty, 1 are malformed"):
        measure(records_file('{"content": "", "summary": ""}\nx\n'), encoder, skip_bad=True)


def test_table():
    lines = list(summary_lines(statistics_of([10, 20, 30], [1, 2, 3000])))
    assert lines[0].split() == ["tokens", "min", "median", "p95", "p99", "max"]
    assert lines[1].split()[-5:] == ["10", "20", "30", "30", "30"]
    assert lines[2].split()[-5:] == ["1", "2", "3,000", "3,000", "3,000"]
    assert lines[3].split() == ["together", "11", "22", "3,030", "3,030", "3,030"]


@pytest.mark.parametrize("seed", range(5))
def test_histogram_counts_every_record_once(seed):
    generator = np.random.default_rng(seed)
    prompt = generator.geometric(0.02, 500) + 1
    prompt[0] = 10 ** (seed + 1)
    statistics = statistics_of(prompt, generator.integers(1, 50, 500), seq_length=64)
    lines = list(histogram_lines(statistics))
    bars = [line for line in lines if "seq_length" not in line]
    assert len(lines) - len(bars) == 1
    assert len(bars) <= 20
    counts = [int(line[15:24].replace(",", "")) for line in bars]
    assert sum(counts) == 500
    assert max(line.count("█") for line in bars) == 50
    assert all((line.count("█") > 0) == (count > 0) for line, count in zip(bars, counts))
    for line, count in zip(bars, counts):
        if " - " in line[:15]:
            start, stop = (int(text.replace(",", "")) for text in line[:15].split(" - "))
            assert ((statistics.whole >= start) & (statistics.whole <= stop)).sum() == count
    mark = next(place for place, line in enumerate(lines) if "seq_length" in line)
    ends_before = [int(line[:15].split(" - ")[0].replace(",", "")) for line in lines[:mark]]
    assert all(start <= 64 for start in ends_before)


def test_histogram_of_one_record():
    assert [line.split()[0] for line in histogram_lines(statistics_of([3], [2]))] == ["5", "-----"]
    lines = list(histogram_lines(statistics_of([90, 10], [20, 5])))
    assert lines[-1].strip().startswith("105 - 112")
    assert any("seq_length 100" in line for line in lines[:-1])


def test_what_is_cut_and_advice(glm3):
    statistics = statistics_of([10, 99, 120], [20, 20, 20])
    text = "\n".join(cut_lines(statistics))
    assert "cut at max_seq_length = 100 (rows of 100)" in text
    for name, number, share in (
        ("prompt cut", 1, "33.33%"),
        ("answer cut", 2, "66.67%"),
        ("no label left", 1, "33.33%"),
        ("anything cut", 2, "66.67%"),
    ):
        assert any(line.split() == [*name.split(), str(number), share] for line in text.splitlines()), name
    assert "training skips records without a label" in text
    advice = list(advice_lines(statistics, tool_encoder(glm3, 100), "eval"))
    assert "model.model_config.seq_length=144 eval_dataset.max_seq_length=144" in advice[1]
    assert "training skips" not in "\n".join(cut_lines(statistics_of([10], [20])))


def test_marked_records(glm2, glm3):
    value = {
        "tools": ["f"],
        "conversations": [
            {"role": "user", "content": "颜色\x1b[31m\n白色"},
            {"role": "assistant", "content": "百搭", "loss": False},
            {"role": "tool", "name": "f", "parameters": {"x": "y"}, "observation": "黑色"},
            {"role": "assistant", "content": "LOSS | 舒适\n自然"},
        ],
    }
    encoder = tool_encoder(glm3, 400)
    record = encoder.read(value, "here")
    lines = list(marked_lines(encoder, record))
    text = [line[len(SILENT) :] for line in lines[:-1]]
    assert {line[: len(SILENT)] for line in lines[:-1]} == {SILENT, LOSS}
    assert "\x1b" not in "".join(lines)
    assert "\\x1b[31m⏎" in "".join(lines)
    learnt = "".join(line[len(LOSS) :] for line in lines if line.startswith(LOSS))
    assert "百搭" not in learnt
    assert "黑色" not in learnt
    assert "白色" not in learnt
    assert learnt.startswith("f⏎")
    assert "tool_call(x='y')⏎```<|observation|>" in learnt
    assert learnt.endswith("LOSS | 舒适⏎自然</s>")
    assert text[0].startswith("[gMASK]sop<|system|>")
    padding = 400 - len(encoder.train_ids(record)[0])
    assert lines[-1].strip() == f"padding: {padding} tokens on the right, without loss"
    # With color the same lines, those with loss in green.
    colored = list(marked_lines(encoder, record, color=True))
    assert [line.replace("\x1b[32m", "").replace("\x1b[0m", "") for line in colored] == lines
    assert [line.startswith("\x1b[32m") for line in colored] == [line.startswith(LOSS) for line in lines]
    cut = list(marked_lines(tool_encoder(glm3, 400 - padding - 3), record))
    assert cut[-1].strip() == "cut: 0 tokens without and 3 with loss"


def test_all_tokens_of_a_row_are_marked(any_tokenizer, records_file):
    path = records_file(RECORDS)
    dataset = adgen_rows(path, any_tokenizer, max_source_length=64, max_target_length=30)
    for number in (0, 20, 39):
        ids, labels = dataset._rows[number]
        found = list(parts(any_tokenizer, ids, labels))
        assert [marker for marker, _ in found] == [SILENT, LOSS]
        assert found[1][1].strip().startswith("百搭。")


def test_labels_that_are_padding_are_told_apart(glm2, glm3):
    encoder = adgen_encoder(glm2, ignore_pad_token_for_loss=False)
    record = encoder.read(RECORDS[0], "here")
    lines = list(marked_lines(encoder, record))
    assert {line[: len(SILENT)] for line in lines[:-1]} == {PADDING_LABEL, LOSS}
    assert "WITH loss (ignore_pad_token_for_loss: False)" in lines[-1]
    left = list(marked_lines(adgen_encoder(glm3), record))
    assert "tokens on the left, without loss" in left[-1]


@pytest.mark.parametrize(
    "statistics",
    [
        statistics_of([5], [3]),
        statistics_of([10, 99, 120], [20, 20, 20]),
        statistics_of(np.arange(1, 3000), np.full(2999, 9)),
        statistics_of(
            [10, 200], [5, 90000], limits={"prompt": ("max_source_length", 50), "answer": ("max_target_length + 1", 49)}
        ),
    ],
    ids=["one", "few", "many", "far"]
)  # fmt: skip
def test_pictures(statistics, tmp_path, monkeypatch):
    texts = []
    from matplotlib.axes import Axes

    legend, title = Axes.legend, Axes.set_xlabel
    monkeypatch.setattr(Axes, "legend", lambda self, *a, **k: texts.append(legend(self, *a, **k)) or texts[-1])
    labels = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text, **k: labels.append(text) or title(self, text, **k))
    path = tmp_path / "new" / "lengths.png"
    write_length_plot(statistics, path, "x.json: records")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in path.parent.iterdir()] == ["lengths.png"]
    entries = [[text.get_text() for text in each.get_texts()] for each in texts]
    assert len(entries) == 3
    longer = int((statistics.whole > 100).sum())
    assert entries[2][2] == f"seq_length = 100 ({longer:,} longer, {longer / len(statistics):.1%})"
    assert [len(entry) for entry in entries[:2]] == ([3, 3] if "prompt" in statistics.limits else [2, 2])
    assert all(label.startswith("tokens") for label in labels)
