"""`glm-ms bench`: speed and memory of this machine, alone or side by side with PyTorch, llama.cpp and OpenVINO.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from glm_ms.bench.geometry import GEOMETRIES, SIZES, geometry
from glm_ms.bench.machine import cores, describe
from glm_ms.bench.measure import DECODE, LOAD, PREFILL, TRAIN, Case, Group, Result, check_subject, why_not
from glm_ms.bench.plots import check_plottable, draw
from glm_ms.bench.report import document, machine_lines, table, timing_table, warnings
from glm_ms.bench.subjects import OURS, SUBJECTS
from glm_ms.bench.timings import Timing, start_timings, tokenise_timings
from glm_ms.bench.workers import BenchError
from glm_ms.program import program
from glm_ms.storage.arguments import Parser, whole_number
from glm_ms.storage.atomic import check_target, replace_text
from glm_ms.storage.errors import FileError, WriteError, not_written

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
    "schedule": "what the server does for a step beside the network",
}
_WITHOUT_NETWORK = ("start", "tokenise", "schedule")
# Mode with a network -> that of its cases.
_CASE_MODES = {
    "decode": DECODE, "batch": DECODE, "context": DECODE, "prefill": PREFILL, "train": TRAIN, "train-lora": TRAIN,
    "load": LOAD,
}  # fmt: skip
_OUTPUTS = ("json", "table", "plot")
# Option -> its default, the modes that use it.
_ROWS = {
    "decode": (1,),
    "batch": (1, 4, 8, 16),
    "context": (1,),
    "train": (4,),
    "train-lora": (4,),
    "schedule": (1, 16),
}
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
    options.weights = options.weights or ["float32"]
    groups: list[Group] = []
    timings: list[Timing] = []
    lost: list[str] = []
    try:
        subjects = _subjects(parser, options)
        _check_outputs(options)
        try:
            _measure(options, subjects, groups, timings)
        finally:  # an interrupted run reports what it has
            if timings or any(group.results for group in groups):
                lost = _report(options, shlex.join(["glm-ms", "bench", *words]), groups, timings)
    except (BenchError, FileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if lost or any(not result.samples for group in groups for result in group.results) else 0


def _measure(
    options: argparse.Namespace, subjects: list[tuple[str, str]], groups: list[Group], timings: list[Timing]
) -> None:
    """Fills both lists while it measures."""
    with _folder(options.work_dir) as folder:
        for group in [_group(options, subjects, folder, *sizes) for sizes in _sweep(options)]:
            groups.append(group)
            group.run()
        timings.extend(_timings(options, folder))


def _report(options: argparse.Namespace, command: str, groups: list[Group], timings: list[Timing]) -> list[str]:
    """Prints the table and writes the files. Returns what could not be written, each of which is printed too."""
    machine = describe()
    lines = [*machine_lines(machine, groups), ""]
    lines += table(groups) if groups else []
    lines += ["", *timing_table(timings)] if timings and groups else timing_table(timings)
    print("\n".join(lines))
    for line in warnings(groups, timings):
        print(line, file=sys.stderr)
    values = document(groups, machine, command, options.geometry, timings)
    writers: dict[str, Callable[[Path], None]] = {
        "json": lambda path: replace_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n", parents=True),
        "table": lambda path: replace_text(path, "\n".join(lines) + "\n", parents=True),
        "plot": lambda path: draw(groups, path),
    }
    lost = []
    for name, write in writers.items():
        try:
            if path := getattr(options, name):
                write(Path(path))
        except (BenchError, FileError, OSError) as error:  # the other files are still written
            lost.append(f"--{name}: {error}")
            print(f"error: {lost[-1]}", file=sys.stderr)
    return lost


def _check_outputs(options: argparse.Namespace) -> None:
    """Raises FileError or BenchError, before anything is measured, if an output cannot be written or drawn."""
    given = {name: getattr(options, name) for name in _OUTPUTS if getattr(options, name)}
    places = {name: Path(path).resolve() for name, path in given.items()}
    for name, path in given.items():
        same = [f"--{other}" for other in given if places[other] == places[name]]
        if len(same) > 1:
            raise WriteError(f"{path}: is the file of {' and '.join(same)}; give each its own")
        check_target(path, overwrite=True, error=WriteError)
        _check_folder(Path(path).absolute().parent)
    if options.work_dir is not None:
        check_target(Path(options.work_dir, "weights"), overwrite=True, error=WriteError)
        _check_folder(Path(options.work_dir))
    if options.plot is not None:
        planned = [
            Result(case, OURS, "", layers or 0, threads, [1.0])
            for layers, threads in _sweep(options) for case in cases(options)
        ]  # fmt: skip
        check_plottable(planned)


def _check_folder(folder: Path) -> None:
    """Makes a folder and writes a file there that goes away at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WriteError(not_written(folder, error)) from error


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
        "--weights",
        nargs="+",
        choices=tuple(SUBJECTS[OURS].bits),
        help="of glm_ms (float32); amp, for training: float32 with products in bfloat16",
    )
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="PROGRAM",
        help="torch, llamacpp or openvino, with all its types of weights or one: torch:bfloat16, llamacpp:int4"
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
    parser.add_argument("--tokenizer", metavar="PATH", help="for tokenise, schedule: tokenizer.model or its folder")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--table", metavar="FILE", help="write the table (Markdown)")
    parser.add_argument("--plot", metavar="FILE", help="write curves (PNG)")
    parser.add_argument("--work-dir", metavar="FOLDER", help="keep files of weights here, for later runs")
    return parser


def _check_use(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program if an option would have no effect or has a value that cannot be."""
    chosen = set(options.modes)
    training = {"train", "train-lora"}
    networks = chosen - set(_WITHOUT_NETWORK)
    users = {
        "rows": set(_ROWS), "context": set(_CONTEXT), "length": set(_LENGTH), "tokenizer": {"tokenise", "schedule"},
        **dict.fromkeys(("weights", "layers", "threads", "against", "plot", *SIZES), networks),
    }  # fmt: skip
    for name, modes in users.items():
        if getattr(options, name) and not modes & chosen:
            known = ", ".join(sorted(modes)) or "modes with a network"
            parser.error(f"--{name}: has no effect here; it is for {known}")
    if options.peer_python and not options.against:
        parser.error("--peer-python: has no effect without --against")
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


def _subjects(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[tuple[str, str]]:
    """glm_ms first. Ends the program if one of them has no use in any of the modes; raises BenchError if unknown."""
    asked = [(f"--weights {kind}", [(OURS, kind)]) for kind in dict.fromkeys(options.weights)]
    asked += [(f"--against {text}", check_subject(text)) for text in dict.fromkeys(options.against)]
    modes = [_CASE_MODES[mode] for mode in options.modes if mode not in _WITHOUT_NETWORK]
    found = dict[tuple[str, str], None]()
    for words, pairs in asked:
        reasons = [why_not(mode, *pairs[0]) for mode in modes]
        if modes and all(why_not(mode, *pair) for mode in modes for pair in pairs):
            parser.error(f"{words}: {'; '.join(dict.fromkeys(reasons))}")
        found.update(dict.fromkeys(pairs))
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
    if "schedule" in options.modes:
        from glm_ms.bench.scheduling import schedule_timings  # seconds of imports

        rows = options.rows or _ROWS["schedule"]
        yield from schedule_timings(options.tokenizer, rows, options.rounds, options.steps, folder)


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
