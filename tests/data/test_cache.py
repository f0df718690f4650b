"""Rows kept on disk: the same as those made on demand, whole or absent, made once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import adgen_encoder, adgen_rows, conversation_encoder, tool_encoder

from glm_ms.data import cache as module
from glm_ms.data import workers
from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import TrainDataset
from glm_ms.data.messages import MessageEncoder
from glm_ms.storage.errors import DataError

RECORDS = [
    {"content": "类型#上衣*颜色#白色", "summary": "白色的上衣，清新自然。"},
    {"content": "类型#裙", "summary": ""},
    {"content": "颜色" * 200, "summary": "白色"},
    {"content": "类型#裤*颜色#黑色", "summary": "黑色的裤子，百搭。\ue000"},
    {"content": None, "summary": "x"},
    {"content": "类型#裤", "summary": "百搭。" * 30},
] * 7


def chats():
    for number in range(20):
        answer = {"role": "assistant", "content": "百搭" * number}
        yield {"conversations": [{"role": "user", "content": "颜色" * number * 3}, answer]}


def caches(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if not item.name.startswith("."))


def same_rows(one: TrainDataset, other: TrainDataset) -> bool:
    assert len(one) == len(other) > 0
    return all(
        (one[i][name] == values).all() and values.dtype == one[i][name].dtype
        for i in range(len(one))
        for name, values in other[i].items()
    )


ENCODERS = {
    "adgen glm2": lambda glm2, glm3: adgen_encoder(glm2, max_source_length=16, max_target_length=24),
    "adgen glm2, padding": lambda glm2, glm3: adgen_encoder(glm2, ignore_pad_token_for_loss=False),
    "adgen glm3": lambda glm2, glm3: adgen_encoder(glm3, max_source_length=16, max_target_length=24),
    "conversations": lambda glm2, glm3: conversation_encoder(glm3, 24, 24),
    "tools": lambda glm2, glm3: tool_encoder(glm3, 48),
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("num_samples", [None, 3, 1000])
@pytest.mark.parametrize("as_array", [False, True])
def test_same_rows_with_and_without(kind, num_samples, as_array, glm2, glm3, records_file, tmp_path):
    records = RECORDS if kind.startswith("adgen") else list(chats())
    path = records_file(json.dumps(records, indent=1) if as_array else records)
    encoder = ENCODERS[kind](glm2, glm3)
    plain = TrainDataset(path, encoder, num_samples)
    for _ in range(2):  # made, and read again
        cached = TrainDataset(path, encoder, num_samples, CacheRequest(tmp_path / "cache"))
        assert same_rows(plain, cached)
        assert same_rows(pickle.loads(pickle.dumps(cached)), plain)
        assert (cached.skipped, cached.without_labels) == (plain.skipped, plain.without_labels)
        assert cached.describe().startswith(plain.describe())
        assert (cached[-1]["input_ids"] == plain[-1]["input_ids"]).all()
        with pytest.raises(IndexError):
            cached[len(cached)]
    (folder,) = caches(tmp_path / "cache")
    assert str(folder) in cached.describe()
    assert sorted(item.name for item in folder.iterdir()) == [
        "cache.json", "input_ids.npy", "labels.npy", "offsets.npy",
    ]  # fmt: skip
    assert np.load(folder / "input_ids.npy").dtype == np.int32
    assert len(np.load(folder / "offsets.npy")) == len(plain) + 1


def test_made_once(glm3, records_file, tmp_path, monkeypatch):
    path = records_file(RECORDS)
    request = CacheRequest(tmp_path / "cache")
    first = adgen_rows(path, glm3, cache=request)

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(module, "_write", refuse)
    monkeypatch.setattr(MessageEncoder, "train_ids", refuse)
    assert same_rows(adgen_rows(path, glm3, cache=request), first)


def test_all_that_decides_the_rows_decides_the_name(glm2, glm3, records_file, tmp_path):
    request = CacheRequest(tmp_path / "cache")
    path = records_file(RECORDS)
    other = records_file([*RECORDS, RECORDS[0]], "other.json")
    columns = records_file([{"a": "甲", "b": "乙", **RECORDS[0]}], "columns.json")
    made = [
        adgen_rows(path, glm3, cache=request),
        adgen_rows(path, glm2, cache=request),
        adgen_rows(path, glm2, ignore_pad_token_for_loss=False, cache=request),
        adgen_rows(path, glm3, max_source_length=65, cache=request),
        adgen_rows(path, glm3, max_target_length=65, cache=request),
        adgen_rows(path, glm3, num_samples=1, cache=request),
        adgen_rows(other, glm3, cache=request),
        adgen_rows(columns, glm3, cache=request),
        adgen_rows(columns, glm3, ("a", "b"), cache=request),
        adgen_rows(columns, glm3, system_column="a", cache=request),
        adgen_rows(path, type(glm3)(glm3.vocab_file, template="plain"), cache=request),
        adgen_rows(path, type(glm2)(glm2.vocab_file, template="plain"), cache=request),
    ]
    assert len(caches(tmp_path / "cache")) == len(made)
    # The same bytes under another name are the same records.
    shutil.copy(path, tmp_path / "copy.json")
    adgen_rows(tmp_path / "copy.json", glm3, cache=CacheRequest(tmp_path / "cache", num_workers=2))
    assert len(caches(tmp_path / "cache")) == len(made)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickled(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize("name", ["cache.json", "input_ids.npy", "labels.npy", "offsets.npy"])
@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _pickled, Path.unlink])
def test_a_damaged_cache_is_named_and_made_again(name, damage, glm3, records_file, tmp_path):
    if name == "cache.json" and damage is _flip:
        pytest.skip("white space")
    path, request = records_file(RECORDS), CacheRequest(tmp_path / "cache")
    first = adgen_rows(path, glm3, cache=request)
    (folder,) = caches(tmp_path / "cache")
    plain = adgen_rows(path, glm3)
    del first
    damage(folder / name)
    if name == "cache.json" and damage is _pickled:
        shutil.move(folder / "cache.json.npy", folder / "cache.json")
    said: list[str] = []
    assert same_rows(adgen_rows(path, glm3, cache=request, say=said.append), plain)
    assert len(said) == 1
    assert str(folder) in said[0]
    assert name in said[0]
    assert "is damaged" in said[0]
    assert "it is made again" in said[0]
    said.clear()
    assert same_rows(adgen_rows(path, glm3, cache=request, say=said.append), plain)
    assert said == []
    assert caches(tmp_path / "cache") == [folder]
    assert [item.suffix for item in (tmp_path / "cache").iterdir() if item != folder] == [".lock"]


def test_a_folder_that_cannot_be_used(glm3, records_file, tmp_path, monkeypatch):
    path = records_file(RECORDS)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=r"cache_dir: .*file.*: cannot be written: .*; choose another"):
            adgen_rows(path, glm3, cache=CacheRequest(folder))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._NpyWriter, "write", full)
    with pytest.raises(DataError, match="No space left on device; choose another folder"):
        adgen_rows(path, glm3, cache=CacheRequest(tmp_path / "cache"))
    assert caches(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob(".*.partial"))
    said = []
    monkeypatch.setattr(module, "staged", full)
    monkeypatch.setattr(workers, "_WORTH_PROCESSES", 0)
    with pytest.raises(DataError, match="No space left on device"):
        adgen_rows(path, glm3, cache=CacheRequest(tmp_path / "cache", 2), say=said.append)
    assert said == []


def test_files_do_not_depend_on_how_many_rows_are_written_together(glm3, records_file, tmp_path, monkeypatch):
    path = records_file(RECORDS)
    for waiting in (1, 100, 1 << 16):
        monkeypatch.setattr(module, "_WAITING", waiting)
        adgen_rows(path, glm3, cache=CacheRequest(tmp_path / str(waiting)))
    folders = [caches(tmp_path / str(waiting))[0] for waiting in (1, 100, 1 << 16)]
    for name in ("cache.json", "input_ids.npy", "labels.npy", "offsets.npy"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_a_missing_file_of_a_cache_is_named_once(glm3, records_file, tmp_path):
    adgen_rows(records_file(RECORDS), glm3, cache=CacheRequest(tmp_path / "cache"))
    (folder,) = caches(tmp_path / "cache")
    (folder / "labels.npy").unlink()
    with pytest.raises(DataError) as caught:
        module.CachedRows(folder)
    assert str(caught.value) == f"{folder / 'labels.npy'}: No such file or directory"


def test_faults_of_the_records_are_those_without_a_cache(glm3, records_file, tmp_path):
    cases = {
        "records.json": '{"content": "x"}',
        "broken.json": '{"content": "a", "summary": "b"}\n{"content',
        "array.json": '[{"content": "a", "summary": "b"}, {"content]',
        "empty.json": "",
        "unusable.json": json.dumps(RECORDS[1]),
        "none.json": None,
    }
    for name, text in cases.items():
        path = tmp_path / name if text is None else records_file(text, name)
        messages = []
        for cache in (None, CacheRequest(tmp_path / "cache")):
            with pytest.raises(DataError) as caught:
                adgen_rows(path, glm3, cache=cache)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert not (tmp_path / "cache").exists() or caches(tmp_path / "cache") == []


def test_num_samples_reads_no_further(glm3, records_file, tmp_path, monkeypatch):
    good = json.dumps(RECORDS[0])
    path = records_file(f"{good}\n{good}\nbroken\n")
    for batch in (1, 1 << 20):
        monkeypatch.setattr(workers, "_BATCH_BYTES", batch)
        request = CacheRequest(tmp_path / str(batch))
        assert len(adgen_rows(path, glm3, num_samples=2, cache=request)) == 2
        with pytest.raises(DataError, match=r"records\.json:3: not valid JSON"):
            adgen_rows(path, glm3, num_samples=3, cache=request)


# ---------------------------------------------------------------------- several processes

_PROGRAM = """
import sys
from pathlib import Path
{imports}
from data_helpers import adgen_rows
from glm_ms.data import workers
from glm_ms.data.cache import CacheRequest
from glm_ms.tokenizer import ChatGLM3Tokenizer

