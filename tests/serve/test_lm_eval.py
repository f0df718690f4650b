"""lm-eval against the server: the scores are those that the network gives in this process.

lm-eval is looked for in the interpreter that GLM_MS_LM_EVAL names, and else installed in an environment of the test.
"""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
from reference import fresh_golden_model
from serve.environments import python_with
from serve.service import running_server

from glm_ms.serve.auth import Keys
from glm_ms.serve.loading import build_engine
from glm_ms.serve.settings import ServeSettings

pytestmark = pytest.mark.slow
KEY = "key-of-the-test-0123456789"
LETTERS = "ABCD"
QUESTIONS = [  # in the form of C-Eval and of MMLU
    {"question": "下列颜色中最浅的是", "A": "白色", "B": "黑色", "C": "红色", "D": "条纹", "answer": "A"},
    {
        "question": "the quick brown fox jumps over",
        "A": "a cat",
        "B": "the lazy dog",
        "C": "hello",
        "D": "it",
        "answer": "B",
    },
    {"question": "which one is a greeting", "A": "fox", "B": "dog", "C": "over", "D": "hello there", "answer": "D"},
    {"question": "这款上衣的风格是", "A": "复杂", "B": "随意", "C": "简约大方", "D": "无", "answer": "C"},
    {"question": "how many legs has a dog", "A": "four", "B": "two", "C": "none", "D": "one", "answer": "A"},
]
SUMS = ["the fox has 2 dogs and 3 dogs more. how many?", "hello there, 7 minus 4?", "白色3件，红色5件，共几件？"]
CHOICE_TASK = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
    "doc_to_choice": list(LETTERS),
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SUM_TASK = {  # in the form of GSM8K
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def model():
    return fresh_golden_model("glm3_32k_tiny")


@pytest.fixture(scope="module")
def address(model, tokenizer):
    engine = build_engine(model, tokenizer, "tiny", {}, ServeSettings(slots=4, context=256))
    with running_server(engine, keys=Keys([KEY])) as found:
        yield found
    engine.scheduler.close()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return python_with(["lm-eval[api]"], "GLM_MS_LM_EVAL", tmp_path_factory.mktemp("lm_eval"))


def evaluate(python, folder, kind, url, tasks, *options):
    """Runs tasks, each with its records. Returns the results, and the samples of each task by their document."""
    for name, (task, records) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({**task, **files, "task": name}), encoding="utf-8")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY,
    }  # fmt: skip
    arguments = f"model=tiny,base_url={url},num_concurrent=1,max_retries=1,max_length=256"
    command = [
        python, "-m", "lm_eval", "--model", kind, "--model_args", ",".join((arguments, *options[:1])), *options[1:],
        "--tasks", ",".join(tasks), "--include_path", folder, "--output_path", folder / "out", "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for name in tasks:
        (lines,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def logprob_of(model, tokenizer, context, choice):
    """Log-probability of a choice after a context, both in the form of the base model."""
    given = tokenizer.encode(context)
    ids = tokenizer.encode(context + choice)
    scores = model([ids]).asnumpy()[0].astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    logprobs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return sum(logprobs[place - 1, ids[place]] for place in range(len(given), len(ids)))


def continued(model, tokenizer, ids):
    new = model.generate(ids, max_new_tokens=12, eos_token_id=tokenizer.stop_token_ids)[0][len(ids) :]
    return tokenizer.decode([token for token in new if token < tokenizer.vocab_size])


def test_completions(model, tokenizer, address, python, tmp_path):
    texts = {one: f"Question: {one}\nAnswer:" for one in SUMS}
    expected = {one: continued(model, tokenizer, tokenizer.encode(text)) for one, text in texts.items()}
    # One of the answers is wrong.
    records = [{"question": one, "answer": expected[one].strip() if place else "no"} for place, one in enumerate(SUMS)]
    tasks = {"choice": (CHOICE_TASK, QUESTIONS), "sums": (SUM_TASK, records)}
    found, samples = evaluate(
        python, tmp_path, "local-completions", f"{address}/v1/completions", tasks,
        f"tokenizer_backend=remote,tokenized_requests=False,auth_token={KEY}",
    )  # fmt: skip
    right = 0
    for row, question in zip(samples["choice"], QUESTIONS):
        options = "".join(f"{letter}. {question[letter]}\n" for letter in LETTERS)
        context = f"{question['question']}\n{options}答案："
        own = [logprob_of(model, tokenizer, context, letter) for letter in LETTERS]
        served = [float(one[0][0]) for one in row["resps"]]
        np.testing.assert_allclose(served, own, atol=1e-3)
        right += LETTERS[int(np.argmax(own))] == question["answer"]
    assert found["choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    for row, one in zip(samples["sums"], SUMS):
        assert row["resps"][0][0].strip() == expected[one].strip()
    assert found["sums"]["exact_match,none"] == pytest.approx(2 / 3)


def test_chat(model, tokenizer, address, python, tmp_path):
    prompts = {one: tokenizer.build_chat_input(f"Question: {one}\nAnswer:")["input_ids"] for one in SUMS}
    expected = {}
    for one, ids in prompts.items():
        parser = tokenizer.answer_parser()
        parts = [*parser.push(continued(model, tokenizer, ids)), *parser.close()]
        expected[one] = "".join(part.text for part in parts)
    records = [{"question": one, "answer": expected[one] if place else "no"} for place, one in enumerate(SUMS)]
    found, samples = evaluate(
        python, tmp_path, "local-chat-completions", f"{address}/v1/chat/completions", {"sums": (SUM_TASK, records)},
        "tokenizer_backend=None", "--apply_chat_template",
    )  # fmt: skip
    for row, one in zip(samples["sums"], SUMS):
        assert row["resps"][0][0] == expected[one]
    assert found["sums"]["exact_match,none"] == pytest.approx(2 / 3)
