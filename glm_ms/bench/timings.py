"""Measurements without a network of a given size: whole processes, and the tokenizer."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from glm_ms.bench.geometry import geometry
from glm_ms.bench.machine import Load
from glm_ms.bench.random_weights import random_weights
from glm_ms.bench.workers import BenchError
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.writers import write_hf_folder
from glm_ms.resources import resource
from glm_ms.storage.errors import FileError
from glm_ms.tokenizer import ChatGLM3Tokenizer, SentencePieceTokenizer

_SAMPLE = "configs/tiny/sample/train.json"
_CONFIG = "configs/tiny/predict_glm3_tiny.yaml"
_VOCABULARY = 800
_TEXTS = 200
_SECONDS = 300  # most of one process
_FIRST_TOKEN = """
import sys
from glm_ms.pretrained import load_with_tokenizer
model, tokenizer = load_with_tokenizer(sys.argv[1], tokenizer=sys.argv[2], generation=3)
ids = tokenizer.encode("你好")
print(model.generate(ids, max_new_tokens=1, eos_token_id=[])[-1][-1], flush=True)
"""


@dataclass
class Timing:
    """Seconds of something, one per round.

    Attributes:
        tokens: that one sample handles; 0 where a rate means nothing.
        foreign_load: as of `Result`.
    """

    title: str
    samples: list[float] = field(default_factory=list)
    tokens: int = 0
    foreign_load: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "median": self.median}


def start_timings(folder: Path, rounds: int) -> Iterator[Timing]:
    """Whole processes, with a tiny network of random weights and files that the system has in memory.

    The time to the first token ends when it is printed; the others when the process has ended.
    """
    model, vocabulary = folder / "start", folder / "start" / "tokenizer.model"
    if not model.exists():
        config = geometry("tiny", {}, 128)
        write_hf_folder(model, config, expected_shapes(config), "float32", random_weights(config))
        train_vocabulary(vocabulary)
    run = [sys.executable, "-m", "glm_ms.commands", "predict", "--config", str(resource(_CONFIG))]
    run += ["--load_checkpoint", str(model), "--output_dir", str(folder / "predict"), "generation.max_new_tokens=16"]
    run += [f"processor.tokenizer.vocab_file={vocabulary}", "model.model_config.padded_vocab_size=1024"]
    programs: dict[str, list[str]] = {
        "python": [sys.executable, "-c", "pass"],
        "import glm_ms.generation": [sys.executable, "-c", "import glm_ms.generation"],
        "first token in Python": [sys.executable, "-c", _FIRST_TOKEN, str(model), str(vocabulary)],
        "glm-ms predict, 16 tokens": run,
    }
    for title, command in programs.items():
        timing, load = Timing(title), Load([])
        for _ in range(rounds):
            first, whole = _run(command)
            timing.samples.append(first if title.startswith("first token") else whole)
        timing.foreign_load = load.foreign()
        yield timing


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds to the first line of the output and to the end of a process. Raises BenchError if it fails."""
    root = Path(__file__).resolve().parents[2]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    first = time.perf_counter() - start
    try:
        rest, errors = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BenchError(f"{' '.join(command[1:4])}: has not ended after {_SECONDS} s") from None
    if process.returncode:
        said = (errors or line + rest).strip().splitlines() or [f"status {process.returncode}"]
        raise BenchError(f"{' '.join(command[1:4])}: {said[-1]}")
    return first, time.perf_counter() - start


def tokenise_timings(tokenizer: str | None, rounds: int, folder: Path) -> Iterator[Timing]:
    """Encoding and decoding of the sample texts, by the tokenizer and by SentencePiece alone.

    `tokenizer` and errors as of `chosen_tokenizer`.
    """
    texts = [str(record["content"]) + str(record["summary"]) for record in _records()][:_TEXTS]
    made: Any = chosen_tokenizer(tokenizer, folder)
    ids = [made.encode(text) for text in texts]
    tokens = sum(map(len, ids))
    jobs: dict[str, Callable[[], Any]] = {
        "encode": lambda: [made.encode(text) for text in texts],
        "encode, SentencePiece alone": lambda: [made.sp.EncodeAsIds(text) for text in texts],
        "decode": lambda: [made.decode(row) for row in ids],
        "decode, SentencePiece alone": lambda: [made.sp.DecodeIds(row[2:]) for row in ids],
    }
    timings = {title: Timing(title, tokens=tokens) for title in jobs}
    load = Load([])
    for number in range(rounds):
        titles = list(jobs)
        for title in titles[number % 4 :] + titles[: number % 4]:
            start = time.perf_counter()
            jobs[title]()
            timings[title].samples.append(time.perf_counter() - start)
    share = load.foreign()
    for timing in timings.values():
        timing.foreign_load = share
        yield timing


def chosen_tokenizer(tokenizer: str | None, folder: Path) -> SentencePieceTokenizer:
    """The tokenizer of a tokenizer.model or a folder; None: one with a vocabulary that is trained on the sample.

    Raises:
        BenchError: the tokenizer cannot be used.
    """
    if tokenizer is None:
        train_vocabulary(folder / "tokenizer.model")
        return ChatGLM3Tokenizer(folder / "tokenizer.model")
    from glm_ms.pretrained import find_tokenizer  # seconds of imports

    try:
        family, vocabulary, _ = find_tokenizer(tokenizer, 3)
        return family.tokenizer(vocabulary)
    except FileError as error:
        raise BenchError(str(error)) from None


def _records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in resource(_SAMPLE).read_text(encoding="utf-8").splitlines()]


def train_vocabulary(path: Path) -> None:
    """A small vocabulary of the sample records at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_suffix(".txt")
    text.write_text("\n".join(f"{r['content']}\n{r['summary']}" for r in _records()) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=_VOCABULARY,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, character_coverage=0.9995, minloglevel=2, num_threads=1
    )  # fmt: skip
