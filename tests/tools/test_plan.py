from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from legacy_yaml import legacy_yaml

from tools import plan

REPOSITORY = Path(__file__).resolve().parents[2]
FULL = "configs/glm3/run_glm3_6b_finetune_800_32G.yaml"
PREDICT = "configs/glm3/predict_glm3_6b_800_32G.yaml"
LORA = "configs/glm3/run_glm3_6b_lora_800_32G.yaml"
TINY = "configs/tiny/finetune_glm3_tiny.yaml"


def run(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.chdir(REPOSITORY)
    status = plan.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "tools/plan.py", "--config", FULL, "--cards", "8", "--memory", "32GB"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
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


# Arguments, and what is proposed.
PROPOSED = {
    "fewer rows": ((LORA, "--memory", "32GB", "runner_config.batch_size=512"), ("runner_config.batch_size=64",)),
    "fewer prompts": (
        (PREDICT, "--memory", "32GB", "predict_batch_size=512"),
        ("predict_batch_size=256",),
    ),
    "split weights, no evaluation": (
        (LORA, "--memory", "9GB"),
        ("parallel.parallel_mode=1", "do_eval=False", "checkpoint.best_metric=null"),
    ),
    "other number of cards": (
        (FULL, "--cards", "4", "--memory", "32GB", "runner_config.batch_size=64"),
        ("parallel_config.data_parallel=1", "parallel_config.model_parallel=4"),
    ),
    "one card": (
        (LORA, "--cards", "1", "--memory", "32GB", "runner_config.batch_size=512"),
        ("use_parallel=False", "parallel_config.data_parallel=1"),
    ),
    "rows of an evaluation": (
        (
            LORA, "--memory", "32GB", "eval_dataset.batch_size=8192", "generation.max_new_tokens=64",
            "metric.type=[ADGENMetric]", "checkpoint.best_metric=null", "parallel_config.data_parallel=1",
        ),
        ("eval_dataset.batch_size=",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROPOSED)
def test_what_it_proposes_fits(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = PROPOSED[name]
    status, out, err = run("--config", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert (status, err) == (3, "")
    proposed = next(line for line in out.splitlines() if line.startswith("  ") and "=" in line).split()
    for text in expected:
        assert any(one.startswith(text) for one in proposed), proposed
    # As the user would go on: the file and what was typed, with the proposal.
    keys = {one.partition("=")[0] for one in proposed}
    kept = [one for one in arguments if one.partition("=")[0] not in keys]
    status, out, _ = run("--config", *kept, *proposed, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    assert "fits:" in out
    assert "on " not in out.splitlines()[1], "the proposal leaves out what the number of cards needs"


def test_a_small_card_has_its_reserve_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The files' limit is for a larger card."""
    _, out, _ = run("--config", FULL, "--memory", "24GB", capsys=capsys, monkeypatch=monkeypatch)
    assert "of 22.00 GiB" in out
    assert "30GB is more than the card has" in out
    tiny = (TINY, "--memory", "1GB", "model.model_config.padded_vocab_size=3072")
    status, out, _ = run("--config", *tiny, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 3
    assert "-" not in next(line for line in out.splitlines() if line.startswith("does not fit"))


def test_legacy_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of MindFormers is planned as it is, and takes what is proposed in our names."""
    path = tmp_path / "legacy.yaml"
    path.write_text(legacy_yaml(), encoding="utf-8")
    line = (str(path), "--memory", "32GB", "use_parallel=True", "runner_config.batch_size=64")
    status, out, err = run("--config", *line, capsys=capsys, monkeypatch=monkeypatch)
    assert (status, err) == (3, "")
    assert "data_parallel 8" in out
    proposed = next(one for one in out.splitlines() if one.startswith("  recompute_config.recompute=True"))
    status, _, err = run("--config", *line, *proposed.split(), capsys=capsys, monkeypatch=monkeypatch)
    assert (status, err) == (0, "")


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


SERVER = {
    "fits": (("--slots", "16", "--context", "2048", "--memory", "32GB"), 0, "2,050 pages of 16 tokens", "fits: "),
    "too small": (("--slots", "64", "--memory", "16GB"), 3, "64 sequences at a time, each of up to", "does not fit: "),
    "on a CPU": (
        ("--device_target", "CPU", "--kv-cache", "float32"),
        0,
        "12,487,168,000 bytes",
        "8 sequences at a time",
    ),
    "adapters": (("--max-adapters", "4", "--max-lora-rank", "8"), 0, "LoRA matrices", "adapters"),
    "context": (
        ("--context", "99999"),
        2,
        "--context 99999: configs/glm3/predict_glm3_6b_800_32G.yaml has seq_leng",
        "",
    ),
    "a number": (("--slots", "0"), 2, "must be a whole number from 1 to", ""),
    "overrides": (("a.b=1",), 2, "--model: takes no key=value", ""),
}


@pytest.mark.parametrize("name", SERVER)
def test_plans_of_servers(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, status, *texts = SERVER[name]
    try:
        found, out, err = run("--model", PREDICT, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    except SystemExit as error:
        found, (out, err) = error.code, capsys.readouterr()
    assert found == status, out + err
    for text in texts:
        assert text in (out if status != 2 else err)


def test_a_cpu_without_kernels_has_weights_of_float32(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLM_MS_CPU_KERNELS", "0")
    found, out, err = run("--model", PREDICT, "--device_target", "CPU", capsys=capsys, monkeypatch=monkeypatch)
    assert found == 0, err
    assert "24,974,336,000 bytes" in out


def test_options_of_servers_need_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        run("--config", FULL, "--slots", "3", capsys=capsys, monkeypatch=monkeypatch)
    assert "--slots: is of a server, and needs --model" in capsys.readouterr().err
    found, _, err = run("--model", str(tmp_path), capsys=capsys, monkeypatch=monkeypatch)
    assert found == 2
    assert str(tmp_path) in err
