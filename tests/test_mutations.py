"""Hundreds of mutated settings and records: each is refused by name, told, or used as written. No traceback."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_helpers import CONFIGS, DEV_RECORDS, TRAIN_RECORDS, load_script, write_small_vocabulary

from glm_ms.settings import Settings, SettingsError, load_settings
from glm_ms.settings.schema import leaf_keys

# YAML of a value -> what a reader may take it for. Every value may also be refused.
TEXTS: dict[str, tuple[Any, ...]] = {
    "010": ("010", 10), "1:30": ("1:30",), "0o17": ("0o17",), "0x10": ("0x10", 16), "1_000": ("1_000", 1000),
    "+3": (3, "+3"), "3": (3,), "-1": (-1,), "0": (0,), "2.5": (2.5,), "1e-3": (1e-3,), "1.e-3": (1e-3,), ".5": (0.5,),
    "1e400": (), ".inf": (), "-.inf": (), ".nan": (), "10000000000000000000000": (), "9" * 400: (),
    "True": (True,), "yes": (True, "yes"), "off": (False, "off"), "'True'": ("True",), "'3'": ("3",),
    "null": (None, ""), "~": (None, ""), "": (None, ""), "''": ("",), "None": (None, "None"), "abc": ("abc",),
    "[]": ([],), "{}": ({},), "[a, b]": (["a", "b"],), "[1, 2]": ([1, 2],), "{a: 1}": (), "[[1]]": (), "[null]": (),
    "!!int 3": (3,), "!!str 3": ("3",), "!!float 3": (3,), "!!bool maybe": (), "!!int ''": (), "!!float x": (),
    "!!set {a, b}": (), "!!binary aGk=": (), "!!map []": (), "!!seq {}": (), "!!null 3": (), "!!timestamp x": (),
    "!thing 3": (), "!!python/name:os.system": (), "2024-01-01": ("2024-01-01",), "2024-13-45": ("2024-13-45",),
    "&a [*a]": (), "*nowhere": (), "|\n  3": ("3\n", "3"), '"\\0"': ("\0",), '"\\ud800"': (), "\t3": (3,), "@x": (),
    "%x": (), "- 3": (), "a: b": (), "[": (), "'": (),
}  # fmt: skip
# What the files of the field write for "none".
NEUTRAL = {"0", "null", "~", "", "''", "None", "off"}
PLACE = "PLACE-OF-THE-VALUE"
NUM_VALUES, NUM_NAMES = 420, 120


def base_document() -> dict[str, Any]:
    document = yaml.safe_load((CONFIGS / "tiny" / "finetune_glm3_tiny.yaml").read_text(encoding="utf-8"))
    document["train_dataset"]["data_loader"]["dataset_dir"] = str(TRAIN_RECORDS)
    document["eval_dataset"]["data_loader"]["dataset_dir"] = str(DEV_RECORDS)
    return document


def with_value(key: str, text: str) -> str:
    """The document with a key set to a text of YAML."""
    document = base_document()
    *path, name = key.split(".")
    section = document
    for part in path:
        section = section.setdefault(part, {})
    section[name] = PLACE
    return yaml.safe_dump(document, allow_unicode=True).replace(PLACE, text)


def flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> value."""
    found, whole = {}, settings.to_dict()
    for key in leaf_keys():
        value = whole
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("base") / "run.yaml"
    path.write_text(yaml.safe_dump(base_document(), allow_unicode=True), encoding="utf-8")
    return flat(load_settings(path, check_files=False))


def outcome(path: Path, text: str, *overrides: str) -> Settings | SettingsError:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        return load_settings(path, overrides, check_files=False)
    except SettingsError as error:
        return error


def same(value: Any, meant: Any) -> bool:
    if isinstance(value, bool) or isinstance(meant, bool):
        return value is meant
    if isinstance(value, (int, float)) and isinstance(meant, (int, float)):
        return math.isclose(value, meant, rel_tol=1e-12)
    return value == meant or value == [meant]


def test_values(base: dict[str, Any], tmp_path: Path) -> None:
    """In a file or on the command line; an accepted one is what its text says. Nothing else changes without a note."""
    cases = [(key, text, place) for key in leaf_keys() for text in TEXTS for place in ("file", "command line")]
    whole, counts = yaml.safe_dump(base_document(), allow_unicode=True), Counter[str]()
    faults = []
    for key, text, place in random.Random(7).sample(cases, NUM_VALUES):
        try:
            if place == "file":
                found = outcome(tmp_path / "run.yaml", with_value(key, text))
            else:
                found = outcome(tmp_path / "run.yaml", whole, f"{key}={text}")
        except Exception as error:  # a traceback for the user
            faults.append(f"{key}: {text!r}: {type(error).__name__}: {error}")
            continue
        if isinstance(found, SettingsError):
            counts["refused"] += 1
            name = key.rpartition(".")[2]
            if not str(found).startswith((str(tmp_path), "command line")):
                faults.append(f"{key}: {text!r}: the message does not name the place: {found}")
            if name not in str(found) and "YAML" not in str(found) and "alias" not in str(found):
                faults.append(f"{key}: {text!r}: the message does not name the key: {found}")
            continue
        counts["accepted"] += 1
        values, told = flat(found), "\n".join(found.notes)
        no_effect = "used_with" in leaf_keys()[key].metadata and values[key] == base[key]
        as_written = any(same(values[key], meant) for meant in (*TEXTS[text], text)) or (
            text in NEUTRAL and (values[key] in (None, "", False) or no_effect)
        )
        if not as_written and key not in told:
            faults.append(f"{key}: {text!r} became {values[key]!r}")
        others = [other for other in base if other != key and values[other] != base[other] and other not in told]
        if others:
            faults.append(f"{key}: {text!r} changed {others}")
    assert not faults, "\n".join(faults)
    assert min(counts["refused"], counts["accepted"]) > NUM_VALUES // 20, counts


