"""ROUGE and BLEU against the original scripts (golden metrics.json)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest
from tolerances import METRIC

from glm_ms.metrics import SCORE_NAMES, ADGENMetric, adgen_scores
from glm_ms.metrics.adgen import _common_subsequence_length, _rouge, _segment


@pytest.fixture(scope="module")
def metrics(golden):
    return json.loads((golden / "metrics.json").read_text(encoding="utf-8"))


def expected_scores(pair):
    scores = pair["ptuning_main"]
    return dict.fromkeys(SCORE_NAMES, 0.0) if "error" in scores else scores


def close(expected):
    return pytest.approx(expected, abs=METRIC["atol"], rel=METRIC["rtol"])


@pytest.mark.parametrize("index", range(30))
def test_pair(metrics, index):
    pair = metrics["pairs"][index]
    assert adgen_scores(pair["prediction"], pair["reference"]) == close(expected_scores(pair))


@pytest.mark.parametrize("index", range(5))
def test_extra_pair(metrics, index):
    pair = metrics["extra_pairs"][index]
    assert adgen_scores(pair["prediction"], pair["reference"]) == close(expected_scores(pair))


def test_every_golden_pair_is_tested(metrics):
    assert (len(metrics["pairs"]), len(metrics["extra_pairs"])) == (30, 5)


def test_words_are_those_of_the_reference(metrics):
    for pair in metrics["pairs"] + metrics["extra_pairs"]:
        for side in ("prediction", "reference"):
            assert _segment(pair[side]) == " ".join(pair[f"{side}_words"])


def test_mean_counts_empty_predictions_as_zero(metrics):
    metric = ADGENMetric()
    pairs = metrics["pairs"]
    for start in range(0, len(pairs), 7):
        batch = pairs[start : start + 7]
        metric.update([pair["prediction"] for pair in batch], [pair["reference"] for pair in batch])
    result = metric.result()
    assert result.pop("num_samples") == len(pairs)
    assert result.pop("num_empty") == len(metrics["reference_raises_at"])
    assert result == close(metrics["mean_ptuning_main_raising_pairs_as_zero"])


def test_update_returns_scores():
    metric = ADGENMetric()
    scores = metric.update(["好看", " \n\u3000"], ["好看", "好看"])
    assert scores == [adgen_scores("好看", "好看"), dict.fromkeys(SCORE_NAMES, 0.0)]
    assert metric.result()["num_empty"] == 1
    with pytest.raises(ValueError, match="no samples"):
        ADGENMetric().result()


def test_rouge_l_equals_rouge_chinese_on_awkward_texts(metrics):
    from rouge_chinese import Rouge

    reference_rouge = Rouge()
    generator = random.Random(0)
    alphabet = [
        "。",
        "？",
        "”",
        "’",
        "!",
        "\n",
        "\n",
        " ",
        "……",
        "......",
        "裙",
        "裙子",
        "a",
        "好看",
        "，",
        "的",
    ]
    checked = 0
    for _ in range(400):
        texts = ["".join(generator.choices(alphabet, k=generator.randrange(1, 30))) for _ in range(2)]
        if not all(text.strip() for text in texts):
            continue
        segmented = [_segment(text) for text in texts]
        expected = {name: value["f"] for name, value in reference_rouge.get_scores(*segmented)[0].items()}
        assert _rouge(*segmented) == pytest.approx(expected, abs=1e-12), texts
        checked += 1
    assert checked > 300


def test_common_subsequence_length_of_unlike_lists():
    assert _common_subsequence_length(list("abcbdab"), list("bdcaba")) == 4
    assert _common_subsequence_length(list("aaaa"), list("aa")) == 2
    assert _common_subsequence_length(list("abc"), list("xyz")) == 0


def test_long_text_takes_neither_recursion_nor_long(metrics):
    text = "".join(pair["reference"] for pair in metrics["pairs"])
    adgen_scores("好看", "好看")  # dictionary and imports are not what is timed
    start = time.process_time()
    same, shifted = adgen_scores(text[:2000], text[:2000]), adgen_scores(text[:2000], text[500:2500])
    repeated = adgen_scores("的" * 20_000, text[:2000])
    assert time.process_time() - start < 10
    assert same == close(dict.fromkeys(SCORE_NAMES, 100.0))
    assert 50 < shifted["rouge-l"] < 90
    assert repeated["bleu-4"] < 1


def test_mistakes_are_named_and_change_nothing():
    metric = ADGENMetric()
    metric.update(["好看"], ["好看"])
    with pytest.raises(ValueError, match=r"sample 2: reference = ' ': has no word"):
        metric.update(["好", "好"], ["好", " "])
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        metric.update(["好", "看"], ["好"])
    with pytest.raises(TypeError, match="references is a single string"):
        metric.update(["好"], "好")
    with pytest.raises(TypeError, match="sample 1: prediction is list, expected str"):
        metric.update([[1, 2]], ["好"])
    with pytest.raises(ValueError, match="has no word"):
        adgen_scores("", "")
    assert metric.result()["num_samples"] == 1


def test_quiet_and_without_a_writable_folder(tmp_path, repository):
    program = (
        "import tempfile\n"
        "def unusable(*_, **__): raise FileNotFoundError('no usable temporary directory')\n"
        "tempfile.gettempdir = tempfile.mkstemp = unusable\n"
        "from glm_ms.metrics import adgen_scores\n"
        "assert adgen_scores('很好看', '很好看')['rouge-l'] > 99\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(repository)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
