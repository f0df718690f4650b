"""`glm-ms bench` on the tiny geometry, and the parts that need no process of a subject."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_ms.bench import command
from glm_ms.bench.geometry import GEOMETRIES, geometry, matrix_elements
from glm_ms.bench.machine import Load, describe, read_bandwidth
from glm_ms.bench.measure import DECODE, PREFILL, TRAIN, Case, Group, Result, check_subject
from glm_ms.bench.plots import curves_of, draw
from glm_ms.bench.random_weights import random_tensor, random_weights, training_batch
from glm_ms.bench.report import memory_ratio, ratio, table, timing_table, warnings
from glm_ms.bench.scheduling import running_scheduler, schedule_timings
from glm_ms.bench.timings import Timing, chosen_tokenizer
from glm_ms.bench.workers import BenchError, NotMeasuredError, Worker
from glm_ms.convert.names import expected_shapes
from glm_ms.model.config import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = geometry("tiny", {}, 64)
MANY, TRAINING = ("decode", "batch", "context"), ("train", "train-lora")
PEER = os.environ.get("GLM_MS_PEER_PYTHON", sys.executable)


def result(subject: str, weights: str, *samples: float, case: Case | None = None, **values: float) -> Result:
    made = Result(case or Case(DECODE), subject, weights, 2, 2, list(samples), weight_bytes=1e9, bandwidth=1e10)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def group(results: list[Result]) -> Group:
    cases = list(dict.fromkeys(one.case for one in results))
    return Group(TINY, 2, [(one.subject, one.weights) for one in results], cases, "", results=results)


# Numbers


def test_ratios_compare_equal_weights_in_the_same_case() -> None:
    results = [
        result("glm_ms", "float32", 3, 1, 2), result("glm_ms", "int8", 1), result("torch", "float32", 4, 4, 5),
        result("llamacpp", "int8", 3), result("llamacpp", "int4", 1),
        result("torch", "bfloat16", 1, case=Case(PREFILL)),
    ]  # fmt: skip
    assert [ratio(one, results) for one in results] == [1, 1, 2, 3, 0.5, None]
    assert memory_ratio(results[0]) == 2 / (1e9 / 1e10)
    assert memory_ratio(results[5]) is None
    lines = table([group(results)])
    assert lines[4].split(" | ")[1:8] == ["torch", "float32", "4.00 s", "4.00 s to 5.00 s", "0.2", "2.00", "40.00"]


def test_quartiles_and_a_failed_program() -> None:
    assert result("torch", "float32", 1, 2, 3, 4, 5).spread == (2, 4)
    assert result("torch", "float32", 1, 9, 3).spread == (1, 9)
    failed = result("torch", "float32")
    failed.error = "no a|b"
    assert "no a/b" in table([group([failed])])[2]
    assert ratio(failed, [failed]) is None


def test_foreign_load_is_told() -> None:
    calm, disturbed = result("glm_ms", "float32", 1, foreign_load=0.01), result("torch", "float32", 1, foreign_load=0.3)
    assert warnings([group([calm])]) == []
    assert "up to 30% of the cores during 1 of 2 measurements" in warnings([group([calm, disturbed])])[0]
    assert "(disturbed)" in table([group([disturbed])])[2]
    times = [Timing("calm", [1.0], 0, 0.0), Timing("not calm", [1.0], 0, 0.3)]
    assert ["(disturbed)" in line for line in timing_table(times)[2:]] == [False, True]


def test_foreign_load_sees_a_program_that_is_not_ours() -> None:
    program = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as other:
        own, foreign = Load([other.pid]), Load([])
        try:
            other.wait(0.6)
        except subprocess.TimeoutExpired:
            assert (foreign.foreign() or 0) > (own.foreign() or 0)
        other.kill()


def test_bandwidth_and_machine() -> None:
    rates = read_bandwidth(2, 1 << 22)
    assert rates["best"] >= rates["median"] > 1e6
    machine = describe()
    assert machine["cores"] >= 1
    assert set(machine) >= {"processor", "instruction_sets", "memory_bytes", "date"}


# Networks, weights, batches


def test_geometries() -> None:
    assert geometry("w6b-l4", {}, 8193).seq_length == 16384
    assert geometry("tiny", {"num_layers": 5}, 1).num_layers == 5
    shapes = expected_shapes(geometry("m265", {}, 64))
    matrices = sum(np.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embedding" not in name)
    assert matrix_elements(geometry("m265", {}, 64)) == matrices
    assert {"6b", "w6b-l4", "m265", "tiny"} == set(GEOMETRIES)
    with pytest.raises(ConfigError, match=r"geometry 'm256': unknown; did you mean m265.*known: 6b"):
        geometry("m256", {}, 64)
    with pytest.raises(ConfigError, match="not a multiple"):
        geometry("tiny", {"num_attention_heads": 3}, 64)


def test_weights_depend_on_the_name_alone() -> None:
    weights = dict(random_weights(TINY))
    assert {name: value.shape for name, value in weights.items()} == expected_shapes(TINY)
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    assert (random_tensor(name, (128, 344)) == weights[name]).all()
    assert abs(weights[name].std() - 0.02) < 1e-3
    norm = weights["transformer.encoder.final_layernorm.weight"]
    assert abs(norm.mean() - 1) < 0.01


def test_training_batches() -> None:
    ids, labels, mask = training_batch(TINY, 4, 200, 1.0, 1.0)
    assert (labels == ids).all()
    assert mask.all()
    ids, labels, mask = training_batch(TINY, 4, 200, 0.64, 0.41)
    assert Case(TRAIN, 4, 200, used=0.64, labelled=0.41).tokens_of_sample == mask.sum()
    assert abs(mask.sum() / 800 - 0.64) < 0.01
    assert abs((labels >= 0).sum() / 800 - 0.41) < 0.01
    assert ids.shape[1] == mask.sum(1).max() < 200
    assert len(set(mask.sum(1).tolist())) == 4
    assert (labels[mask == 0] == -100).all()


# The command line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("decode --length 8", "--length: has no effect here; it is for prefill, train, train-lora"),
        ("schedule --weights int4", "--weights: has no effect here; it is for modes with a network"),
        ("decode --peer-python x", "--peer-python: has no effect without --against"),
        ("start --threads 1", "--threads: has no effect here; it is for modes with a network"),
        ("decode --used 0.5", "--used, --labelled: are for train and train-lora"),
        ("train --used 0.5", "padding has no labels"),
        ("decode --threads 100000", "--threads 100000: this process may use"),
        ("decode --rows 0", "must be a whole number from 1"),
        ("decode --layers 1 2 --num_layers 3", "give one of them"),
        ("decod", "invalid choice: 'decod'"),
        ("train --weights int8", "--weights int8: glm_ms does not train int8 weights here; it trains float32, amp"),
        ("decode --weights float32 amp", "--weights amp: glm_ms does not run amp weights here; it runs float32, bf"),
        (
            "train --against llamacpp",
            "--against llamacpp: llamacpp does not train float32 weights here; it trains no",
        ),
        (
            "load prefill --against torch:amp",
            "torch does not load amp weights here; it loads float32, bfloat16; torc",
        ),
    ],
)
def test_wrong_usage(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(line.split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("decode --geometry tinny", "geometry 'tinny': unknown; did you mean tiny"),
        ("decode --against tensorflow", "tensorflow: unknown program; known: torch, llamacpp, openvino"),
        ("decode --against torch:int4", "torch has no such weights; it has float32, bfloat16"),
        ("decode --geometry 6b --num_layers 1000", "do not fit in"),
        ("tokenise --tokenizer nowhere", "nowhere"),
    ],
)
def test_refusals(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(line.split()) == 1
    assert words in capsys.readouterr().err


def test_outputs_are_tried_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Group, "run", lambda self: pytest.fail("measures"))
    (tmp_path / "file").write_text("kept")
    for line, words in {
        "--json {0}/file/b.json": "is a file, not a folder",
        "--table {0}": "is a folder, but a file is to be written",
        "--plot /proc/nothing/c.png --context 8 16": "/proc/nothing: ",
        "--work-dir {0}/file": "is a file, not a folder",
        "--json {0}/a --table {0}/../{1}/a": "is the file of --json and --table; give each its own",
        "--plot {0}/c.png": "nothing to plot: decode, batch or context needs several values of --context",
    }.items():
        assert command.main(["decode", *line.format(tmp_path, tmp_path.name).split()]) == 1
        assert words in capsys.readouterr().err, line
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_that_is_lost_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Group) -> None:
        self.results.append(result("glm_ms", "float32", 2, case=self.cases[0]))
        (tmp_path / "a.json").mkdir()  # somebody takes the name meanwhile

    monkeypatch.setattr(Group, "run", run)
    assert command.main(["decode", "--json", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md")]) == 1
    assert "| 2.00 s |" in (tmp_path / "a.md").read_text(encoding="utf-8")
    printed = capsys.readouterr()
    assert "error: --json: " in printed.err
    assert "| 2.00 s |" in printed.out


def test_an_interrupt_keeps_the_rounds_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds, and an interrupt in the third one."""
    worker: Any = SimpleNamespace(
        name="glm_ms:float32", subject="glm_ms", weights="float32", peak_memory=1,
        process=SimpleNamespace(pid=os.getpid()),
    )  # fmt: skip
    times = iter([1.0, 3.0])

    def sample(worker: Worker, case: Case) -> list[float]:
        value = next(times, None)
        if value is None:
            raise KeyboardInterrupt
        return [value]

    made = group([result("glm_ms", "float32", 1)])
    made.results = []
    with pytest.raises(KeyboardInterrupt):
        made._take_turns(Case(DECODE), [worker], lambda worker, case: None, sample)
    assert made.results[0].samples == [1, 3]


