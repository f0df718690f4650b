"""tools/compare_finetuning.py: the split, steps that are not repeated, and the effect on genuine records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from engine_helpers import TRAIN_RECORDS, load_script

TOOL = load_script("tools/compare_finetuning.py")


def options(*arguments: object):
    return TOOL.build_parser().parse_args([str(argument) for argument in arguments])


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def comparison(tmp_path: Path):
    """Over the synthetic sample, with a vocabulary that is there."""
    vocabulary = tmp_path / "tokenizer.model"
    vocabulary.write_bytes(b"vocabulary")
    return TOOL.Comparison(
        options("--records", TRAIN_RECORDS, "--output_dir", tmp_path / "out", "--vocab_file", vocabulary)
    )


def test_the_parts_share_no_record(comparison) -> None:
    comparison.prepare()
    parts = {name: lines(comparison.folder / f"{name}.json") for name in ("base", "train", "held_out")}
    assert {name: len(part) for name, part in parts.items()} == {"base": 600, "train": 500, "held_out": 100}
    records = [json.dumps(record, sort_keys=True) for part in parts.values() for record in part]
    originals = [json.dumps(record, sort_keys=True) for record in lines(TRAIN_RECORDS)]
    assert sorted(records) == sorted(originals)
    assert records[:600] != originals[:600]


def test_too_few_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.json"
    few.write_text('{"content": "a", "summary": "b"}\n' * 50, encoding="utf-8")
    assert TOOL.main(["--records", str(few), "--output_dir", str(tmp_path / "out")]) == 1
    assert "50 records; more than 200 are needed" in capsys.readouterr().err
    assert TOOL.main(["--records", str(tmp_path / "none.json"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_step_is_not_repeated_and_a_failed_one_is(comparison, capsys: pytest.CaptureFixture[str]) -> None:
    comparison.folder.mkdir(parents=True)
    program = comparison.folder / "program.py"
    counter = comparison.folder / "counter"
    program.write_text(f"open({str(counter)!r}, 'a').write('x')\nimport sys\nsys.exit(len(sys.argv) > 2)\n")
    first = comparison._call("step", [str(program), "one"])
    assert comparison._call("step", [str(program), "one"]) == first
    assert counter.read_text() == "x"
    comparison._call("step", [str(program), "other"])
    assert counter.read_text() == "xx"
    for _ in range(2):
        with pytest.raises(TOOL.StepError, match=r"bad ended with status 1; see .*bad\.log"):
            comparison._call("bad", [str(program), "one", "two"])
    assert counter.read_text() == "xxxx"


@pytest.mark.slow
def test_every_way_lowers_held_out_perplexity(
    adgen_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the genuine records, from one pretrained base."""
    arguments = ["--records", str(adgen_file), "--output_dir", str(tmp_path)]
    assert TOOL.main([*arguments, "--pretrain_steps", "120", "--steps", "60"]) == 0
    table = capsys.readouterr().out
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in table.splitlines()[2:] if line.startswith("|")]
    assert [row[0].partition(",")[0] for row in rows] == ["the base as it is", "full", "LoRA", "P-Tuning v2"]
    perplexity = [float(row[4]) for row in rows]
    assert max(perplexity[1:]) < 0.5 * perplexity[0]
    trained = [int(row[1].replace(",", "")) for row in rows]
    assert 0 == trained[0] < max(trained[2:]) < 0.2 * trained[1]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    assert "Machine: " in table