if __name__ == "__main__":
    path, vocabulary, cache = sys.argv[1:]
    workers._WORTH_PROCESSES, workers._BATCH_BYTES = 0, 2000
    rows = adgen_rows(path, ChatGLM3Tokenizer(vocabulary), cache=CacheRequest(cache, 2), say=print)
    print(len(rows), sum(int(row["labels"].sum()) for row in rows), flush=True)
"""


@pytest.fixture
def start(tmp_path, small_vocabulary, repository):
    """Starts a program that makes the cache of a file in two processes."""

    def start(path: Path, imports: str = "", program: str = _PROGRAM) -> subprocess.Popen:
        script = tmp_path / "program.py"
        script.write_text(program.format(imports=imports), encoding="utf-8")
        return subprocess.Popen(
            [sys.executable, str(script), str(path), str(small_vocabulary), str(tmp_path / "cache")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'tests'}"}
        )  # fmt: skip

    return start


def expected(path: Path, tokenizer) -> list[str]:
    rows = adgen_rows(path, tokenizer)
    return [str(len(rows)), str(sum(int(row["labels"].sum()) for row in rows))]


def test_two_programs_at_once_with_processes_of_their_own(start, records_file, glm3, tmp_path):
    path = records_file(RECORDS * 40)
    programs = [start(path), start(path)]
    for program in programs:
        out, err = program.communicate(timeout=120)
        assert program.returncode == 0, err
        assert out.splitlines()[-1].split() == expected(path, glm3)
    assert len(caches(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob(".*.partial"))


def _processes_with(text: str) -> list[int]:
    """Processes whose command line or environment holds a text."""
    found = []
    for item in Path("/proc").iterdir():
        if item.name.isdigit():
            try:
                content = (item / "environ").read_bytes() + (item / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in content:
                found.append(int(item.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_killed_program_leaves_neither_processes_nor_half_a_cache(start, records_file, glm3, tmp_path, monkeypatch):
    path = records_file(RECORDS * 1200)
    mark = f"cache-test-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("GLM_MS_TEST_MARK", mark)
    program = start(path)
    deadline = time.monotonic() + 60
    partial: list[Path] = []
    while not (partial and partial[0].stat().st_size > 20000) and time.monotonic() < deadline:
        partial = list(tmp_path.glob("cache/.*.partial/input_ids.npy"))
        time.sleep(0.01)
    assert partial, "the cache was never begun"
    assert len(_processes_with(mark) or [0]) > 1
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=60)
    monkeypatch.delenv("GLM_MS_TEST_MARK")
    while _processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes_with(mark) == []
    assert caches(tmp_path / "cache") == []
    assert list((tmp_path / "cache").glob(".*.partial"))  # what it had begun

    again = adgen_rows(path, glm3, cache=CacheRequest(tmp_path / "cache"))
    assert len(again) == len(adgen_rows(path, glm3))
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_a_script_without_a_guard_is_told_so(start, records_file):
    program = start(records_file(RECORDS), program=_PROGRAM.replace('if __name__ == "__main__":', "if True:"))
    _, err = program.communicate(timeout=120)
    assert program.returncode != 0
    assert 'has no `if __name__ == "__main__":`' in err
    assert "num_parallel_workers: 1" in err


@pytest.mark.slow
def test_processes_beside_mindspore(start, records_file, glm3):
    imports = "import mindspore as ms\nms.ops.add(ms.Tensor([1.0]), 1.0).asnumpy()"
    path = records_file(RECORDS * 40)
    program = start(path, imports)
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, err
    assert out.splitlines()[-1].split() == expected(path, glm3)
