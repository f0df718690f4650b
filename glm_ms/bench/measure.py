"""Measurements of several subjects that take turns, so that all meet the same state of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from glm_ms.bench.geometry import matrix_elements
from glm_ms.bench.machine import Load, available_memory, cores, read_bandwidth
from glm_ms.bench.random_weights import random_ids
from glm_ms.bench.subjects import OURS, SUBJECTS, Setup
from glm_ms.bench.workers import BenchError, NotMeasuredError, Worker, default_python
from glm_ms.model.config import GLMConfig

DECODE, PREFILL, TRAIN, LOAD = "decode", "prefill", "train", "load"
_PROBE = 16
_READ_BYTES = 1 << 28  # of a round
_COPIES_TO_TRAIN = 4  # weights, gradients, two moments
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        mode: DECODE: steps of `rows` sequences that end at `tokens` tokens. PREFILL: a prompt of `tokens`. TRAIN: an
            update with `rows` rows of `tokens` places. LOAD: a checkpoint on disk to the first logits.
        steps: of a sample, for DECODE.
        lora, used, labelled: for TRAIN, see `training_batch`.
    """

    mode: str
    rows: int = 1
    tokens: int = 64
    steps: int = 16
    lora: bool = False
    used: float = 1.0
    labelled: float = 1.0

    @property
    def tokens_of_sample(self) -> int:
        """Tokens of one sample, without padding; 0 where a rate means nothing."""
        trained = round(self.rows * self.tokens * self.used)
        return {DECODE: self.rows, PREFILL: self.tokens, TRAIN: trained}.get(self.mode, 0)

    def title(self) -> str:
        if self.mode == DECODE:
            return f"decode, {self.rows} row{'s' if self.rows > 1 else ''}, context {self.tokens}"
        if self.mode == TRAIN:
            padded = "" if self.used == 1 else f", {self.used:.0%} used, {self.labelled:.0%} labelled"
            return f"train {'LoRA' if self.lora else 'all weights'}, {self.rows} x {self.tokens}{padded}"
        return f"prefill {self.tokens}" if self.mode == PREFILL else self.mode


