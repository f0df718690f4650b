"""ROUGE and BLEU as the P-Tuning scripts of ChatGLM2-6B report them for ADGEN."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from glm_ms.metrics.metric import HIGHER, TEXT, Metric

SCORE_NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")

# rouge_chinese adds this to the denominator of its F measure; it shows in the fourth decimal.
_F_EPSILON = 1e-8


def adgen_scores(prediction: str, reference: str) -> dict[str, float]:
    """Scores one generated text against one reference.

    ROUGE is the F measure of rouge_chinese on jieba words. BLEU-4 is NLTK's sentence BLEU on characters with smoothing
    method 3 (Chen and Cherry, 2014), as in `ptuning/main.py` of ChatGLM2-6B. Texts are not stripped: leading and
    trailing blanks count for BLEU.

    Every score of an empty or blank prediction is 0; the original script raises an error.

    Returns:
        "rouge-1", "rouge-2", "rouge-l", "bleu-4": percent, rounded to 4 decimals.

    Raises:
        TypeError: one of the two is not a string.
        ValueError: the reference has no word, which is an error in the data set: no score is meaningful.
    """
    for name, text in (("prediction", prediction), ("reference", reference)):
        if not isinstance(text, str):
            raise TypeError(f"{name} is {type(text).__name__}, expected str (decode token ids first)")
    if not reference.strip():
        raise ValueError(f"reference = {reference!r}: has no word to compare with; remove the record from the data set")
    if not prediction.strip():
        return dict.fromkeys(SCORE_NAMES, 0.0)
    scores = {**_rouge(_segment(prediction), _segment(reference)), "bleu-4": _bleu4(prediction, reference)}
    return {name: round(100 * scores[name], 4) for name in SCORE_NAMES}


class ADGENMetric(Metric):
    """Mean ROUGE and BLEU-4 over generated texts.

    An empty prediction scores 0, stays in the mean and is counted. Otherwise a model could raise its mean by empty
    answers.
    """

    input = TEXT
    better = dict.fromkeys(SCORE_NAMES, HIGHER)
    headline, plotted = "rouge-l", SCORE_NAMES
    title, unit = "ROUGE and BLEU", "score (of 100)"

    def __init__(self) -> None:
        self._sums = dict.fromkeys(SCORE_NAMES, 0.0)
        self._num_samples = 0
        self._num_empty = 0

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
        """Adds samples and returns the scores of each, see `adgen_scores`. If it raises, it adds none of them.

        Raises:
            TypeError: a single string in place of a sequence, or an item that is not a string.
            ValueError: different numbers of texts, or a reference without a word. The message has the number of the
                sample, from 0 over all calls.
        """
        for name, texts in (("predictions", predictions), ("references", references)):
            if isinstance(texts, (str, bytes)):
                raise TypeError(f"{name} is a single string, expected a list of strings")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references: there must be one each")
        scores = []
        for index, (prediction, reference) in enumerate(zip(predictions, references)):
            try:
                scores.append(adgen_scores(prediction, reference))
            except (TypeError, ValueError) as error:
                raise type(error)(f"sample {self._num_samples + index}: {error}") from None
        for name in SCORE_NAMES:
            self._sums[name] += sum(score[name] for score in scores)
        self._num_samples += len(scores)
        self._num_empty += sum(not prediction.strip() for prediction in predictions)
        return scores

    def result(self) -> dict[str, Any]:
        """Mean percent of each score over all samples, "num_samples", and "num_empty" (empty predictions among them).

        Raises:
            ValueError: there is no sample.
        """
        if not self._num_samples:
            raise ValueError("ADGENMetric: no samples; call update() with predictions and references first")
        means: dict[str, Any] = {name: total / self._num_samples for name, total in self._sums.items()}
        return {**means, "num_samples": self._num_samples, "num_empty": self._num_empty}


@functools.cache
def _segmenter() -> Any:
    """A jieba tokenizer with the stock dictionary.

    This function parses the dictionary itself, in under a second. jieba's own initialization writes to stderr, trusts
    a marshal file of a fixed name in the shared temporary folder and fails if no folder is writable. Words that a
    program adds to jieba's global dictionary do not change the scores.
    """
    with warnings.catch_warnings():
        # Its import warns of pkg_resources and, under Python 3.12, of invalid escape sequences.
        warnings.simplefilter("ignore")
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


@functools.cache
def _rouge_chinese() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rouge_chinese import Rouge
    return Rouge(metrics=["rouge-1", "rouge-2"], stats=["f"])


def _segment(text: str) -> str:
    """jieba words joined by blanks, the input format of rouge_chinese."""
    return " ".join(_segmenter().lcut(text))


def _rouge(prediction: str, reference: str) -> dict[str, float]:
    """F measures in [0, 1] of two segmented texts.

    rouge_chinese computes rouge-1 and rouge-2. Its rouge-l keeps the whole table of the longest common subsequence in
    a dict (250 MB and 1.7 s for two texts of 2000 characters), so this module has its own.
    """
    by_name = _rouge_chinese().get_scores(prediction, reference)[0]
    scores = {name: by_name[name]["f"] for name in ("rouge-1", "rouge-2")}
    words, reference_words = _rouge_words(prediction), _rouge_words(reference)
    common = _common_subsequence_length(words, reference_words)
    precision, recall = common / len(words), common / len(reference_words)
    scores["rouge-l"] = 2 * precision * recall / (precision + recall + _F_EPSILON)
    return scores


def _rouge_words(segmented: str) -> list[str]:
    """The words that rouge_chinese compares: it splits into sentences, and blank lines become empty words."""
    sentences = [sentence for sentence in _rouge_chinese().cut_sent(segmented) if sentence]
    return [word for sentence in sentences for word in " ".join(sentence.split()).split(" ")]


def _common_subsequence_length(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence; the bits of an integer are one row of the table.

    Hyyrö, "Bit-parallel LCS-length computation revisited" (2004): zero bits mark the positions of `first` at which the
    length grows.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    ones = (1 << len(first)) - 1
    row = ones
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & ones
    return len(first) - bin(row).count("1")


def _bleu4(prediction: str, reference: str) -> float:
    """Sentence BLEU on characters, in [0, 1]."""
    # NLTK imports SciPy, which takes seconds.
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    return float(sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing))
