"""Checks this device before a real run: fused kernels, operators, a training step, a generation.

    python tools/check_device.py
    python tools/check_device.py --device_target Ascend --device_id 3

On an Ascend card each fused kernel is compared with the portable operator at the sizes of the 6B models. On every
device the portable operators are compared with NumPy, and training and generation of a two-layer network with the
reference implementation. A table shows what passed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.ascend_hints import error_lines
from glm_ms.program import program
from glm_ms.settings import ascend_cards
from glm_ms.storage.arguments import Parser

_GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--device_target",
        choices=("CPU", "Ascend"),
        help="kind of device (default: Ascend if this machine shows a card, else CPU)",
    )
    parser.add_argument("--device_id", type=int, metavar="N", help="number of the Ascend card (default: the first one)")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status: 0 all passed, 1 something failed, 2 wrong usage."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    cards = ascend_cards()
    target = options.device_target or ("Ascend" if cards else "CPU")
    device_id = _device_id(parser, target, options.device_id, cards)
    os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
    with tempfile.TemporaryDirectory() as logs:
        os.environ.setdefault("LOCAL_DEFAULT_PATH", logs)  # MindFormers opens its logs when it is imported
        return _run(target, device_id)


def _run(target: str, device_id: int) -> int:
    try:
        from glm_ms.selfcheck.device import run_checks, set_device  # seconds of imports

        set_device(target, device_id)
        return 0 if run_checks(_GOLDEN, print_line) else 1
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        for line in error_lines(error):
            print(line, file=sys.stderr)
        return 1


def print_line(line: str) -> None:
    """Prints without buffering: a card takes minutes to compile everything."""
    print(line, flush=True)


def _device_id(parser: argparse.ArgumentParser, target: str, wanted: int | None, cards: list[str]) -> int:
    """The number of the card; ends the program if there is no such card."""
    if target == "CPU":
        if wanted is not None:
            parser.error(f"--device_id {wanted}: a CPU has no number; add --device_target Ascend")
        return 0
    if not cards:
        parser.error(
            "--device_target Ascend: this machine has no Ascend card (no /dev/davinci*); a container must be started "
            "with access to the cards"
        )
    numbers = [int(name[len("davinci") :]) for name in cards]
    if wanted is not None and wanted not in numbers:
        parser.error(f"--device_id {wanted}: the cards here are {', '.join(map(str, numbers))}")
    return numbers[0] if wanted is None else wanted


if __name__ == "__main__":
    sys.exit(main())
