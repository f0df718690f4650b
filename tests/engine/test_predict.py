"""--run_mode predict: every source of prompts, every way of decoding, what goes to which stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_helpers import DEV_RECORDS, TRAINED_NETWORK, read_jsonl, run_here, tiny_arguments
from marks import slow_unless

from glm_ms import ChatGLM3Tokenizer, GLMForCausalLM, load_pretrained
from glm_ms.settings import settings_from_command_line

PROMPTS = [record["content"] for record in read_jsonl(DEV_RECORDS)[:5]]
MAX_NEW_TOKENS = 24
SAMPLING = ("generation.do_sample=True", "generation.top_k=30", "generation.temperature=1.5", "seed=3")
BEAMS = ("generation.num_beams=3", "generation.length_penalty=0.6")


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(vocabulary)


@pytest.fixture(scope="module")
def model(trained: Path):
    return load_pretrained(trained)


@pytest.fixture
def predict(vocabulary: Path, trained: Path, model, tokenizer: ChatGLM3Tokenizer, tmp_path: Path):
    """Predicts with one model for all tests; returns predict_results.jsonl and the text shown."""
    from glm_ms.engine.predict import predict as predict_all

    def run(predict_data: object, *arguments: object, model: GLMForCausalLM = model) -> tuple[list, str]:
        (tmp_path / "out").mkdir(exist_ok=True)
        settings = settings_from_command_line(
            tiny_arguments(
                "predict", vocabulary, *TRAINED_NETWORK, "--predict_data", predict_data,
                "--output_dir", tmp_path / "out", "--load_checkpoint", trained,
                f"generation.max_new_tokens={MAX_NEW_TOKENS}", *arguments
            )
        )  # fmt: skip
        pieces: list[str] = []
        results = predict_all(settings, model, tokenizer, pieces.append, lambda _: None)
        lines = read_jsonl(tmp_path / "out" / "predict_results.jsonl")
        assert lines == [{"prompt": result.prompt, "answers": result.answers} for result in results]
        return lines, "".join(pieces)

    return run


def expected_answers(model, tokenizer: ChatGLM3Tokenizer, prompt: str, **options: object) -> list[str]:
    """Answers by `generate` itself, each prompt alone."""
    ids = tokenizer.build_chat_input(prompt)["input_ids"]
    stops = list(tokenizer.stop_token_ids)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": stops, "seed": 0, **options}
    texts = []
    for sequence in model.generate(ids, **options):
        answer = sequence[len(ids) :]
        texts.append(tokenizer.decode(answer[:-1] if answer[-1] in stops else answer).strip())
    return texts


def jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path


def test_whole_run(
    vocabulary: Path, trained: Path, model, tokenizer: ChatGLM3Tokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    line = tiny_arguments(
        "predict", vocabulary, *TRAINED_NETWORK, "--predict_data", PROMPTS[0], "--output_dir", tmp_path,
        "--load_checkpoint", trained, f"generation.max_new_tokens={MAX_NEW_TOKENS}"
    )  # fmt: skip
    assert run_here(line) == 0
    shown = capsys.readouterr()
    (expected,) = expected_answers(model, tokenizer, PROMPTS[0])
    assert len(expected) > 5
    assert shown.out.strip() == expected
    assert read_jsonl(tmp_path / "predict_results.jsonl") == [{"prompt": PROMPTS[0], "answers": [expected]}]
    assert "weights: " in shown.err
    assert f"answers: {tmp_path / 'predict_results.jsonl'}" in shown.err


def test_answers_are_shown_beside_their_prompts(predict, tmp_path: Path) -> None:
    results, shown = predict(jsonl(tmp_path / "prompts.jsonl", PROMPTS[:4]), "--batch_size", 3)
    assert [line["prompt"] for line in results] == PROMPTS[:4]
    assert shown == "".join(f"{line['prompt']}\n -> {line['answers'][0]}\n" for line in results)


def test_template_is_taken_as_it_is(predict) -> None:
    template = f"[gMASK]sop<|user|> \\n {PROMPTS[0]}<|assistant|>"  # as the shell passes it on
    plain, formatted = predict(PROMPTS[0])[0], predict(template)[0]
    assert plain[0]["answers"] == formatted[0]["answers"]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        (("generation.repetition_penalty=1.3",), {"repetition_penalty": 1.3}),
        (SAMPLING, {"do_sample": True, "top_k": 30, "temperature": 1.5, "seed": 3}),
        pytest.param(BEAMS, {"num_beams": 3, "length_penalty": 0.6}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "repetition_penalty", "sampling", "beams"],
)
def test_prompts_of_different_lengths_in_a_batch(
    predict, model, tokenizer: ChatGLM3Tokenizer, tmp_path: Path, arguments: tuple, options: dict
) -> None:
    prompts = [*PROMPTS[:2], "类型#裙", PROMPTS[3][:20]]
    lengths = {len(tokenizer.build_chat_input(prompt)["input_ids"]) for prompt in prompts}
    assert len(lengths) > 2
    results, _ = predict(jsonl(tmp_path / "prompts.jsonl", prompts), "predict_batch_size=3", *arguments)
    for prompt, line in zip(prompts, results):
        assert line == {"prompt": prompt, "answers": expected_answers(model, tokenizer, prompt, **options)}


@pytest.mark.slow
def test_several_answers(predict, model, tokenizer: ChatGLM3Tokenizer, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "prompts.jsonl", PROMPTS[:2])
    for arguments, options in (
        (BEAMS, {"num_beams": 3, "length_penalty": 0.6}),
        (SAMPLING, {"do_sample": True, "top_k": 30, "temperature": 1.5, "seed": 3}),
    ):
        results, shown = predict(file, "--batch_size", 2, *arguments, "generation.num_return_sequences=3")
        for prompt, line in zip(PROMPTS, results):
            assert line["answers"] == expected_answers(model, tokenizer, prompt, num_return_sequences=3, **options)
            assert len(set(line["answers"])) == 3
        assert shown.count(" -> ") == 6


@pytest.mark.parametrize("decoding", slow_unless([SAMPLING], [(), SAMPLING]), ids=["greedy", "sampling"])
def test_streaming_equals_the_batch(predict, tmp_path: Path, decoding: tuple) -> None:
    """A single prompt is streamed, two are not."""
    streamed, shown = predict(PROMPTS[1], *decoding)
    batch, _ = predict(jsonl(tmp_path / "prompts.jsonl", PROMPTS[:2]), "--batch_size", 2, *decoding)
    assert streamed[0] == batch[1]
    assert shown.rstrip("\n") == streamed[0]["answers"][0]


def test_an_empty_answer(predict, answering) -> None:
    (result,), shown = predict(PROMPTS[0], model=load_pretrained(answering("")))
    assert result["answers"] == [""]
    assert shown == "\n"


@pytest.mark.parametrize(
    ("predict_data", "arguments", "message"),
    [
        ("裙" * 300, (), "generation.max_new_tokens = 24"),
        ("x.jsonl", (), "x.jsonl:1: not valid JSON"),
        ("[gMASK]sop<|user|>a", (), "a message is written"),
        ("a", ("generation.num_beams=2", "generation.num_return_sequences=3"), "num_return_sequences"),
    ],
)
def test_errors_have_no_traceback(
    vocabulary: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], predict_data: str, arguments: tuple, message: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text("{")
    line = tiny_arguments(
        "predict", vocabulary, *TRAINED_NETWORK, "--predict_data", predict_data, "--load_checkpoint", trained,
        "--output_dir", "out", f"generation.max_new_tokens={MAX_NEW_TOKENS}", *arguments
    )  # fmt: skip
    try:
        status = run_here(line)
    except SystemExit as end:  # unusable settings
        status = end.code
    shown = capsys.readouterr()
    assert status in (1, 2)
    assert message in shown.err
    assert shown.out == ""
    assert not Path("out/predict_results.jsonl").exists()
