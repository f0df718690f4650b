"""Flags of the tools are given once, and not empty."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from glm_ms.storage.arguments import Parser, whole_number


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="tool")
    parser.add_argument("--output", "-o")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("files", nargs="*")
    return parser


def test_each_once(parser: Parser) -> None:
    options = parser.parse_intermixed_args(["a", "--output", "x", "--overwrite", "b"])
    assert (options.output, options.overwrite, options.files) == ("x", True, ["a", "b"])
    assert parser.parse_args(["-o", "x", "--", "--output", "--output"]).files == ["--output", "--output"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x", "--output=y"], "--output is given twice; remove one"),
        (["--overwrite", "--overwrite"], "--overwrite is given twice"),
        (["-o", "x", "--output", "x"], "--output is given twice, also as -o"),
        (["--outp", "x"], "unrecognized arguments: --outp"),
        (["--output", ""], "--output: empty; give a value (is a variable of the shell not set?)"),
        (["--output=", "a"], "--output: empty"),
        (["a", ""], "an argument: empty"),
        (["--output", "a\0b"], r"'a\x00b': an argument must be text without NUL characters"),
        (["--", "\0"], "must be text without NUL"),
        (["--output", Path("a")], "must be text"),
    ],
)
def test_twice_or_empty(parser: Parser, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_whole_numbers() -> None:
    number = whole_number(1, 10**9)
    assert [number(text) for text in ("1", "007", "1000000000")] == [1, 7, 10**9]
    for text in ("0", "-1", "1.0", "x", "", "\u0661", "10000000000", "9" * 5000):
        with pytest.raises(ArgumentTypeError, match="must be a whole number from 1 to 1000000000"):
            number(text)
