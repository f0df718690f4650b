from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import plan

REPOSITORY = Path(__file__).resolve().parents[2]
FULL = "configs/glm3/run_glm3_6b_finetune_800_32G.yaml"
LORA = "configs/glm3/run_glm3_6b_lora_800_32G.yaml"
TINY = "configs/tiny/finetune_glm3_tiny.yaml"


def run(
    *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.chdir(REPOSITORY)
    status = plan.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "tools/plan.py", "--config", FULL, "--cards", "8", "--memory", "32GB"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6,243,584,000 parameters" in done.stdout
    assert "fits: 16.43 GiB of 30.00 GiB" in done.stdout
    assert "12,288 tokens" in done.stdout


CASES = {
    "too small": (
        (FULL, "--memory", "24GB", "recompute_config.parallel_optimizer_comm_recompute=False"),
        3,
        ("does not fit", "\n  recompute_config.parallel_optimizer_comm_recompute=True\n"),
    ),
    "other number of cards": ((FULL, "--cards", "4"), 0, ("4 cards: data_parallel 4",)),
    "one card": ((LORA, "--cards", "1"), 0, ("1 card:",)),
    "a batch that does not fit": (
        (LORA, "--memory", "32GB", "runner_config.batch_size=512"),
        3,
        ("runner_config.batch_size=",),
    ),
    "nothing fits": ((FULL, "--cards", "1", "--memory", "8GB"), 3, ("nothing near it fits",)),
    "no limit": ((FULL,), 0, ("in all",)),
    "predict": (("configs/glm3/predict_glm3_6b_800_32G.yaml",), 0, ("KV cache", "while prompts are read")),
    "auto vocabulary": ((TINY, "model.model_config.padded_vocab_size=3072"), 0, ("in all",)),
}


@pytest.mark.parametrize("name", CASES)
def test_plans(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, status, texts = CASES[name]
    found, out, err = run("--config", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert (found, err) == (status, "")
    for text in texts:
        assert text in out


def test_what_it_proposes_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = (LORA, "--memory", "32GB", "runner_config.batch_size=512")
    _, out, _ = run("--config", *line, capsys=capsys, monkeypatch=monkeypatch)
    proposed = out.splitlines()[-1].split()
    status, out, _ = run("--config", *line[:-1], *proposed, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    assert "fits:" in out


REFUSED = {
    "cards that cannot be split so": (
        ("configs/glm3/run_glm3_6b_finetune_2k_800_32G.yaml", "--cards", "12"),
        "12",
    ),
    "no file": (("missing.yaml",), "missing.yaml"),
    "not parallel": (("configs/glm3/predict_glm3_6b_800_32G.yaml", "--cards", "2"), "use_parallel"),
    "no vocabulary": ((TINY, "processor.tokenizer.vocab_file=none.model"), "padded_vocab_size=65024"),
    "unknown key": ((FULL, "runner_config.batchsize=3"), "batch_size"),
    "impossible split": (
        (FULL, "parallel_config.model_parallel=3", "parallel_config.data_parallel=1"),
        "divisible",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, text = REFUSED[name]
    status, out, err = run("--config", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert (status, out) == (2, "")
    assert text in err


@pytest.mark.parametrize("text", ["32", "GB", "-3GB", "0x2GB"])
def test_memory_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(["--config", FULL, f"--memory={text}"])
    assert caught.value.code == 2
    assert "32GB" in capsys.readouterr().err
