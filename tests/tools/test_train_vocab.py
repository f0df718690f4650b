"""The vocabulary trainer: conventions of the genuine model, determinism, whole output, clear errors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import sentencepiece

from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer

RECORD = {"content": "类型#裙*颜色#白色", "summary": "这条白色连衣裙，尽显甜美气质。"}
AWKWARD = "  两个 blanks，12345 和\n\t换行 𠮷▅ end  "


@pytest.fixture(scope="module")
def tool(repository):
    spec = importlib.util.spec_from_file_location("train_vocab", repository / "tools" / "train_vocab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sample(repository):
    return repository / "configs" / "tiny" / "sample" / "train.json"


@pytest.fixture(scope="module")
def trained(tool, sample, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    tool.write_whole(path, tool.train_vocabulary(tool.read_texts(sample, ["content", "summary"]), 800))
    return path


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_command_line_is_quiet_and_names_the_result(repository, sample, tmp_path):
    output = tmp_path / "new" / "tokenizer.model"
    command = [sys.executable, "tools/train_vocab.py", "--input", str(sample), "--columns", "content", "summary",
               "--vocab_size", "800", "--output", str(output)]  # fmt: skip
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("800 pieces from 2400 texts")
    assert lines[1].startswith("49 characters, 31 pieces: ▁类型 # ")
    assert lines[-1] == f"written to {output}"
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer.model"]
    ordinary = write_lines(tmp_path / "ordinary", "x")
    assert output.stat().st_mode == ordinary.stat().st_mode


def test_equal_input_gives_equal_bytes(tool, sample, trained):
    again = tool.train_vocabulary(tool.read_texts(sample, ["content", "summary"]), 800)
    assert again == trained.read_bytes()


def test_pieces_follow_the_conventions(tool, trained):
    processor = tool.check_vocabulary(trained.read_bytes(), 800)
    assert [processor.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert not any(set("\n\r\t\0") & set(processor.id_to_piece(i)) for i in range(259, 800))
    assert processor.decode(processor.encode(AWKWARD)) == AWKWARD
    assert processor.encode("\n\t", out_type=str) == ["▁", "<0x0A>", "<0x09>"]
    assert processor.encode("09", out_type=str) == ["▁", "0", "9"]  # digits one by one
    prompt = processor.encode("[Round 1]\n\n问：答：", out_type=str)
    assert [piece for piece in prompt if piece.startswith("<0x")] == ["<0x0A>", "<0x0A>"]


def test_settings_are_those_of_the_genuine_model(trained, vocab_file):
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    ours, genuine = protobuf.ModelProto(), protobuf.ModelProto()
    ours.ParseFromString(trained.read_bytes())
    genuine.ParseFromString(vocab_file.read_bytes())
    bound_to_the_run = {
        "input", "model_prefix", "vocab_size", "num_threads", "max_sentence_length", "required_chars",
        "train_extremely_large_corpus",
    }  # fmt: skip
    for part in ("trainer_spec", "normalizer_spec", "denormalizer_spec"):
        for field in getattr(genuine, part).DESCRIPTOR.fields:
            if field.name not in bound_to_the_run:
                values = [getattr(getattr(model, part), field.name) for model in (ours, genuine)]
                assert values[0] == values[1], (part, field.name)
    kinds = [[piece.type for piece in model.pieces[:300]] for model in (ours, genuine)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("tokenizer_class", [ChatGLM2Tokenizer, ChatGLM3Tokenizer])
def test_tokenizers_work_with_it(tokenizer_class, trained, sample):
    tokenizer = tokenizer_class(str(trained))
    for line in sample.read_text(encoding="utf-8").splitlines()[:20]:
        text = json.loads(line)["summary"]
        ids = tokenizer(text)["input_ids"]
        assert text in tokenizer.decode(ids)
        assert ids[0] >= 800  # special tokens come after the vocabulary


def test_plain_text_and_several_files(tool, tmp_path):
    first = write_lines(tmp_path / "a.txt", "白色连衣裙", "", "第二行\t甜美气质")
    second = write_lines(tmp_path / "b.txt", "\ufeff黑色衬衫")
    assert tool.read_texts(first, []) == ["白色连衣裙", "第二行\t甜美气质"]
    output = tmp_path / "tokenizer.model"
    arguments = ["--input", str(first), str(second), "--vocab_size", "310", "--output", str(output)]
    assert tool.main(arguments) == 0
    assert sentencepiece.SentencePieceProcessor(model_file=str(output)).vocab_size() == 310


def test_long_lines_and_reserved_characters_are_not_lost(tool):
    model = tool.train_vocabulary(["裙" * 5 + "a " * 2500, "衬衫▅外套"], 290)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for character in "裙衬套":
        assert not processor.is_unknown(processor.piece_to_id(character))


def test_size_limits_named_in_errors_are_exact(tool, sample):
    texts = tool.read_texts(sample, ["content", "summary"])
    with pytest.raises(tool.VocabularyError, match="too large for this text; the largest possible is") as info:
        tool.train_vocabulary(texts, 100_000)
    largest = int(str(info.value).split("possible is ")[1].split()[0])
    assert tool.check_vocabulary(tool.train_vocabulary(texts, largest), largest)
    with pytest.raises(tool.VocabularyError, match=f"largest possible is {largest} "):
        tool.train_vocabulary(texts, largest + 1)
    with pytest.raises(tool.VocabularyError, match="too small; bytes, chat prompt") as info:
        tool.train_vocabulary(texts, 300)
    smallest = int(str(info.value).split(" take ")[1].split(";")[0])
    assert tool.check_vocabulary(tool.train_vocabulary(texts, smallest), smallest)
    with pytest.raises(tool.VocabularyError, match="too small"):
        tool.train_vocabulary(texts, smallest - 1)
    with pytest.raises(tool.VocabularyError, match="vocab_size=259: must be above 259"):
        tool.train_vocabulary(texts, 259)


def test_check_rejects_another_size(tool, trained):
    with pytest.raises(tool.VocabularyError, match="has 800 pieces"):
        tool.check_vocabulary(trained.read_bytes(), 801)


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        ([json.dumps(RECORD), '{"content": '], ["content"], r"data\.json:2: not valid JSON"),
        ([json.dumps(RECORD)], ["contents"], r"data\.json:1: no column 'contents'; did you mean content"),
        ([json.dumps(RECORD)], ["xyz"], r"no column 'xyz'; it has 'content', 'summary'"),
        (['{"content": 3}'], ["content"], r"column 'content' is int, expected a string"),
        (
            ['{"content": "\\ud800"}'],
            ["content"],
            r"data\.json:1: column 'content' has half of a surrogate",
        ),
        (["[1]"], ["content"], r"data\.json:1: expected a JSON object, found list"),
        (
            [json.dumps(RECORD)],
            [],
            r"has JSON lines; name the columns to read, as --columns content summary",
        ),
        (["", "  "], [], r"data\.json: has no text"),
        (['{"content": ""}'], ["content"], r"data\.json: has no text"),
    ],
)
def test_input_errors(tool, tmp_path, capsys, lines, columns, message):
    path = write_lines(tmp_path / "data.json", *lines)
    with pytest.raises(tool.VocabularyError, match=message):
        tool.read_texts(path, columns)
    output = tmp_path / "tokenizer.model"
    arguments = ["--input", str(path), "--vocab_size", "300", "--output", str(output)]
    assert tool.main([*arguments, "--columns", *columns] if columns else arguments) == 1
    assert capsys.readouterr().err.startswith("train_vocab: error: ")
    assert not output.exists()


def test_file_errors(tool, tmp_path, trained):
    with pytest.raises(tool.VocabularyError, match=r"missing\.txt: no such file"):
        tool.read_texts(tmp_path / "missing.txt", [])
    with pytest.raises(tool.VocabularyError, match=r"tokenizer\.model: has NUL bytes, so it is not text"):
        tool.read_texts(trained, [])
    occupied = write_lines(tmp_path / "file", "x")
    with pytest.raises(tool.VocabularyError, match="cannot be written"):
        tool.write_whole(occupied / "tokenizer.model", b"")
    with pytest.raises(tool.VocabularyError, match="character_coverage"):
        tool.train_vocabulary(["x"], 300, character_coverage=0)
    with pytest.raises(tool.VocabularyError, match="no text"):
        tool.train_vocabulary(["\n\t"], 300)
    output_folder = ["--input", str(occupied), "--vocab_size", "300", "--output", str(tmp_path)]
    assert tool.main(output_folder) == 1


def test_a_failed_write_leaves_the_old_file(tool, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(tool.VocabularyError, match="No space left"):
        tool.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["tokenizer.model"]
