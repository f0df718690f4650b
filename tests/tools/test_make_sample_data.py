"""The sample records: reproducible, synthetic in form, held-out records really held out, short enough."""

from __future__ import annotations

import importlib.util
import json

import pytest

from glm_ms.metrics import adgen_scores
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool(repository):
    return load(repository / "tools" / "make_sample_data.py")


@pytest.fixture(scope="module")
def sample(repository):
    return repository / "configs" / "tiny" / "sample"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def attributes_of(record):
    return [tuple(item.split("#")) for item in record["content"].split("*")]


def test_made_again_byte_for_byte(tool, sample, tmp_path, capsys):
    assert tool.main(["--output_dir", str(tmp_path / "again")]) == 0
    names = {path.name for path in sample.glob("*.json")}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (sample / name).read_bytes()
    assert "60 records written" in capsys.readouterr().out


def test_held_out_records_are_new_but_of_known_parts(sample):
    train, dev = read(sample / "train.json"), read(sample / "dev.json")
    assert (len(train), len(dev)) == (1200, 60)
    contents = {record["content"] for record in train}
    assert len(contents) == 1200
    assert not contents & {record["content"] for record in dev}
    known = {attribute for record in train for attribute in attributes_of(record)}
    assert {attribute for record in dev for attribute in attributes_of(record)} <= known


def test_adverts_mention_every_attribute(sample):
    for record in read(sample / "train.json") + read(sample / "dev.json"):
        assert list(record) == ["content", "summary"]
        assert 20 <= len(record["summary"]) <= 45
        for key, value in attributes_of(record):
            # "top" is the one class that its garments do not have in their names
            assert value in record["summary"] or (key, value) == ("类型", "上衣"), record
        assert record["summary"].endswith("。")


def test_another_seed_gives_other_garments(tool):
    first, second = (tool.make_sample(50, 10, seed) for seed in (0, 1))
    assert all(first[name] != second[name] for name in first)
    assert first == tool.make_sample(50, 10, 0)
    assert (len(first["train.json"]), len(first["dev.json"])) == (50, 10)


def test_copying_the_nearest_record_is_not_enough(sample):
    """A high score on the held-out records has to come from the rules, not from memory."""
    train = read(sample / "train.json")
    scores = []
    for record in read(sample / "dev.json"):
        wanted = set(attributes_of(record))
        nearest = max(train, key=lambda other: len(wanted & set(attributes_of(other))))
        scores.append(adgen_scores(nearest["summary"], record["summary"])["rouge-l"])
    assert sum(scores) / len(scores) < 90


def test_titles_hold_every_attribute_and_are_of_other_garments(sample):
    """The second task for the same prompts: what an adapter learns."""
    train, dev = read(sample / "titles_train.json"), read(sample / "titles_dev.json")
    assert (len(train), len(dev)) == (400, 40)
    contents = [record["content"] for record in train + dev]
    contents += [record["content"] for name in ("train", "dev") for record in read(sample / f"{name}.json")]
    assert len(contents) == len(set(contents))
    for record in train + dev:
        for key, value in attributes_of(record):
            assert value in record["summary"] or (key, value) == ("类型", "上衣"), record
        assert "。" not in record["summary"]


def test_conversations_show_the_whole_format(sample):
    """Roles, tools, calls and observations that belong together, the loss flag; answers that are right."""
    records = read(sample / "conversations_train.json") + read(sample / "conversations_dev.json")
    assert len(records) == 136
    plain = [record for record in records if "tools" not in record]
    assert 20 < len(plain) < 70
    for record in plain:
        roles = [message["role"] for message in record["conversations"]]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert [message.get("loss") for message in record["conversations"]] == [None, None, False, None, None]
    for record in records:
        if "tools" not in record:
            continue
        declared = {tool["name"]: set(tool["parameters"]) for tool in record["tools"]}
        roles = [message["role"] for message in record["conversations"]]
        assert roles == ["user", "assistant", "tool", "assistant", "user", "assistant"]
        asked, _, call, answer, wish, advert = record["conversations"]
        assert set(call["parameters"]) == declared[call["name"]]
        assert all(value in asked["content"] for value in call["parameters"].values())
        pieces = call["observation"]["pieces"]
        assert (f"有{pieces}" in answer["content"]) == (pieces > 0)
        assert call["parameters"]["color"] in advert["content"]
        assert f"颜色#{call['parameters']['color']}" in wish["content"]


@pytest.mark.parametrize("vocab_size", [700, 800, 1000])
def test_prompt_fits_in_64_tokens_and_advert_in_48(sample, repository, tmp_path, vocab_size):
    trainer = load(repository / "tools" / "train_vocab.py")
    texts = trainer.read_texts(sample / "train.json", ["content", "summary"])
    vocab_file = tmp_path / "tokenizer.model"
    trainer.write_whole(vocab_file, trainer.train_vocabulary(texts, vocab_size))
    glm2, glm3 = ChatGLM2Tokenizer(vocab_file), ChatGLM3Tokenizer(vocab_file)
    names = ("train", "dev", "titles_train", "titles_dev")
    for record in [record for name in names for record in read(sample / f"{name}.json")]:
        prompts = glm2(glm2.build_prompt(record["content"])), glm3.build_chat_input(record["content"])
        assert max(len(prompt["input_ids"]) for prompt in prompts) <= 64
        with_end = [*glm2.encode(record["summary"], add_special_tokens=False), glm2.eos_token_id]
        assert len(with_end) <= 48


@pytest.mark.parametrize(
    "arguments", [["--num_train", "0"], ["--num_dev", "-1"], ["--num_train", "60000"], ["--seed", "x"]]
)
def test_unusable_numbers(tool, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as info:
        tool.main(["--output_dir", str(tmp_path / "out"), *arguments])
    assert info.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_place_that_cannot_be_written(tool, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        tool.main(["--output_dir", str(tmp_path / "file" / "out")])
    assert "train.json: cannot be written: Not a directory" in capsys.readouterr().err
