"""Results of `eval`, `predict` and `export` in the output folder: written as they come, continued, or moved aside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm_ms.engine.checkpoints.manifest import differences
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import Ranks
from glm_ms.quant import quantization
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_bytes, replace_text
from glm_ms.storage.errors import CheckpointError, DataError
from glm_ms.storage.fingerprint import weights_fingerprint
from glm_ms.storage.growing import GrowingFile, read_lines
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.lock import run_lock
from glm_ms.storage.readers import read_object
from glm_ms.storage.run_folder import MODE_IDENTITY, MODE_RESULTS, MODE_SETTINGS, move_aside, resolve_checkpoint


@contextmanager
def result_folder(settings: Settings, made_of: Mapping[str, Any], ranks: Ranks, say: Say) -> Iterator[None]:
    """Prepares the output folder for results, after every check has passed; the first rank does it.

    Earlier results are moved to `earlier_runs/N`. With `resume` they stay, if they are of the same job: weights,
    vocabulary, settings of the network and of generation, and `made_of`, JSON values that describe the records.

    Raises:
        CheckpointError: another process writes results there, or those to continue are of another job.
    """
    if not ranks.first:
        ranks.from_first(None)
        yield
        return
    folder, mode = Path(settings.output_dir), settings.run_mode
    with run_lock(folder, say, mode):
        identity = {**_identity(settings), **made_of}
        if settings.resume:
            _check_same_job(folder / MODE_IDENTITY.format(mode), identity)
        else:
            results = [path for name in MODE_RESULTS[mode] if (path := folder / name).exists()]
            if any(path.stat().st_size for path in results):
                about = [folder / name.format(mode) for name in (MODE_SETTINGS, MODE_IDENTITY)]
                aside = move_aside(folder, [*results, *(path for path in about if path.is_file())])
                say(f"earlier results in {folder} have been moved to {aside}")
        replace_text(folder / MODE_IDENTITY.format(mode), json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
        replace_text(folder / MODE_SETTINGS.format(mode), settings.to_yaml())
        ranks.from_first(None)
        yield


class ResultLines:
    """A file of results, a line for each, on the first rank; other ranks write nothing.

    A line is there whole or not at all, also after a kill.

    Args:
        fields: types of keys that every line has.

    Attributes:
        stored: lines that are there; the same on every rank.

    Raises:
        DataError: a line is damaged.
        WriteError: the file cannot be opened.
    """

    def __init__(self, path: Path, fields: Mapping[str, type], ranks: Ranks) -> None:
        self._file: GrowingFile | None = None
        stored: list[dict[str, Any]] = []
        if ranks.first:
            lines, damaged = read_lines(path, fields)
            if damaged:
                raise DataError(f"{path}:{damaged[0]}: damaged; start without resume, which moves the file aside")
            content = b"".join(line for line, _ in lines)
            if path.exists() and path.stat().st_size != len(content):
                replace_bytes(path, content)
            stored = [value for _, value in lines]
            self._file = GrowingFile(path)
        self.stored: list[dict[str, Any]] = ranks.from_first(stored)

    def append(self, value: Mapping[str, Any]) -> None:
        """Writes a line; raises WriteError."""
        if self._file is not None:
            self._file.append_lines(json.dumps(value, ensure_ascii=False))

    def __enter__(self) -> ResultLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _identity(settings: Settings) -> dict[str, Any]:
    """What determines the results, besides the records."""
    whole = settings.to_dict()
    whole["generation"].pop("prompt_lookup_num_tokens")  # of no influence on answers
    paths = {key: resolve_checkpoint(path) for key in ("load_checkpoint", "load_adapter") if (path := whole[key])}
    adapter = paths.get("load_adapter")
    configs = [adapter / name for name in ("adapter_config.json", "config.json")] if adapter else []
    return {
        **{key: weights_fingerprint(path) for key, path in paths.items()},
        "adapter_config": {path.name: file_sha256(path) for path in configs if path.is_file()},
        "vocabulary": file_sha256(Path(settings.processor.tokenizer.vocab_file)),
        "tokenizer": settings.processor.tokenizer.type,
        "template": settings.processor.tokenizer.template,
        "model_config": whole["model"]["model_config"],
        **{key: whole["model"][key] for key in ("quantization_bit", "quantization_group", "kv_cache")},
        "generation": whole["generation"],
        "seed": settings.seed,
        "batch_size": settings.batch_size(),
    }


def _in_full(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with the values that null means, and that keys have which an earlier version did not know."""
    known = Settings().to_dict()
    defaults = {"generation": known["generation"], "model_config": known["model"]["model_config"]}
    sections = {name: _filled(identity.get(name), values) for name, values in defaults.items()}
    bits, group = identity.get("quantization_bit"), identity.get("quantization_group")
    return {
        **identity,
        **sections,
        "quantization_group": None if bits is None else quantization(bits, group).group,
        "kv_cache": identity.get("kv_cache") or "float32",
    }


def _filled(section: Any, defaults: Mapping[str, Any]) -> Any:
    return {**defaults, **section} if isinstance(section, Mapping) else section


def _check_same_job(path: Path, identity: Mapping[str, Any]) -> None:
    then = read_object(path, CheckpointError, "no such file: there are no results to continue; start without resume")
    changed = differences(_in_full(then), _in_full(identity))
    if changed:
        raise CheckpointError(
            f"{path}: the results there are of another job ({'; '.join(changed)}); restore these settings, or start "
            "without resume, which moves the results aside"
        )
