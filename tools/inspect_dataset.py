"""Shows a data set of a configuration: lengths, records that are cut, better lengths, records as they are trained.

    python tools/inspect_dataset.py --config configs/tiny/finetune_glm3_tiny.yaml --png output/lengths.png
    python tools/inspect_dataset.py --config configs/tiny/multiturn_glm3_tiny.yaml --part eval --num_records 1

Flags and key.sub=value are those of run_glm.py and override the configuration. The tool needs neither weights nor a
device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.data.encoder import Encoder
from glm_ms.data.inspection import (
    LEGEND,
    advice_lines,
    cut_lines,
    histogram_lines,
    marked_lines,
    summary_lines,
    write_length_plot,
)
from glm_ms.data.statistics import LengthStatistics, measure
from glm_ms.families import build_encoder, build_tokenizer
from glm_ms.program import command_name, program
from glm_ms.settings import Settings, SettingsError, load_data_settings, parse_args
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import DataError, capped
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.tokenizer import VocabularyError

_PROGRAM = "inspect_dataset.py"
_MOST_BAD = 20


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool; `glm_ms.settings` reads all others."""
    parser = Parser(
        prog=command_name(_PROGRAM),
        description=(__doc__ or "").split("\n")[0],
        epilog="All flags of run_glm.py, and key.sub=value, set keys of the configuration, for example: "
        "--train_dataset FILE train_dataset.max_source_length=128",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file of a run")
    parser.add_argument(
        "--part", choices=("train", "eval"), help="data set to show (default: the one that the run_mode reads)"
    )
    parser.add_argument(
        "--num_records", type=int, default=3, metavar="N", help="records to show (default: %(default)s)"
    )
    parser.add_argument("--png", metavar="PATH", help="also draw the lengths into this PNG file")
    parser.add_argument(
        "--skip_bad", action="store_true", help="list records that cannot be used, and continue without them"
    )
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Shows one data set; returns the exit status: 0 done, 1 unusable records, 2 wrong usage or settings."""
    options, others = build_parser().parse_known_args(arguments)
    try:
        if options.num_records < 0:
            raise SettingsError(f"command line: --num_records {options.num_records}: must not be negative")
        if options.png is not None and Path(options.png).is_dir():
            raise SettingsError(f"command line: --png {options.png}: is a folder; give a file")
        settings, part = _settings(["--config", options.config, *others], options.part)
    except SettingsError as error:
        for problem in error.problems:
            print(f"{command_name(_PROGRAM)}: error: {problem}", file=sys.stderr)
        return 2
    try:
        _show(settings, part, options)
    except BrokenPipeError:  # `| head` ends early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DataError, VocabularyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _settings(arguments: Sequence[str], part: str | None) -> tuple[Settings, str]:
    """The settings. Lengths that do not fit the network are notes and not errors: this tool finds better ones."""
    config, flags, overrides = parse_args(arguments)
    settings, part, remarks = load_data_settings(config, overrides, flags, part)
    for remark in [*settings.notes, *remarks]:
        print(f"note: {remark}", file=sys.stderr)
    return settings, part


def _show(settings: Settings, part: str, options: argparse.Namespace) -> None:
    section: Any = getattr(settings, f"{part}_dataset")
    path = Path(section.data_loader.dataset_dir)
    tokenizer = settings.processor.tokenizer
    encoder = build_encoder(section, build_tokenizer(tokenizer))
    workers = settings.train_dataset.num_parallel_workers
    statistics = measure(path, encoder, section.num_samples, workers, options.skip_bad)
    _list_bad(statistics)
    title = f"{path}: {len(statistics):,} records"
    print(f"{title}, {section.data_loader.type}, {tokenizer.type}")
    if statistics.skipped:
        print(f"{statistics.skipped:,} more are skipped, with an empty prompt or response")
    if statistics.left_out:
        print(f"not used: {capped(sorted(statistics.left_out))}")
    for lines in (
        summary_lines(statistics),
        histogram_lines(statistics),
        cut_lines(statistics),
        advice_lines(statistics, encoder, part),
        _records(path, encoder, options.num_records, options.skip_bad),
    ):
        print()
        for line in lines:
            print(line, flush=True)
    if options.png is not None:
        # The font of the picture has no Chinese characters.
        name = path.name.encode("ascii", "replace").decode()
        write_length_plot(statistics, options.png, f"{name}: {len(statistics):,} records")
        print(f"\n{options.png}: histograms of prompt, answer and both")


def _list_bad(statistics: LengthStatistics) -> None:
    for line in statistics.bad[:_MOST_BAD]:
        print(f"skipped: {line}", file=sys.stderr)
    number = len(statistics.bad)
    if number > _MOST_BAD:
        print(f"skipped: ... and {number - _MOST_BAD:,} more", file=sys.stderr)
    if number:
        print(f"{number:,} malformed records skipped; training stops at the first one", file=sys.stderr)


def _records(path: Path, encoder: Encoder, number: int, skip_bad: bool) -> Iterator[str]:
    if number:
        yield f"records as they are trained. {LEGEND}"
    for line, record in islice(_usable(path, encoder, skip_bad), number):
        lengths = encoder.lengths(record)
        yield ""
        yield (
            f"{path.name}:{line}: {lengths.prompt} tokens without loss, {lengths.answer} with loss"
            + ("" if lengths.kept_answer else "; NO LABEL IS LEFT, training skips it")
        )
        yield from marked_lines(encoder, record, color=sys.stdout.isatty())


def _usable(path: Path, encoder: Encoder, skip_bad: bool) -> Iterator[tuple[int, Any]]:
    for raw in raw_values(path):
        try:
            record = encoder.read(parse_value(raw, path), f"{path}:{raw.line}")
        except DataError:
            if not skip_bad:
                raise
            continue
        if record is not None:
            yield raw.line, record


if __name__ == "__main__":
    sys.exit(main())
