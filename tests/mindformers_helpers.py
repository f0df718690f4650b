"""YAMLs of small runs for the tests of MindFormers' interfaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from engine_helpers import DEV_RECORDS, curve

QUESTION = "类型#裤*颜色#蓝色"
TEXT = "text_generation_text"


def set_key(document: dict[str, Any], key: str, value: Any) -> None:
    *outer, name = key.split(".")
    for part in outer:
        document = document.setdefault(part, {})
    document[name] = value


def yaml_of(run: Path, folder: Path, **changes: Any) -> str:
    """The settings of a run as a YAML in `folder`, which becomes the output folder; `a__b` stands for `a.b`."""
    document = yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
    set_key(document, "output_dir", str(folder))
    set_key(document, "eval_dataset.data_loader.dataset_dir", str(DEV_RECORDS))
    for key, value in changes.items():
        set_key(document, key.replace("__", "."), value)
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return str(path)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in curve(folder)]
