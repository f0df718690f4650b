"""The data set tool: what it prints for each loader and tokenizer, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece


@pytest.fixture(scope="module")
def tool(repository):
    path = repository / "tools" / "inspect_dataset.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory, repository):
    """A small vocabulary of the sample."""
    folder = tmp_path_factory.mktemp("vocabulary")
    source = repository / "configs" / "tiny" / "sample" / "train.json"
    sentencepiece.SentencePieceTrainer.Train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=600, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        minloglevel=2, num_threads=1
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def inspect(tool, vocabulary, repository, monkeypatch, capsys):
    """inspect(config, *arguments): exit status, stdout, stderr."""
    monkeypatch.chdir(repository)

    def run(config, *arguments):
        line = ["--config", f"configs/{config}.yaml", *map(str, arguments)]
        if not any(item.startswith("processor.tokenizer.vocab_file=") for item in line):
            line.append(f"processor.tokenizer.vocab_file={vocabulary}")
        status = tool.main(line)
        return status, *capsys.readouterr()

    return run


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


SAMPLE = "train_dataset.data_loader.dataset_dir=configs/tiny/sample/"


@pytest.mark.parametrize(
    ("config", "arguments", "number", "loader"),
    [
        ("tiny/finetune_glm2_tiny", [], 1200, "ADGenDataLoader, ChatGLM2Tokenizer"),
        ("tiny/finetune_glm3_tiny", [], 1200, "ADGenDataLoader, ChatGLM3Tokenizer"),
        ("tiny/finetune_glm3_tiny", ["--part", "eval"], 60, "ADGenDataLoader, ChatGLM3Tokenizer"),
        ("tiny/eval_glm3_tiny", [], 60, "ADGenDataLoader, ChatGLM3Tokenizer"),
        ("tiny/multiturn_glm3_tiny", [], 120, "ToolAlpacaDataLoader, ChatGLM3Tokenizer"),
        ("tiny/multiturn_glm3_tiny", ["--part", "eval"], 16, "ToolAlpacaDataLoader, ChatGLM3Tokenizer"),
    ],
)
def test_the_sample(inspect, config, arguments, number, loader):
    status, out, _ = inspect(config, *arguments)
    assert status == 0
    assert out.splitlines()[0].endswith(f": {number:,} records, {loader}")
    counts = re.findall(r"^ *[\d,]+ - [\d,]+ +([\d,]+)  ?█*$", out, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in counts) == number
    assert "anything cut" in out
    assert out.count("tokens without loss, ") == 3
    assert "LOSS | " in out
    # The advice can be given back, and then nothing is cut.
    advice = re.search(r"cuts nothing +\d+ +(.*)", out)[1].split()
    status, out, err = inspect(config, *arguments, *advice, "--num_records", 0)
    assert status == 0
    assert re.search(r"anything cut +0 +0\.00%", out)
    assert "LOSS" not in out
    assert "must equal" not in err


def test_conversations(inspect, tmp_path):
    answer = {"role": "assistant", "content": "百搭"}
    records = [
        {"conversations": [{"role": "user", "content": "颜色" * n}, answer, {"role": "user", "content": "x"}, answer]}
        for n in range(1, 30)
    ]  # fmt: skip
    path = write(tmp_path / "chat.json", records)
    status, out, err = inspect(
        "tiny/finetune_glm3_tiny", "--train_dataset", path, "--num_records", 1,
        "train_dataset.data_loader.type=ConversationDataLoader", "train_dataset.max_target_length=8"
    )  # fmt: skip
    assert status == 0
    assert "29 records, ConversationDataLoader, ChatGLM3Tokenizer" in out
    assert "cut at max_source_length + max_target_length + 1 = 73" in out
    # A length that does not fit the network is a remark here, not an error.
    assert "note: model.model_config.seq_length: 128 must equal" in err
    assert out.count("LOSS | ") >= 3


def test_a_record_without_a_label_is_pointed_out(inspect, tmp_path):
    path = write(tmp_path / "x.json", [{"content": "颜色" * 300, "summary": "x"}, {"content": "a", "summary": "b"}])
    status, out, _ = inspect("tiny/finetune_glm3_tiny", "--train_dataset", path)
    assert status == 0
    assert "no label left" in out
    assert "NO LABEL IS LEFT, training skips it" in out
    assert "cut: " in out


def test_picture(inspect, tmp_path):
    status, out, _ = inspect("tiny/multiturn_glm3_tiny", "--png", tmp_path / "new" / "x.png", "--num_records", 0)
    assert status == 0
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert f"{tmp_path}/new/x.png: histograms" in out


def test_a_picture_of_a_file_with_a_chinese_name(inspect, tmp_path, recwarn):
    path = write(tmp_path / "文案.json", [{"content": "a", "summary": "b"}])
    status, _, _ = inspect("tiny/finetune_glm3_tiny", "--train_dataset", path, "--png", tmp_path / "x.png")
    assert status == 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_bad_records(inspect, tmp_path):
    good = {"content": "a", "summary": "b"}
    path = write(tmp_path / "x.json", [good, {"content": 5, "summary": "b"}, "x", good, {"content": "", "summary": ""}])
    status, out, err = inspect("tiny/finetune_glm3_tiny", "--train_dataset", path)
    assert (status, out) == (1, "")
    assert f"error: {path}:2: column 'content' must be a string" in err
    status, out, err = inspect("tiny/finetune_glm3_tiny", "--train_dataset", path, "--skip_bad")
    assert status == 0
    assert "2 records, ADGenDataLoader" in out
    assert "1 more are skipped, with an empty prompt or response" in out
    assert f"skipped: {path}:2: " in err
    assert f"skipped: {path}:3: " in err
    assert "2 malformed records skipped; training stops at the first one" in err
    assert "x.json:4: " in out
    write(path, [5] * 50 + [good])
    status, _, err = inspect("tiny/finetune_glm3_tiny", "--train_dataset", path, "--skip_bad")
    assert status == 0
    assert "skipped: ... and 30 more" in err
    write(path, [])
    assert inspect("tiny/finetune_glm3_tiny", "--train_dataset", path)[0] == 1


def test_context_and_other_columns(inspect, tmp_path):
    path = tmp_path / "x.json"
    record = {"prompt": "类型#裙", "response": "裙", "history": [["类型#裤", "裤"]], "id": 7}
    write(path, [record])
    columns = "train_dataset.data_loader.origin_columns=[prompt,response{}]"
    status, out, _ = inspect("tiny/finetune_glm2_tiny", "--train_dataset", path, columns.format(",history"))
    assert status == 0
    assert "[Round 2]" in out
    assert "not used: column 'id'" in out
    status, _, err = inspect("tiny/finetune_glm2_tiny", "--train_dataset", path, columns.format(""))
    assert (status, err) == (
        1,
        f"error: {path}:1: column 'history' is not used; name it as the third of origin_columns, or "
        "history_column: history (below data_loader), or remove it\n",
    )
    write(path, [{"content": "类型#裙", "summary": "裙"}])
    status, out, _ = inspect("tiny/finetune_glm3_tiny", "--train_dataset", path, "processor.tokenizer.template=plain")
    assert status == 0
    assert "<|user|>" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_records", "-1"], "--num_records -1: must not be negative"),
        (["--num_record", "2"], "--num_record: unknown flag"),
        (["--train_datset", "x"], "--train_datset: unknown flag; did you mean --train_dataset"),
        (["--train_dataset", "absent.json"], "absent.json: no such file or folder"),
        (["train_dataset.max_source=3"], "unknown key; did you mean max_source_length"),
        (["train_dataset.max_source_length=x"], "max_source_length: expected a whole number"),
        (["model.model_config.seq_length=x"], "seq_length: expected a whole number"),
        (["train_dataset.data_loader.type=ToolAlpaca"], "did you mean ToolAlpacaDataLoader"),
        (["--png", "configs"], "--png configs: is a folder"),
        (["processor.tokenizer.vocab_file=absent"], "absent: no such file; give the tokenizer.model"),
        (
            ["processor.tokenizer.template=plain", "train_dataset.data_loader.type=ConversationDataLoader"],
            "ConversationDataLoader has messages with roles, but processor.tokenizer.template is plain",
        ),
        (
            ["processor.tokenizer.type=ChatGLM2Tokenizer", "train_dataset.data_loader.type=ConversationDataLoader"],
            "ConversationDataLoader needs processor.tokenizer.type: ChatGLM3Tokenizer",
        ),
    ]
)  # fmt: skip
def test_settings_that_cannot_be_used(inspect, arguments, message):
    status, out, err = inspect("tiny/finetune_glm3_tiny", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert all(line.startswith("inspect_dataset.py: error: ") for line in err.splitlines())


def test_wrong_usage(tool, capsys):
    for arguments in (
        [],
        ["--config", "x.yaml", "--part", "dev"],
        ["--config", "x.yaml", "--num_records", "two"],
    ):
        with pytest.raises(SystemExit) as caught:
            tool.main(arguments)
        assert caught.value.code == 2
    assert tool.main(["--config", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_command_line(repository, vocabulary, tmp_path):
    """Neither weights nor MindSpore are needed, and a reader that has seen enough is no error."""
    program = [sys.executable, "-X", "importtime", str(repository / "tools" / "inspect_dataset.py")]
    line = [
        *program, "--config", str(repository / "configs/tiny/lora_glm3_tiny.yaml"),
        "--train_dataset", str(repository / "configs/tiny/sample/titles_train.json"),
        f"processor.tokenizer.vocab_file={vocabulary}",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "400 records" in done.stdout
    assert not re.search(r"\| +(mindspore|mindformers|matplotlib)$", done.stderr, re.MULTILINE)
    assert "\x1b[" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    piped = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    piped.stdout.readline()
    piped.stdout.close()
    err = piped.stderr.read()
    assert piped.wait(timeout=60) == 0
    assert "error: " not in err
    assert "Traceback" not in err


def test_genuine_records(tool, repository, vocab_file, adgen_file, capsys):
    line = [
        "--train_dataset",
        str(adgen_file),
        f"processor.tokenizer.vocab_file={vocab_file}",
        "--num_records",
        "1",
    ]
    for generation, cut in ((2, "184"), (3, "9")):
        config = repository / f"configs/glm{generation}/run_glm{generation}_6b_finetune_800T_A2_64G.yaml"
        assert tool.main(["--config", str(config), *line]) == 0
        out = capsys.readouterr().out
        assert "1,070 records" in out
        assert re.search(rf"anything cut +{cut} ", out)
        assert "类型#上衣*材质#牛仔布*颜色#白色" in out
