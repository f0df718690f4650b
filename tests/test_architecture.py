"""docs/architecture.md tells the truth: the hops to the loss, the tables, the examples."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
CONFIG = REPOSITORY / "configs" / "tiny" / "finetune_glm3_tiny.yaml"
MAX_HOPS = 4
# Runs run_glm.py; the first call of the loss prints the files of the stack.
STACK = """
import json, sys, traceback
from pathlib import Path
from glm_ms.model.loss import LabelledLoss, OutputLayerLoss

repository = Path(sys.argv[1])
names = ("construct", "of_targets")  # of_targets: batches without padding
originals = {(cell, name): getattr(cell, name) for cell in (LabelledLoss, OutputLayerLoss) for name in names}

def loss(name, self, *inputs):
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()[:-2]]
    for (cell, method), original in originals.items():
        setattr(cell, method, original)
    print(json.dumps([
        (path.relative_to(repository).as_posix(), name)
        for path, name in frames
        if repository in path.parents and "site-packages" not in path.parts
    ]))
    return getattr(self, name)(*inputs)

for cell, name in originals:
    setattr(cell, name, lambda self, *inputs, name=name: loss(name, self, *inputs))
import run_glm
sys.exit(run_glm.main(sys.argv[2:]))
"""


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables, headings left out, code marks removed."""
    lines = [line.strip("|").replace("`", "").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if not line[0].startswith("-")][1:]


def hops() -> list[tuple[str, str]]:
    """(file, function or class) of every hop, run_glm.py first."""
    return [(cells[1], cells[2]) for cells in rows(section("From the command line to the loss"))]


def test_the_hops_to_the_loss(tmp_path: Path):
    """One update in PyNative mode, where the stack at the loss has the frames of all callers."""
    sample, vocabulary = CONFIG.parent / "sample" / "train.json", tmp_path / "tokenizer.model"
    tool = [sys.executable, "tools/train_vocab.py", "--input", sample, "--columns", "content", "summary"]
    arguments = ["--vocab_size", "800", "--output", vocabulary]
    subprocess.run([*tool, *arguments], cwd=REPOSITORY, timeout=120, check=True, capture_output=True)
    lines = sample.read_text(encoding="utf-8").splitlines()[:2]
    records = tmp_path / "train.json"
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-c", STACK, REPOSITORY, "--config", CONFIG, "--output_dir", tmp_path / "run",
            "--train_dataset", records, f"processor.tokenizer.vocab_file={vocabulary}", "context.mode=1",
            "runner_config.max_steps=1", "runner_config.batch_size=2", "model.model_config.num_layers=1",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    frames = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    outside = ("-c", "glm_ms/program.py")  # the program above, and the decorator of `main`
    files = list(dict.fromkeys(file for file, _ in frames if file not in outside))
    documented = hops()
    assert files == [file for file, _ in documented]
    assert len(documented) - 1 <= MAX_HOPS


@pytest.mark.parametrize(("file", "name"), hops())
def test_the_hops_exist(file, name):
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE)


@pytest.mark.parametrize("cells", rows(section("How to add ...")), ids=lambda cells: cells[0])
def test_the_tables_exist(cells):
    _, file, table, key, example = cells
    assert re.search(rf"^{table}\b.* = \{{", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert table in (REPOSITORY / example).read_text(encoding="utf-8")
    if "." in key:
        reference = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
        assert f"`{key.rpartition('.')[2]}`" in reference


def test_the_examples_run():
    for program in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=120, check=True)
