"""`glm-ms bench`: speed and memory of this machine, alone or side by side with PyTorch and llama.cpp.

    glm-ms bench decode prefill --geometry m265
    glm-ms bench decode --geometry w6b-l4 --against torch:bfloat16 llamacpp --peer-python peers/bin/python
    glm-ms bench context --geometry tiny --context 64 256 --plot context.png --json context.json

All programs have the same random weights and take turns, one process each; the table has medians. A ratio is the time
of a program over that of glm_ms: above 1 glm_ms is faster. "x memory" is the time of a step over that of a plain read
of its weights by all threads.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from glm_ms.bench.geometry import GEOMETRIES, SIZES, geometry
from glm_ms.bench.machine import cores, describe
from glm_ms.bench.measure import DECODE, LOAD, PREFILL, TRAIN, Case, Group, check_subject
from glm_ms.bench.plots import draw
from glm_ms.bench.report import document, machine_lines, table, timing_table, warnings
from glm_ms.bench.subjects import OURS, SUBJECTS
from glm_ms.bench.timings import Timing, start_timings, tokenise_timings
from glm_ms.bench.workers import BenchError
from glm_ms.program import program
from glm_ms.storage.arguments import Parser, whole_number
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import FileError

# Mode -> what it measures.
MODES = {
    "decode": "steps of one sequence",
    "batch": "steps of several sequences at a time",
    "context": "steps after more and more tokens",
    "prefill": "prompts",
    "train": "updates of all weights",
    "train-lora": "updates of a LoRA adapter",
    "load": "a checkpoint on disk to the first logits",
    "start": "whole processes of a tiny network",
    "tokenise": "encoding and decoding of text",
}
_WITHOUT_NETWORK = ("start", "tokenise")
# Option -> its default, the modes that use it.
_ROWS = {"decode": (1,), "batch": (1, 4, 8, 16), "context": (1,), "train": (4,), "train-lora": (4,)}
_CONTEXT = {"decode": (64,), "batch": (64,), "context": (64, 256, 1024, 2048, 4096, 8192)}
_LENGTH = {"prefill": (512,), "train": (192,), "train-lora": (192,)}
_COUNT = whole_number(1, 1 << 20)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status: 0 done, 1 something could not be measured, 2 wrong usage."""
    parser = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    _check_use(parser, options)
    groups: list[Group] = []
    timings: list[Timing] = []
    try:
        try:
            _measure(options, groups, timings)
        finally:  # an interrupted run reports what it has
            if timings or any(group.results for group in groups):
                _report(options, shlex.join(["glm-ms", "bench", *words]), groups, timings)
        if options.plot:
            draw(groups, Path(options.plot))
    except (BenchError, FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if any(not result.samples for group in groups for result in group.results) else 0


def _measure(options: argparse.Namespace, groups: list[Group], timings: list[Timing]) -> None:
    """Fills both lists while it measures."""
    subjects = _subjects(options)
    with _folder(options.work_dir) as folder:
        for group in [_group(options, subjects, folder, *sizes) for sizes in _sweep(options)]:
            groups.append(group)
            group.run()
        timings.extend(_timings(options, folder))


def _report(options: argparse.Namespace, command: str, groups: list[Group], timings: list[Timing]) -> None:
    """Prints the table and writes the files."""
    machine = describe()
    lines = [*machine_lines(machine, groups), ""]
    lines += table(groups) if groups else []
    lines += ["", *timing_table(timings)] if timings and groups else timing_table(timings)
    print("\n".join(lines))
    for line in warnings(groups, timings):
        print(line, file=sys.stderr)
    if options.json:
        values = document(groups, machine, command, options.geometry, timings)
        replace_text(Path(options.json), json.dumps(values, indent=1, ensure_ascii=False) + "\n", parents=True)
    if options.table:
        replace_text(Path(options.table), "\n".join(lines) + "\n", parents=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(prog="glm-ms bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = "; ".join(f"{name}: {text}" for name, text in MODES.items())
    parser.add_argument("modes", nargs="+", choices=tuple(MODES), metavar="MODE", help=modes)
    parser.add_argument(
        "--geometry", default="tiny", metavar="NAME", help=f"{', '.join(GEOMETRIES)}, or a config (default: tiny)"
    )
    for name in SIZES:
        parser.add_argument(f"--{name}", type=_COUNT, metavar="N", help="in place of that of the geometry")
    parser.add_argument(
        "--weights", nargs="+", choices=tuple(SUBJECTS[OURS].bits), default=["float32"], help="of glm_ms (float32)"
    )
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="PROGRAM",
        help="torch or llamacpp, with all its types of weights or one: torch:bfloat16, llamacpp:int4"
    )  # fmt: skip
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has the other programs (this one)")
    parser.add_argument("--rows", nargs="+", type=_COUNT, metavar="N", help="sequences at a time")
    parser.add_argument("--context", nargs="+", type=_COUNT, metavar="N", help="tokens at the end of the steps")
    parser.add_argument("--length", nargs="+", type=_COUNT, metavar="N", help="tokens of a prompt, or of training rows")
    parser.add_argument("--layers", nargs="+", type=_COUNT, metavar="N", help="measure with each number of layers")
    parser.add_argument("--threads", nargs="+", type=_COUNT, metavar="N", help="measure with each number (all cores)")
    parser.add_argument("--rounds", type=_COUNT, default=5, metavar="N", help="turns of each program (5)")
    parser.add_argument("--steps", type=_COUNT, default=16, metavar="N", help="steps in a turn (16)")
    parser.add_argument(
        "--used", type=_share, default=1.0, metavar="SHARE", help="of training rows that is not padding (1)"
    )
    parser.add_argument(
        "--labelled", type=_share, default=1.0, metavar="SHARE", help="of training rows that has labels (1)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="for tokenise: tokenizer.model or its folder")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--table", metavar="FILE", help="write the table (Markdown)")
    parser.add_argument("--plot", metavar="FILE", help="write curves (PNG)")
    parser.add_argument("--work-dir", metavar="FOLDER", help="keep files of weights here, for later runs")
    return parser


def _check_use(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if an option would have no effect or has a value that cannot be."""
    chosen = set(options.modes)
    training = {"train", "train-lora"}
    users = {
        "rows": set(_ROWS), "context": set(_CONTEXT), "length": set(_LENGTH), "tokenizer": {"tokenise"},
        "layers": chosen - set(_WITHOUT_NETWORK), "threads": chosen - set(_WITHOUT_NETWORK),
        "against": chosen - set(_WITHOUT_NETWORK), "plot": chosen - set(_WITHOUT_NETWORK),
        **dict.fromkeys(SIZES, chosen - set(_WITHOUT_NETWORK)),
    }  # fmt: skip
    for name, modes in users.items():
        if getattr(options, name) and not modes & chosen:
            known = ", ".join(sorted(modes)) or "modes with a network"
            parser.error(f"--{name}: has no effect here; it is for {known}")
    if (options.used, options.labelled) != (1.0, 1.0) and not training & chosen:
        parser.error("--used, --labelled: are for train and train-lora")
    if options.labelled > options.used:
        parser.error(f"--labelled {options.labelled}: is above --used {options.used}: padding has no labels")
    most = len(cores())
    if options.threads and max(options.threads) > most:
        parser.error(f"--threads {max(options.threads)}: this process may use {most} cores")
    if options.layers and options.num_layers:
        parser.error("--layers and --num_layers: give one of them")


def cases(options: argparse.Namespace) -> list[Case]:
    """The measurements of all modes with a network, each once."""
    found: dict[Case, None] = {}
    for mode in options.modes:
        rows, context, length = (
            getattr(options, name) or defaults.get(mode, ())
            for name, defaults in (("rows", _ROWS), ("context", _CONTEXT), ("length", _LENGTH))
        )
        if mode in _CONTEXT:
            made = [Case(DECODE, *pair, steps=options.steps) for pair in product(rows, context)]
        elif mode == "prefill":
            made = [Case(PREFILL, tokens=tokens) for tokens in length]
        elif mode in ("train", "train-lora"):
            more = {"lora": mode == "train-lora", "used": options.used, "labelled": options.labelled}
            made = [Case(TRAIN, *pair, **more) for pair in product(rows, length)]
        else:
            made = [Case(LOAD, tokens=1)] if mode == "load" else []
        found.update(dict.fromkeys(made))
    return list(found)


def _subjects(options: argparse.Namespace) -> list[tuple[str, str]]:
    """glm_ms first."""
    found = dict.fromkeys((OURS, kind) for kind in options.weights)
    for text in options.against:
        found.update(dict.fromkeys(check_subject(text)))
    return list(found)


def _sweep(options: argparse.Namespace) -> Iterator[tuple[int | None, int]]:
    """Numbers of layers and threads of each group."""
    if set(options.modes) - set(_WITHOUT_NETWORK):
        yield from product(options.layers or [options.num_layers], options.threads or [len(cores())])


def _group(
    options: argparse.Namespace, subjects: list[tuple[str, str]], folder: Path, layers: int | None, threads: int
) -> Group:
    measured = cases(options)
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if layers is not None:
        sizes["num_layers"] = layers
    config = geometry(options.geometry, sizes, max(case.tokens + 1 for case in measured))
    return Group(
        config, threads, subjects, measured, str(folder), options.rounds, options.peer_python, say=_say
    )  # fmt: skip


def _timings(options: argparse.Namespace, folder: Path) -> Iterator[Timing]:
    if "start" in options.modes:
        yield from start_timings(folder, options.rounds)
    if "tokenise" in options.modes:
        yield from tokenise_timings(options.tokenizer, options.rounds, folder)


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    """The folder for files of weights; without a given one they are removed."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="glm_ms_bench_") as folder:
            yield Path(folder)
        return
    Path(given).mkdir(parents=True, exist_ok=True)
    yield Path(given)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _share(text: str) -> float:
    try:
        share: Any = float(text)
    except ValueError:
        share = 0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and at most 1")
    return share


if __name__ == "__main__":
    sys.exit(main())
