import json

import pytest

from k2kernels.text.tools import parse_tool_calls

PARAMETERS = {"get_weather": ["city"], "exec": ["command"], "read_file": ["path", "limit"], "step_2": ["x"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {} for key in names}}}}
    for name, names in PARAMETERS.items()
]
BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CITY, COMMAND = '{"city": "X"}', '{"command": "ls"}'


def call(written, arguments):
    return f"<|tool_call_begin|>{written}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


FORMS = {
    "canonical": (BEGIN + call("functions.get_weather:0", CITY) + END, [("get_weather", CITY)]),
    "underscores": (BEGIN + call("functions_get_weather_1", CITY) + END, [("get_weather", CITY)]),
    "glued": (BEGIN + call("functionsexec5", COMMAND) + END, [("exec", COMMAND)]),
    "counter with zeros": (BEGIN + call("call00003", CITY) + END, [("get_weather", CITY)]),
    "another program's": (BEGIN + call("call_abc123", '{"path": "/a"}') + END, [("read_file", '{"path": "/a"}')]),
    "mere counter": (BEGIN + call("3", COMMAND) + END, [("exec", COMMAND)]),
    "no prefix": (BEGIN + call("get_weather:2", CITY) + END, [("get_weather", CITY)]),
    "singular section": (
        f"<|tool_call_section_begin|>{call('functions.exec:0', COMMAND)}<|tool_call_section_end|>",
        [("exec", COMMAND)],
    ),
    "no section": (call("functions.exec:0", COMMAND), [("exec", COMMAND)]),
    "several": (
        BEGIN + call("functions.exec:0", COMMAND) + call("functions.get_weather:1", CITY) + END,
        [("exec", COMMAND), ("get_weather", CITY)],
    ),
    "string": (BEGIN + call("functions.exec:0", json.dumps(COMMAND)) + END, [("exec", COMMAND)]),
    "name with digits": (BEGIN + call("functions.step_2:7", '{"x": 1}') + END, [("step_2", '{"x": 1}')]),
    "glued name with digits": (BEGIN + call("functions_step_2_7", '{"x": 1}') + END, [("step_2", '{"x": 1}')]),
    "end is missing": (
        BEGIN + call("functions.exec:0", COMMAND).removesuffix("<|tool_call_end|>"),
        [("exec", COMMAND)],
    ),
    "not ASCII": (BEGIN + call("functions.exec:0", '{"command": "你"}') + END, [("exec", '{"command": "你"}')]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_ids(form):
    text, wanted = FORMS[form]
    before, calls = parse_tool_calls("Hi." + text, TOOLS, first=4)
    assert before == "Hi."
    assert [(c.name, c.arguments) for c in calls] == wanted
    assert [c.id for c in calls] == [f"functions.{name}:{4 + i}" for i, (name, _) in enumerate(wanted)]


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        f'{BEGIN}<|tool_call_begin|>functions.exec:0<|tool_call_argument_begin|>{{"comm',
        BEGIN + call("functions.fly:0", "{}") + END,
        BEGIN + call("functions.exec:0", "[1]") + END,
        BEGIN + call("functions.exec:0", "[" * 100_000) + END,
        BEGIN + call("7", "{}") + END,  # fits all tools
        BEGIN + END,
        BEGIN + call("functions.exec:0", COMMAND) + call("functions.fly:1", "{}") + END,
    ],
    ids=range(8),
)
def test_what_cannot_be_resolved_stays_text(text):
    assert parse_tool_calls(text, TOOLS) == (text, [])
    assert parse_tool_calls(text, []) == (text, [])
