"""ToolAlpaca to conversations: the official form, every fault listed, all or nothing."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys

import pytest

from glm_ms.data.records import parse_tool_conversation

STEP = [
    [
        "getFacts",
        '{"category": "habitat", "limit": 3}',
        " I need facts.\nAction: getFacts\nAction Input: {...}",
    ],
    "Status Code: 200. Response: [...]",
]
INSTANCE = {
    "input": "Tell me facts.",
    "output": "Here are three facts.",
    "Final Thought": "I have what I need.",
    "intermediate_steps": [STEP],
}
RECORD = {
    "Name": "Axolotl",
    "Description": "facts",
    "NLDocumentation": "getFacts: Retrieve facts.\nParameters: {}\n",
    "Function_Description": {
        "getFacts": "Retrieve facts.\nParameters: {}",
        "getImage": "Retrieve an image.",
        "components": "",
    },
    "Instances": [INSTANCE],
}


@pytest.fixture(scope="module")
def tool(repository):
    path = repository / "tools" / "format_tool_alpaca.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(tool, tmp_path, capsys):
    """convert(records, *flags): exit status, conversations (None: no file), stdout, stderr."""

    def run(records, *flags):
        path, output = tmp_path / "train_data.json", tmp_path / "out.jsonl"
        text = records if isinstance(records, str) else json.dumps(records, indent=4)
        path.write_text(text, encoding="utf-8")
        status = tool.main(["--path", str(path), "--output", str(output), *flags])
        out, err = capsys.readouterr()
        lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else None
        assert sorted(item.name for item in tmp_path.iterdir()) == ["out.jsonl", "train_data.json"][lines is None :]
        return status, None if lines is None else [json.loads(line) for line in lines], out, err

    return run


def with_instance(**changes):
    record = copy.deepcopy(RECORD)
    record["Instances"][0].update(changes)
    return record


def with_step(call=None, observation="o"):
    return with_instance(intermediate_steps=[STEP, [call, observation]])


def without(key, instance=False):
    record = copy.deepcopy(RECORD)
    del (record["Instances"][0] if instance else record)[key]
    return record


def test_the_official_form(convert):
    status, conversations, out, err = convert([RECORD, {**RECORD, "Instances": []}])
    assert (status, err) == (0, "")
    assert conversations == [
        {
            "tools": [RECORD["NLDocumentation"]],
            "conversations": [
                {"role": "user", "content": "Tell me facts."},
                {"role": "assistant", "content": "I need facts."},
                {
                    "role": "tool",
                    "name": "getFacts",
                    "parameters": {"category": "habitat", "limit": 3},
                    "observation": "Status Code: 200. Response: [...]",
                },
                {"role": "assistant", "content": "I have what I need.\nHere are three facts."},
            ],
        }
    ]
    assert out.strip().endswith("out.jsonl: 1 conversations of 2 records")
    assert parse_tool_conversation(conversations[0], "x")


@pytest.mark.parametrize(
    "log",
    [
        "I see. \nAction: f",
        "I see.\nASSISTANT Action: f",
        " I see.\n\nAction 1: f\nAction 1 Input: x",
        "I see.",
    ],
)
def test_the_thought_is_what_stands_before_the_call(convert, log):
    _, conversations, _, _ = convert([with_step(["getFacts", {}, log])])
    assert conversations[0]["conversations"][3] == {"role": "assistant", "content": "I see."}
    assert conversations[0]["conversations"][4]["parameters"] == {}


def test_documentation_is_made_where_it_is_missing(convert):
    record = without("NLDocumentation")
    _, conversations, _, _ = convert([record])
    functions = record["Function_Description"]
    text = f"getFacts: {functions['getFacts']}\ngetImage: {functions['getImage']}\n"
    assert conversations[0]["tools"] == [text]
    record["Function_Description"]["components"] = "The detailed output format:\n#A: Object"
    _, conversations, _, _ = convert([{**record, "NLDocumentation": None}], "--overwrite")
    assert conversations[0]["tools"] == [f"{text}\nThe detailed output format:\n#A: Object\n"]


def test_questions_to_the_user_are_told(convert):
    step = ["getDetails", '{"Question": "Which one?"}', "I must ask."]
    status, conversations, out, _ = convert([with_step(step)])
    assert status == 0
    assert conversations[0]["conversations"][4]["name"] == "getDetails"
    assert "1 steps call getDetails" in out


BAD = [
    ("x", "record 1: must be an object with Name, Function_Description and Instances, found str"),
    (without("Name"), "record 1: no key 'Name'"),
    ({**RECORD, "Name": 5}, "'Name' must be a string, found int: 5"),
    (without("Function_Description"), "record 1: no key 'Function_Description'"),
    ({**RECORD, "Function_Description": None}, "'Function_Description' must be an object, found NoneType: null"),
    ({**RECORD, "Function_Description": {"f": None}}, "Function_Description of 'f' must be a string, found NoneType"),
    ({**RECORD, "NLDocumentation": []}, "'NLDocumentation' must be a string, found list"),
    (without("Instances"), "record 1: no key 'Instances'"),
    ({**RECORD, "Instances": {}}, "'Instances' must be a list, found dict"),
    ({**RECORD, "Instances": ["x"]}, "(Axolotl), instance 1: must be an object with input, output"),
    ({**RECORD, "Instances": [{"error": "Could not parse"}]}, "instance 1: ToolAlpaca itself failed here: Could not"),
    (without("input", instance=True), "record 1 (Axolotl), instance 1: no key 'input'"),
    (without("output", instance=True), "instance 1: no key 'output'"),
    (without("Final Thought", instance=True), "instance 1: no key 'Final Thought'"),
    (without("intermediate_steps", instance=True), "instance 1: no key 'intermediate_steps'"),
    (with_instance(input=None), "instance 1: 'input' must be a string, found NoneType"),
    (with_instance(output=["x"]), "instance 1: 'output' must be a string, found list"),
    (with_instance(intermediate_steps="x"), "'intermediate_steps' must be a list, found str"),
    (with_instance(intermediate_steps=["x"]), "step 1: must be [[action, action_input, log], observation], found str"),
    (with_instance(intermediate_steps=[[STEP[0]]]), "step 1: must be [[action, action_input, log], observation]"),
    (with_step("x"), "step 2: must be [[action, action_input, log], observation], found str"),
    (with_step(["getFacts", "{}"]), "step 2: must be [[action, action_input, log], observation], found list"),
    (with_step([None, "{}", "t"]), "step 2: action must be a string, found NoneType"),
    (with_step(["getFacts", "{}", 5]), "step 2: log must be a string, found int"),
    (with_step(["getfacts", "{}", "t"]), "function 'getfacts' is not in Function_Description, which has getFacts, get"),
    (with_step(["components", "{}", "t"]), "function 'components' is not in Function_Description"),
    (with_step(["getFacts", '{"a": 1', "t"]), "step 2: action_input is not valid JSON: Expecting"),
    (with_step(["getFacts", "", "t"]), "step 2: action_input is not valid JSON"),
    (with_step(["getFacts", "[1]", "t"]), "step 2: action_input must be an object, found list: [1]"),
    (with_step(["getFacts", None, "t"]), "step 2: action_input must be an object, found NoneType"),
    (with_step(["getFacts", '{"from": "EUR"}', "t"]), "step 2: action_input: parameter 'from' cannot be the name"),
    (with_step(["getFacts", '{"x": NaN}', "t"]), "step 2: action_input: the values of 'parameters'"),
    (with_step(["getFacts", {"x": "\ud83d"}, "t"]), "instance 1 has half of a surrogate pair"),
    (with_instance(input="\ud83d"), "message 1: 'content' has half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), BAD)
def test_faults(convert, record, message):
    status, conversations, out, err = convert([record])
    assert (status, conversations, out) == (1, None, "")
    assert message in err
    assert "train_data.json:" in err
    assert "1 malformed records or instances; correct them, or skip them with --skip_bad" in err
    assert "nothing was written" in err


def test_all_faults_are_listed_and_skipped_on_demand(convert):
    instances = [INSTANCE, {**INSTANCE, "input": 5}, INSTANCE, {}, INSTANCE]
    records = [RECORD, "x", {**RECORD, "Instances": instances}, without("Name")]
    wanted = [
        "record 2: ",
        "record 3 (Axolotl), instance 2: ",
        "record 3 (Axolotl), instance 4: ",
        "record 4: ",
    ]
    status, conversations, _, err = convert(records)
    assert (status, conversations) == (1, None)
    for line, place in zip(err.splitlines(), wanted):
        assert place in line
    assert len(err.splitlines()) == len(wanted) + 1
    status, conversations, out, err = convert(records, "--skip_bad")
    assert (status, len(conversations), len(err.splitlines())) == (0, 4, len(wanted))
    assert "4 conversations of 4 records, 4 malformed records or instances skipped" in out


def test_nothing_is_left_of_what_fails(convert, tool, tmp_path, capsys):
    for text, message in (
        ("", "has no conversation"),
        ("[]", "has no conversation"),
        ('[{"Name": ', "not valid JSON"),
        (json.dumps([{**RECORD, "Instances": []}]), "has no conversation"),
    ):
        status, conversations, _, err = convert(text, "--skip_bad")
        assert (status, conversations) == (1, None)
        assert message in err
    assert tool.main(["--path", str(tmp_path / "absent"), "--output", str(tmp_path / "x")]) == 1
    assert "no such file" in capsys.readouterr().err
    beneath = str(tmp_path / "train_data.json" / "x")
    assert tool.main(["--path", str(tmp_path / "train_data.json"), "--output", beneath]) == 1
    assert "is a file, not a folder" in capsys.readouterr().err


def test_json_lines(convert):
    line = json.dumps(RECORD)
    assert len(convert(f"{line}\n{line}\n")[1]) == 2
    status, conversations, _, err = convert(f"{line}\nbroken\n{line}\n", "--skip_bad", "--overwrite")
    assert (status, len(conversations)) == (0, 2)
    assert "train_data.json:2: not valid JSON" in err


def test_the_input_is_not_replaced(tool, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(RECORD), encoding="utf-8")
    assert tool.main(["--path", str(path), "--output", str(path), "--overwrite"]) == 1
    assert "is the input" in capsys.readouterr().err
    assert json.loads(path.read_text(encoding="utf-8")) == RECORD


def test_an_output_is_replaced_on_demand_only(convert):
    assert convert([RECORD])[0] == 0
    status, conversations, _, err = convert([RECORD, RECORD])
    assert (status, len(conversations)) == (1, 1)
    assert "exists already" in err
    assert len(convert([RECORD, RECORD], "--overwrite")[1]) == 2
    # A failure costs nothing of what was there.
    assert len(convert(["x"], "--overwrite")[1]) == 2


def test_command_line(repository, tmp_path):
    program = [sys.executable, str(repository / "tools" / "format_tool_alpaca.py")]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "--skip_bad" in done.stdout
    for arguments in ([], ["--pat", "x"], ["--path"]):
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2
    (tmp_path / "in.json").write_text(json.dumps([RECORD]), encoding="utf-8")
    subprocess.run([*program, "--path", "in.json"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (tmp_path / "formatted_data" / "tool_alpaca.jsonl").read_text(encoding="utf-8").count("\n") == 1