def test_cases_of_modes() -> None:
    options = command.build_parser().parse_args(
        ["decode", "batch", "context", "--rows", "1", "2", "--context", "64", "128"]
    )
    assert len(command.cases(options)) == 4  # each once
    options = command.build_parser().parse_args(
        ["train", "train-lora", "--length", "32", "--used", "0.5", "--labelled", "0.25"]
    )
    assert command.cases(options) == [Case(TRAIN, 4, 32, lora=lora, used=0.5, labelled=0.25) for lora in (False, True)]
    assert [pair for text in ("torch", "llamacpp:int8") for pair in check_subject(text)][-1] == ("llamacpp", "int8")


# Runs


def test_a_whole_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Decode and prefill of a tiny network, with a peer whose packages are missing."""
    line = "decode prefill --geometry tiny --num_layers 1 --rounds 2 --steps 3 --context 16 32 --length 16"
    files = {name: tmp_path / f"bench.{name}" for name in ("json", "table", "plot")}
    more = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert command.main([*line.split(), *more]) == 0
    printed = capfd.readouterr()
    values = json.loads(files["json"].read_text(encoding="utf-8"))
    assert values["schema"] == 1
    assert values["config"]["num_layers"] == 1
    assert [each["case"]["mode"] for each in values["results"]] == ["decode", "decode", "prefill"]
    for each in values["results"]:
        assert len(each["samples"]) == 2
        assert each["median"] > 0
        assert each["ratio"] == 1
        assert each["peak_memory"] > 1e8
        assert each["bandwidth"] > 0
    assert values["agreement"] == [{"layers": 1, "threads": values["results"][0]["threads"], "glm_ms:float32": 0.0}]
    assert "MindSpore" in values["versions"]["glm_ms"]
    assert files["table"].read_text(encoding="utf-8") == printed.out
    assert "| decode, 1 row, context 16 | glm_ms | float32 |" in printed.out
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_a_missing_package_is_named_and_others_go_on(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # without any package
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    worker = Worker("llamacpp", "int4", str(bare), [0])
    try:
        with pytest.raises(NotMeasuredError, match=r"python needs the packages llama_cpp .*--peer-python"):
            worker.call("prefill", length=1)
    finally:
        worker.end()
    with pytest.raises(BenchError, match="nowhere: cannot be run: No such file"):
        Worker("torch", "float32", "nowhere", [0])


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho some last words >&2\nexit 3\n")
    dying.chmod(0o755)
    worker = Worker("torch", "float32", str(dying), [0])
    try:
        with pytest.raises(NotMeasuredError, match="torch:float32: its process ended with status 3: some last words"):
            worker.call("prefill", length=1)
    finally:
        worker.end()


def test_curves_change_one_thing() -> None:
    results = [
        result("glm_ms", "float32", tokens / 100 + rows, case=Case(DECODE, rows, tokens))
        for rows in (1, 4) for tokens in (64, 256)
    ]  # fmt: skip
    curve = curves_of("context, tokens", results)["glm_ms:float32"]
    assert curve == [(64, pytest.approx(1640)), (256, pytest.approx(3560))]
    assert [x for x, _ in curves_of("rows", results)["glm_ms:float32"]] == [1, 4]
    assert curves_of("layers", results) == {}
    with pytest.raises(BenchError, match="nothing to plot"):
        draw([group(results[:1])], Path("never.png"))


PEERS = {
    "torch": ("torch, transformers", {"torch:float32": 1e-5, "torch:bfloat16": 0.1}),
    "llamacpp": ("llama_cpp", {"llamacpp:float32": 2e-3, "llamacpp:int8": 0.05}),
    "openvino": ("openvino", {"openvino:float32": 1e-5, "openvino:float16": 2e-3, "openvino:int8": 0.05}),
}


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_the_same_network(peer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    packages, allowed = PEERS[peer]
    if subprocess.run([PEER, "-c", f"import {packages}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{packages} is not installed for {PEER} (GLM_MS_PEER_PYTHON)")
    file = tmp_path / "bench.json"
    line = f"decode prefill load --rounds 1 --steps 4 --json {file} --against {peer} --peer-python {PEER}"
    assert command.main([*line.split(), "--ffn_hidden_size", "352", "--rows", "1", "3"]) == 0
    values = json.loads(file.read_text(encoding="utf-8"))
    for name, most in allowed.items():
        assert values["agreement"][0][name] < most, name
    assert all(each["samples"] for each in values["results"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", TRAINING)
def test_training_beside_torch(mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    if subprocess.run([PEER, "-c", "import torch, transformers"], capture_output=True, check=False).returncode:
        pytest.skip(f"torch or transformers is not installed for {PEER} (GLM_MS_PEER_PYTHON)")
    line = f"{mode} --weights float32 amp --rounds 1 --rows 1 --length 16 --against torch --peer-python {PEER}"
    assert command.main(line.split()) == 0
    assert "| glm_ms | amp |" in capfd.readouterr().out


def test_the_rounds_of_the_scheduler(tmp_path: Path) -> None:
    """Every round gives every row a token; greedy and sampled rows differ."""
    made = chosen_tokenizer(None, tmp_path)
    chosen = []
    for options in ({}, {"do_sample": True, "top_p": 0.8, "temperature": 0.8}):
        scheduler = running_scheduler(made, 3, dict(options), 5)
        before = scheduler.stats.generated_tokens
        for _ in range(5):
            assert scheduler.round()
        assert scheduler.stats.running == 3
        assert scheduler.stats.generated_tokens == before + 15
        chosen.append([run.rows[0].token for run in scheduler._active])
    assert chosen[0] != chosen[1]
    titles = [timing.title for timing in schedule_timings(None, [1, 2], 2, 2, tmp_path)]
    assert titles[:2] == ["schedule, 1 row, greedy", "schedule, 1 row, sampled, top_p 0.8"]
    assert len(titles) == 4


@pytest.mark.slow
def test_start_and_tokenise(capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main(["start", "tokenise", "--rounds", "1"]) == 0
    printed = capfd.readouterr().out
    for title in ("first token in Python", "glm-ms predict, 16 tokens", "encode, SentencePiece alone"):
        assert f"| {title} |" in printed


def test_an_interrupted_run_reports_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Group) -> None:
        self.results.append(result("glm_ms", "float32", 2, case=self.cases[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Group, "run", run)
    with pytest.raises(KeyboardInterrupt):
        command.main.__wrapped__(["decode", "--json", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["results"][0]["median"] == 2
    assert "| 2.00 s |" in capsys.readouterr().out