def misspelt(name: str, draw: random.Random) -> str:
    """A name with one letter left out, doubled, exchanged, or in another case."""
    i = draw.randrange(len(name) - 1)
    return draw.choice([
        name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], name.upper(), name + "s", name + " ",
        name[:i] + name[i + 1] + name[i] + name[i + 2 :], name.replace("_", "-"), "\u200b" + name,
    ])  # fmt: skip


def test_names(tmp_path: Path) -> None:
    """A key that does not exist, or that is given twice, is refused."""
    draw, keys = random.Random(8), list(leaf_keys())
    for _ in range(NUM_NAMES):
        key = draw.choice(keys)
        path, _, name = key.rpartition(".")
        wrong = misspelt(name, draw)
        text = with_value(key, "3").replace(f"{name}: 3", f'"{wrong}": 3')
        if wrong in (name, *(other.rpartition(".")[2] for other in keys if other.rpartition(".")[0] == path)):
            continue
        found = outcome(tmp_path / "run.yaml", text)
        assert isinstance(found, SettingsError), (key, wrong)
        assert wrong.strip().strip("\u200b") in str(found)
        twice = with_value(key, "3").replace(f"{name}: 3", f"{name}: 3\n{' ' * 2 * key.count('.')}{name}: 3", 1)
        found = outcome(tmp_path / "run.yaml", twice)
        assert isinstance(found, SettingsError), key
        assert f"{name} is given twice" in str(found)


MARK = "ZQXJ"
# Form of a record -> configuration whose data format reads it, and a record of one line.
RECORDS = {
    "finetune_glm3_tiny": {"content": "类型#裙", "summary": "蓝色的裙子。"},
    "finetune_glm2_tiny": {"content": "类型#裙", "summary": "蓝色的裙子。"},
    "multiturn_glm3_tiny": {
        "tools": [{"name": "look_up", "description": "颜色", "parameters": {}}],
        "conversations": [
            {"role": "user", "content": "什么颜色？"},
            {"role": "tool", "name": "look_up", "parameters": {"id": 3}, "observation": "蓝色"},
            {"role": "assistant", "content": "蓝色。"},
        ],
    },
}  # fmt: skip
NAMES = (
    "history", "system", "tools", "instruction", "input", "output", "prompt", "response", "query", "context", "images",
    "role", "content", "summary", "conversations", "messages", "name", "metadata", "observation", "parameters", "loss",
    "tool_calls", "function_call", "functions", "weight", "label", "Content", "sytem", "histroy", "id", "",
)  # fmt: skip
VALUES = (
    MARK, [MARK], [[MARK, MARK]], [[MARK]], {"a": MARK}, [{"role": "user", "content": MARK}],
    [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}], [{"name": MARK}],
    f'[{{"name": "{MARK}"}}]', [[[MARK]]], {"role": "system", "content": MARK}, f"<|user|>\n{MARK}", f"\ud800{MARK}",
)  # fmt: skip
NUM_RECORDS = 300


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def test_records(vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a record says is in its rows, or its key is named: by the refusal, or by a line."""
    draw, counts, faults = random.Random(9), Counter[str](), []
    inspect = load_script("tools/inspect_dataset.py").main
    path = tmp_path / "records.jsonl"
    for _ in range(NUM_RECORDS):
        config = draw.choice(list(RECORDS))
        record = copy.deepcopy(RECORDS[config])
        target, name, value = draw.choice(list(objects(record))), draw.choice(NAMES), draw.choice(VALUES)
        target[name] = value
        text = json.dumps(record, ensure_ascii="\ud800" in str(value))
        path.write_text(f"{text}\n", encoding="utf-8")
        line = [
            "--config",
            str(CONFIGS / "tiny" / f"{config}.yaml"),
            "--train_dataset",
            str(path),
            "--num_records",
            "1",
        ]
        status = inspect([*line, f"processor.tokenizer.vocab_file={vocabulary}"])
        shown = capsys.readouterr()
        counts[str(status)] += 1
        if status == 0 and MARK not in shown.out and repr(name) not in shown.out + shown.err:
            faults.append(f"{config}: {text}: not used, not told")
        if status != 0 and f"{path}:1" not in shown.err:
            faults.append(f"{config}: {text}: {shown.err}")
    assert not faults, "\n".join(faults)
    assert set(counts) == {"0", "1"}
    assert min(counts.values()) > NUM_RECORDS // 10, counts