@dataclass
class Result:
    """What one subject needed for a case.

    Attributes:
        samples: seconds, one per round; of DECODE the median of the steps of a round.
        foreign_load: share of all cores that other programs took meanwhile; None: not known.
        peak_memory: bytes, of the process so far.
        parts: of LOAD, name -> seconds of each round.
        error: why there are no samples.
    """

    case: Case
    subject: str
    weights: str
    layers: int
    threads: int
    samples: list[float] = field(default_factory=list)
    foreign_load: float | None = None
    peak_memory: int = 0
    bandwidth: float = 0.0
    weight_bytes: float = 0.0
    parts: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile; the extremes of fewer than four samples."""
        if len(self.samples) < 4:
            return min(self.samples), max(self.samples)
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def name(self) -> str:
        return f"{self.subject}:{self.weights}"

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.samples:
            values.update(median=self.median, spread=list(self.spread))
        return values


@dataclass
class Group:
    """Cases of one network on some threads, and the programs that take turns.

    Attributes:
        subjects: (subject, type of the weights) pairs; the first one is the reference of the logits.
        folder: for files of weights.
        agreement: largest difference of a logit from those of the first subject, as a share of the largest logit.
    """

    config: GLMConfig
    threads: int
    subjects: Sequence[tuple[str, str]]
    cases: Sequence[Case]
    folder: str
    rounds: int = 5
    peer_python: str | None = None
    say: Say = lambda line: None
    results: list[Result] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    bandwidth: float = 0.0

    def run(self) -> None:
        """Makes all measurements. Raises BenchError if they need more memory than is free, or nothing works."""
        self._check_memory()
        self.say(f"layers {self.config.num_layers}, threads {self.threads}: {', '.join(map(':'.join, self.subjects))}")
        self.bandwidth = read_bandwidth(self.threads)["best"]
        together = [case for case in self.cases if case.mode in (DECODE, PREFILL)]
        if together:
            with self._workers(together, Worker.build) as workers:
                self._compare(workers, together)
                for case in together:
                    self._take_turns(case, workers, prepare, sample)
        for case in self.cases:
            if case.mode == TRAIN:  # changes the weights
                with self._workers([case], Worker.build) as workers:
                    self._take_turns(case, workers, prepare, sample)
            elif case.mode == LOAD:
                self._load(case)
        for mode in dict.fromkeys(case.mode for case in self.cases):
            for reason in filter(None, (why_not(mode, *pair) for pair in self.subjects)):
                self.say(f"  not measured: {reason}")
        if not any(result.samples for result in self.results):
            raise BenchError("nothing could be measured: " + "; ".join(result.error for result in self.results[:3]))

    def _able(self, cases: Sequence[Case]) -> list[tuple[str, str]]:
        """Subjects that can run cases of one mode."""
        return [pair for pair in self.subjects if not why_not(cases[0].mode, *pair)]

    def _setup(self, weights: str) -> Setup:
        return Setup(self.config.to_dict(), weights, self.threads, self.folder)

    def _check_memory(self) -> None:
        """All programs are in memory at the same time, unless only LOAD is measured."""
        free = available_memory()
        if free is None or all(case.mode == LOAD for case in self.cases):
            return
        elements = matrix_elements(self.config) + self.config.padded_vocab_size * self.config.hidden_size
        if any(case.mode == TRAIN and not case.lora for case in self.cases):
            elements *= _COPIES_TO_TRAIN
        needs = {f"{name}:{kind}": elements * SUBJECTS[name].bits[kind] / 8 for name, kind in self.subjects}
        if sum(needs.values()) > free:
            sizes = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needs.items())
            raise BenchError(
                f"the weights of all programs together ({sizes}) do not fit in {free / 1e9:.1f} GB of free memory; "
                "measure fewer of them at a time, or fewer layers (--num_layers)"
            )

    @contextmanager
    def _workers(self, cases: Sequence[Case], start: Callable[[Worker, Setup], None]) -> Iterator[list[Worker]]:
        """Processes of all subjects that can run some cases; those that fail to start are reported once per case."""
        cores_used = cores()[: self.threads]
        with ExitStack() as stack:
            ready = []
            for subject, weights in self._able(cases):
                worker = Worker(subject, weights, default_python(subject, self.peer_python), cores_used)
                stack.callback(worker.end)
                try:
                    start(worker, self._setup(weights))
                    self.versions[subject] = worker.version or self.versions.get(subject, "")
                    ready.append(worker)
                except NotMeasuredError as error:
                    self._failed(worker, cases, error)
            yield ready

    def _failed(self, worker: Worker, cases: Sequence[Case], error: Exception) -> None:
        self.say(f"  {error}")
        self.results += [self._result(case, worker, error=str(error)) for case in cases]

    def _result(self, case: Case, worker: Worker, **values: Any) -> Result:
        elements = matrix_elements(self.config) * SUBJECTS[worker.subject].bits[worker.weights] / 8
        sizes = self.config.num_layers, self.threads
        values = {"weight_bytes": elements, "bandwidth": self.bandwidth, **values}
        return Result(case, worker.subject, worker.weights, *sizes, **values)

    def _compare(self, workers: list[Worker], cases: Sequence[Case]) -> None:
        """Whether all compute the same network."""
        ids = random_ids(self.config, _PROBE, 7).tolist()
        first: np.ndarray | None = None
        for worker in list(workers):
            try:
                logits = worker.call("logits", ids=ids)
            except NotMeasuredError as error:
                self._failed(worker, cases, error)
                workers.remove(worker)
                continue
            first = logits if first is None else first
            self.agreement[worker.name] = float(np.abs(logits - first).max() / np.abs(first).max())

    def _take_turns(
        self, case: Case, workers: Sequence[Worker], prepare: Callable[[Worker, Case], None],
        sample: Callable[[Worker, Case], list[float]]
    ) -> None:  # fmt: skip
        """Rounds in which every subject has its turn; the order rotates."""
        found: dict[str, Result] = {}
        for worker in workers:
            try:
                prepare(worker, case)
                found[worker.name] = self._result(case, worker)
            except NotMeasuredError as error:
                self._failed(worker, [case], error)
        running = [worker for worker in workers if worker.name in found]
        loads: dict[str, list[float]] = {name: [] for name in found}
        rates: list[float] = []
        try:
            for number in range(self.rounds):
                if case.mode == DECODE:
                    rates.append(read_bandwidth(self.threads, _READ_BYTES)["best"])
                turn = number % max(1, len(running))
                for worker in running[turn:] + running[:turn]:
                    load = Load([each.process.pid for each in workers])
                    try:
                        found[worker.name].samples.append(statistics.median(sample(worker, case)))
                    except NotMeasuredError as error:
                        found[worker.name].error = str(error)
                        self.say(f"  {error}")
                        running.remove(worker)
                        continue
                    found[worker.name].peak_memory = worker.peak_memory
                    share = load.foreign()
                    loads[worker.name] += [] if share is None else [share]
        finally:  # an interrupt keeps the rounds so far
            for name, result in found.items():
                if result.samples or result.error:
                    result.foreign_load = statistics.fmean(loads[name]) if loads[name] else None
                    result.bandwidth = statistics.median(rates) if rates else result.bandwidth
                    self.results.append(result)
                    self._tell(result)

    def _load(self, case: Case) -> None:
        """Every sample in a process of its own, with files that are in the memory of the system."""
        with self._workers([case], lambda worker, setup: worker.call("write", setup=setup)) as writers:
            names = {worker.name: self._result(case, worker) for worker in writers}
        for number in range(self.rounds):
            order = [pair for pair in self.subjects if ":".join(pair) in names]
            turn = number % max(1, len(order))
            for subject, weights in order[turn:] + order[:turn]:
                worker = Worker(subject, weights, default_python(subject, self.peer_python), cores()[: self.threads])
                result, load = names[worker.name], Load([worker.process.pid])
                try:
                    parts = worker.call("load", setup=self._setup(weights))
                    result.samples.append(sum(parts.values()))
                    result.peak_memory, result.foreign_load = worker.peak_memory, load.foreign()
                    for name, seconds in parts.items():
                        result.parts.setdefault(name, []).append(seconds)
                except NotMeasuredError as error:
                    result.error = str(error)
                finally:
                    worker.end()
        for result in names.values():
            self.results.append(result)
            self._tell(result)

    def _tell(self, result: Result) -> None:
        if not result.samples:
            self.say(f"  {result.case.title()}: {result.name}: {result.error}")
            return
        low, high = result.spread
        note = "" if result.foreign_load is None else f", foreign load {result.foreign_load:.0%}"
        self.say(
            f"  {result.case.title()}: {result.name}: {result.median * 1e3:.2f} ms "
            f"({low * 1e3:.2f} to {high * 1e3:.2f}){note}"
        )


def why_not(mode: str, subject: str, weights: str) -> str:
    """Why a program does not run cases of a mode with a type of weights; empty if it does."""
    verb = {TRAIN: "train", LOAD: "load"}.get(mode, "run")
    able = getattr(SUBJECTS[subject], f"{verb}s")
    if weights in able:
        return ""
    return f"{subject} does not {verb} {weights} weights here; it {verb}s {', '.join(able) or 'none'}"


def prepare(worker: Worker, case: Case) -> None:
    """What a subject does before its first sample of a case; it compiles here."""
    if case.mode == DECODE:
        worker.call("open", rows=case.rows, context=case.tokens, steps=min(case.steps, case.tokens - 1))
    elif case.mode == PREFILL:
        worker.call("prefill", length=case.tokens)
    else:
        size = {"rows": case.rows, "length": case.tokens}
        worker.call("open_training", **size, lora=case.lora, used=case.used, labelled=case.labelled)


def sample(worker: Worker, case: Case) -> list[float]:
    """Seconds of each step of a sample."""
    if case.mode == DECODE:
        return worker.call("steps")
    return [worker.call("prefill", length=case.tokens) if case.mode == PREFILL else worker.call("train")]


def check_subject(text: str) -> list[tuple[str, str]]:
    """The (subject, weights) pairs of `torch` or `torch:bfloat16`. Raises BenchError for an unknown one."""
    name, _, kind = text.partition(":")
    known = [subject for subject in SUBJECTS if subject != OURS]
    if name not in known:
        raise BenchError(f"{text}: unknown program; known: {', '.join(known)}")
    if kind and kind not in SUBJECTS[name].bits:
        raise BenchError(f"{text}: {name} has no such weights; it has {', '.join(SUBJECTS[name].bits)}")
    return [(name, kind)] if kind else [(name, each) for each in SUBJECTS[name].bits]
