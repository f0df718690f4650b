"""The command line: flags, overrides, help, exit status."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from glm_ms.settings import FLAGS, SettingsError, load_settings, parse_args
from glm_ms.settings.cli import FLAGS_GONE, build_parser, settings_from_command_line
from glm_ms.settings.reference import keys_help
from glm_ms.settings.schema import BATCH_SIZE_KEYS, leaf_keys

# Flag -> text typed, value it must have in the settings.
TYPED = {
    "run_mode": ("train", "train"),
    "load_checkpoint": ("data", "data"),
    "load_adapter": ("data", "data"),
    "train_dataset": ("data/dev.json", "data/dev.json"),
    "eval_dataset": ("data/train.json", "data/train.json"),
    "predict_data": ("类型#裙 # 1", "类型#裙 # 1"),
    "kv_cache": ("int8", "int8"),
    "device_target": ("Ascend", "Ascend"),
    "device_id": ("3", 3),
    "use_parallel": ("True", True),
    "output_dir": ("elsewhere", "elsewhere"),
    "resume_training": ("data", "data"),
    "resume": ("True", True),
    "do_eval": ("True", True),
    "epochs": ("4", 4),
    "batch_size": ("6", 6),
    "seed": ("11", 11),
}
# What a flag needs beside it.
COMPANIONS = {
    "resume": ["run_mode=eval", "load_checkpoint=data"],
    "load_adapter": ["load_checkpoint=data", "model.pet_config.pet_type=lora"],
}


def _get(settings: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        settings = getattr(settings, name)
    return settings


@pytest.mark.parametrize("name", list(FLAGS))
@pytest.mark.parametrize("form", ["--{} {}", "--{}={}"])
def test_every_flag_sets_its_key(name: str, form: str, config: Path) -> None:
    text, value = TYPED[name]
    tokens = [form.format(name, text)] if "=" in form else [f"--{name}", text]
    arguments = parse_args(["--config", str(config), *tokens])
    assert arguments == (str(config), {name: text}, [])
    settings = load_settings(arguments.config, COMPANIONS.get(name, []), arguments.flags)
    key = FLAGS[name].key or BATCH_SIZE_KEYS[settings.run_mode]
    assert _get(settings, key) == value
    assert settings.where(key) == f"command line (--{name} {text})"


def test_flags_take_text_literally(config: Path) -> None:
    for text in ("- a", "'quoted'", "key: value", "[1", "12", "a=b"):
        arguments = parse_args(["--config", str(config), "--predict_data", text, "--run_mode", "predict"])
        assert load_settings(config, flags=arguments.flags).predict_data == text


def test_values_that_begin_with_a_dash() -> None:
    arguments = parse_args(
        ["--config", "x", "--predict_data", "-5", "--load_checkpoint", "-", "--seed=-1", "--g.h", "-x"]
    )
    assert arguments.flags == {"predict_data": "-5", "load_checkpoint": "-", "seed": "-1"}
    assert arguments.overrides == ["g.h=-x"]


def test_flags_are_not_abbreviated() -> None:
    for name in ("predict", "train_data", "conf"):
        with pytest.raises(SettingsError, match=rf"--{name}: unknown flag; did you mean"):
            parse_args(["--config", "x", f"--{name}", "y"])


def test_overrides_in_every_form() -> None:
    arguments = parse_args(
        ["a.b=1", "--config=x.yaml", "--c.d=2", "--e.f", "3", "--epochs", "4", "seed=5", "--g.h", "-1"]
    )
    assert arguments.config == "x.yaml"
    assert arguments.overrides == ["a.b=1", "c.d=2", "e.f=3", "seed=5", "g.h=-1"]
    assert arguments.flags == {"epochs": "4"}


def test_flags_under_their_former_names(config: Path) -> None:
    arguments = parse_args(["--config", str(config), "--train_dataset_dir", "a", "--eval_dataset_dir=b"])
    assert arguments.flags == {"train_dataset": "a", "eval_dataset": "b"}
    former = {"train_dataset_dir", "eval_dataset_dir"}
    assert not former & (FLAGS.keys() | FLAGS_GONE.keys())
    assert not FLAGS.keys() & FLAGS_GONE.keys()
    assert all(f"--{name} PATH" in build_parser().format_help() for name in former)


def test_flags_that_may_stand_alone(config: Path) -> None:
    arguments = parse_args(["--config", str(config), "--resume_training", "seed=3", "--use_parallel", "--seed=4"])
    assert arguments.flags == {"resume_training": "True", "use_parallel": "True", "seed": "4"}
    assert arguments.overrides == ["seed=3"]
    assert parse_args(["--config", "x", "--use_parallel", "False"]).flags == {"use_parallel": "False"}
    assert load_settings(config, flags={"resume_training": "False"}).resume_training is False


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--config is missing"]),
        (["--config"], ["--config: a value must follow"]),
        (["--config", "--epochs", "2"], ["--config: a value must follow"]),
        (["--config", "x", "--epoch", "2"], ["--epoch: unknown flag; did you mean --epochs?"]),
        (["--config", "x", "--run-mode=eval"], ["did you mean --run_mode?"]),
        (["--config", "x", "--learning_rate", "1"], ["lr_schedule.learning_rate=VALUE"]),
        (["--config", "x", "--zzz"], ["--zzz: unknown flag; see --help"]),
        (["--config", "x", "--sink_mode", "True"], ["--sink_mode: unknown flag; every step"]),
        (["--config", "x", "--options", "seed=1"], ["--options: unknown flag; write the overrides alone"]),
        (
            ["--config", "x", "--train_dataset_dirs", "a"],
            ["did you mean --train_dataset_dir or --train_dataset?"],
        ),
        (["--config", "x", "--seed"], ["--seed: a value must follow"]),
        (["--config", "x", "--optimizer.eps"], ["--optimizer.eps: a value must follow"]),
        (["--config", "x", "train"], ["'train': unexpected"]),
        (["x.yaml"], ["did you mean --config x.yaml?"]),
        (["--config", "x", "-v"], ["'-v': unexpected"]),
        (["--config", "x", ""], ["'': unexpected"]),
        (
            ["--config", "a/x.yaml--run_mode", "eval"],
            ["--config: a space is missing, or quotes are too many; write a/x.yaml --run_mode"],
        ),
        (["--config=x.yml --run_mode eval --seed 3"], ["write x.yml --run_mode eval --seed 3"]),
        (["--config", "x", "--config=y"], ["--config is given twice"]),
        (["--config", "x", "--seed", "1", "--seed=1"], ["--seed is given twice; remove one"]),
        (["--config", "x", "--use_parallel", "--use_parallel", "True"], ["--use_parallel is given twice"]),
        (
            ["--config", "x", "--train_dataset", "a", "--train_dataset_dir", "b"],
            ["--train_dataset_dir is given twice, also as --train_dataset"],
        ),
        (["--config", "x", "optimizer.eps=1", "--optimizer.eps", "2"], ["optimizer.eps is given twice"]),
        (
            ["--config", "x", "optimizer.eps=1", "optimizer={weight_decay: 0, eps: 2}"],
            ["optimizer.eps is given twice, by optimizer.eps=1 and by optimizer={weight_decay: 0, eps: 2}"],
        ),
    ],
)
def test_wrong_command_lines(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_args(argv)
    for part in ["command line: ", *parts]:
        assert part in str(caught.value)


def test_several_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_args(["--epoch", "2", "--sed", "1", "oops"])
    assert len(caught.value.problems) == 4


def test_help_is_complete(repository: Path) -> None:
    text = build_parser().format_help()
    assert all(len(line) <= 110 for line in text.splitlines())
    words = " ".join(text.split())
    for name, (key, *_) in FLAGS.items():
        doc = FLAGS[name].about + (leaf_keys()[key].metadata["doc"] if key else "")
        assert re.search(rf"--{name}\b.*{re.escape(doc)}", words)
    for path in re.findall(r"configs/\S+\.yaml", text):
        assert (repository / path).is_file(), path
    for name in leaf_keys():
        assert f"{name} = " in keys_help()


@pytest.mark.parametrize(("flag", "part"), [("--help", "usage:"), ("-h", "usage:"), ("--help_keys", "seed = 0")])
def test_help_exits_with_0(flag: str, part: str, capsys: pytest.CaptureFixture) -> None:
    for read, argv in ((parse_args, ["--nonsense", flag]), (settings_from_command_line, [flag])):
        with pytest.raises(SystemExit) as caught:
            read(argv)
        assert caught.value.code == 0
        assert part in capsys.readouterr().out


def test_errors_exit_with_2_and_no_traceback(config: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--config", str(config), "runner_config.epoch=2", "--device_target", "Ascend", "--seed", "x"]
    with pytest.raises(SystemExit) as caught:
        settings_from_command_line(argv)
    assert caught.value.code == 2
    report = capsys.readouterr().err
    assert "did you mean epochs?" in report
    assert "--seed x" in report
    assert "Traceback" not in report
    assert all(line.startswith(("run_glm.py: error: ", "Try: ")) for line in report.splitlines())


def test_good_command_line(config: Path) -> None:
    settings = settings_from_command_line(["--config", str(config), "--epochs", "2", "seed=9"])
    assert (settings.runner_config.epochs, settings.seed) == (2, 9)


def test_two_dashes_are_a_value_behind_an_equals_sign() -> None:
    found = parse_args(["--config=--", "--predict_data=--", "--use_parallel=--", "a.b=--"])
    assert found == ("--", {"predict_data": "--", "use_parallel": "--"}, ["a.b=--"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--", "--epochs", "2"], ["--: unknown flag"]),
        (["--seed", "--epochs", "--foo"], ["--seed: a value must", "--epochs: a value must", "--foo: unknown flag"]),
        (["--foo", "--seed", "2", "bar"], ["--foo: unknown flag", "'bar': unexpected"]),
        (["--foo", "bar", "a.b=1"], ["--foo: unknown flag"]),
    ],
)
def test_each_word_that_cannot_be_used_is_a_problem(words: list[str], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_args(["--config", "x.yaml", *words])
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == len(parts)
    assert all(part in problem for part, problem in zip(parts, problems))


def test_help_comes_before_problems(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--predict_data", "--help"])
    assert "usage:" in capsys.readouterr().out
