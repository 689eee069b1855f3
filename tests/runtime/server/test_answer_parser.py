"""Model text becomes reasoning, answer and tool calls, wherever it is cut; none of it is lost."""

import json
import random
from typing import Any

import pytest

from subspec.runtime.server.answer_parser import AnswerParser
from subspec.runtime.server.chat_events import (
    ChatEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
)
from subspec.runtime.server.tools.formats import (
    FUNCTION_GEMMA,
    GEMMA_4,
    HERMES,
    LLAMA,
    MISTRAL_ARGS,
    MISTRAL_LIST,
    XML,
    ToolFormat,
    choose_tool_format,
)
from subspec.runtime.text.reasoning import (
    BRACKETS,
    CHANNEL,
    THINK,
    ReasoningFormat,
    choose_reasoning,
    ends_in_reasoning,
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = (
    tool(
        "get_weather",
        city={"type": "string"},
        days={"type": "integer"},
        metric={"type": "boolean"},
        ratio={"type": "number"},
        tags={"type": "array", "items": {"type": "string"}},
        options={"type": "object"},
        note={"type": ["string", "null"]},
        limit={"anyOf": [{"type": "integer"}, {"type": "null"}]},
        untyped={},
    ),
    tool("now"),
)
Told = list[tuple[str, ...]]


def told(events: list[ChatEvent]) -> Told:
    """Neighbouring deltas joined: ("reasoning" | "text", text), ("call", name, JSON)."""
    out: Told = []
    for event in events:
        match event:
            case ReasoningDelta(text) | TextDelta(text):
                kind = "reasoning" if isinstance(event, ReasoningDelta) else "text"
                assert text
                before = out.pop()[1] if out and out[-1][0] == kind else ""
                out.append((kind, before + text))
            case ToolCallStart(index, identifier, name):
                assert identifier.startswith("call_") and len(identifier) > 20
                assert index == sum(one[0] == "call" for one in out)
                out.append(("call", name, ""))
            case ToolCallDelta(index, arguments):
                assert index == sum(one[0] == "call" for one in out) - 1 and out[-1][0] == "call"
                out.append(("call", out[-1][1], out.pop()[2] + arguments))
    return out


def parsed(
    text: str,
    form: ToolFormat | None = None,
    reasoning: ReasoningFormat | None = None,
    is_reasoning: bool = False,
    cuts: list[int] | None = None,
) -> Told:
    parser = AnswerParser(reasoning, is_reasoning, form, TOOLS)
    events = []
    places = [0, *(cuts or []), len(text)]
    for begin, end in zip(places, places[1:], strict=False):
        events += parser.feed(text[begin:end])
    return told([*events, *parser.finish()])


def call(name: str, **arguments: Any) -> tuple[str, str, Any]:
    return ("call", name, arguments)


def values(found: Told) -> list[Any]:
    return [(one[0], one[1], json.loads(one[2])) if one[0] == "call" else one for one in found]


PARIS = call("get_weather", city="Paris", days=3)
PARIS_JSON = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'
PARIS_XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
ODD = 'He said "{hi}" \\ </tool_call> é🙂\n\ttab'
ODD_JSON = json.dumps({"name": "get_weather", "arguments": {"city": ODD, "tags": ["}", "]"]}})
GOLDEN: list[tuple[ToolFormat, str, list[Any]]] = [
    # Qwen 2.5, Qwen3, Hermes
    (HERMES, f"<tool_call>\n{PARIS_JSON}\n</tool_call>", [PARIS]),
    (
        HERMES,
        f"Let me look.\n\n<tool_call>{PARIS_JSON}</tool_call>",
        [("text", "Let me look."), PARIS],
    ),
    (
        HERMES,
        f"<tool_call>\n{PARIS_JSON}\n</tool_call>\n<tool_call>\n"
        '{"name": "now", "arguments": {}}\n</tool_call>\n',
        [PARIS, call("now")],
    ),
    (
        HERMES,
        f"<tool_call>{ODD_JSON}</tool_call>",
        [call("get_weather", city=ODD, tags=["}", "]"])],
    ),
    (
        HERMES,
        '<tool_call>{"arguments": {"days": 1}, "name": "now"}</tool_call>',
        [call("now", days=1)],
    ),
    (HERMES, '<tool_call>{"name": "now"}</tool_call> ok', [call("now"), ("text", "ok")]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null}}\n</tool_call>', [call("now")]),
    (
        HERMES,
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [call("now", a=1)],
    ),
    (HERMES, f"<tool_call>[{PARIS_JSON}, {PARIS_JSON}]</tool_call>", [PARIS, PARIS]),
    (HERMES, f"<tool_call>{PARIS_JSON}", [PARIS]),
    (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {"a": "x\ny"}}</tool_call>',
        [call("now", a="x\ny")],
    ),
    # Qwen3-Coder, Qwen3.5
    (XML, PARIS_XML, [PARIS]),
    (XML, f"Hm.\n{PARIS_XML}\n{PARIS_XML}", [("text", "Hm."), PARIS, PARIS]),
    (XML, PARIS_XML.removeprefix("<tool_call>\n"), [PARIS]),
    (XML, "<tool_call>\n<function=now>\n</function>\n</tool_call>", [call("now")]),
    (
        XML,
        "<tool_call><function=get_weather><parameter=city>\n\n a\n</parameter> b </function>\n\n"
        "</parameter><parameter=metric>True</parameter><parameter=ratio>-1.5e3</parameter>"
        '<parameter=tags>["x", "y"]</parameter><parameter=options>{"a": {"b": null}}</parameter>'
        "<parameter=note>null</parameter><parameter=limit>None</parameter>"
        "<parameter=untyped>12</parameter><parameter=new>\n[1]\n</parameter></function></tool_call>",
        [
            call(
                "get_weather",
                city="\n a\n</parameter> b </function>\n",
                metric=True,
                ratio=-1500.0,
                tags=["x", "y"],
                options={"a": {"b": None}},
                note=None,
                limit=None,
                untyped="12",
                new=[1],
            )
        ],
    ),
    (
        XML,
        "<tool_call><function=get_weather><parameter=days>three</parameter>"
        "<parameter=metric>maybe</parameter><parameter=tags>NaN</parameter></tool_call> x",
        [call("get_weather", days="three", metric="maybe", tags="NaN"), ("text", "x")],
    ),
    (XML, f"<tool_call>\n{PARIS_JSON}\n</tool_call>", [PARIS]),
    # Llama 3.1, 3.2
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}', [PARIS]),
    (
        LLAMA,
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
        [PARIS],
    ),
    (LLAMA, f"<|python_tag|>{PARIS_JSON}; {PARIS_JSON}", [PARIS, PARIS]),
    (
        LLAMA,
        f'{PARIS_JSON}; {{"name": "now", "parameters": {{}}}}; {PARIS_JSON}; {PARIS_JSON} ok',
        [PARIS, call("now"), PARIS, PARIS, ("text", "ok")],
    ),
    (LLAMA, f'{PARIS_JSON}; {{"name": "x"}}', [PARIS, ("text", '; {"name": "x"}')]),
    (LLAMA, f'\n{{"type": "function", "function": {PARIS_JSON}}}\n', [PARIS]),
    (LLAMA, f"```json\n[{PARIS_JSON}]\n```", [PARIS]),
    (LLAMA, f"{PARIS_JSON} is it", [PARIS, ("text", "is it")]),
    # Mistral Nemo, Mistral Small 3.1, Ministral 3
    (MISTRAL_LIST, f'[TOOL_CALLS][{PARIS_JSON[:-1]}, "id": "abcdef123"}}]', [PARIS]),
    (MISTRAL_LIST, f"[TOOL_CALLS] [{PARIS_JSON}, {PARIS_JSON}]", [PARIS, PARIS]),
    (
        MISTRAL_ARGS,
        'I look.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}'
        "[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{}",
        [("text", "I look."), PARIS, call("now")],
    ),
    (MISTRAL_ARGS, '[TOOL_CALLS]get_weather{"city": "Paris", "days": 3}', [PARIS]),
    # Gemma 4, FunctionGemma
    (GEMMA_4, '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>', [PARIS]),
    (
        GEMMA_4,
        '<|tool_call>call:get_weather{city:<|"|>{a: "b"}, [c]\n\\<|"|>,metric:true,ratio:0.5,'
        'tags:[<|"|>x<|"|>,<|"|><|"|>],options:{<|"|>a<|"|>:{b:null},c:[]}}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        [
            call(
                "get_weather",
                city='{a: "b"}, [c]\n\\',
                metric=True,
                ratio=0.5,
                tags=["x", ""],
                options={"a": {"b": None}, "c": []},
            ),
            call("now"),
        ],
    ),
    (GEMMA_4, '<|tool_call>call:get_weather{"city": "Paris", "days": 3}<tool_call|>', [PARIS]),
    (
        FUNCTION_GEMMA,
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>, days:3}"
        "<end_function_call>",
        [PARIS],
    ),
]


@pytest.mark.parametrize(("form", "text", "expected"), GOLDEN)
def test_a_call_is_read_as_its_model_writes_it(
    form: ToolFormat, text: str, expected: list[Any]
) -> None:
    assert values(parsed(text, form)) == expected


MALFORMED = [
    (HERMES, "Use <tool_call> to call. <tool_call", []),
    (HERMES, '<tool_call>{"name": 7, "arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"tool": "now"}</tool_call> and more', []),
    (HERMES, '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "a b", "arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "now", "argum', []),
    (HERMES, f"<tool_call>{'[' * 500}", []),
    (HERMES, f'<tool_call>{{"id": {"[" * 5000}', []),
    (XML, "<tool_call>\n<function=get weather>", []),
    (XML, "<function=unknown><parameter=a>b</parameter></function>", []),
    (XML, "<tool_call>\n<function=" + "x" * 300, []),
    (LLAMA, '{"city": "Paris", "name": "get_weather"}', []),
    (LLAMA, '{"name": "unknown", "parameters": {}}', []),
    (LLAMA, '{"name": "now", "parameters": {}', []),
    (LLAMA, '<|python_tag|>brave_search.call(query="x")', []),
    (LLAMA, "```python\nprint({})\n```", []),
    (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]later", []),
    (MISTRAL_LIST, "[TOOL_CALLS][]", []),
    (GEMMA_4, "<|tool_call>now{}<tool_call|>", []),
    (GEMMA_4, "<|tool_call>call:a b{}<tool_call|>", []),
]


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, text, _ in MALFORMED])
def test_what_is_no_call_comes_back_as_text(form: ToolFormat, text: str) -> None:
    found = parsed(text, form)
    if text.startswith('{"name": "now"'):  # told before it turned out to be cut off
        assert found == [("call", "now", "{}")]
    else:
        assert found == [("text", text)]


@pytest.mark.parametrize(
    ("form", "text", "arguments"),
    [
        (
            HERMES,
            '<tool_call>{"name": "now", "arguments": {"a": 1 oops}}</tool_call>',
            '{"a": 1 oops}}',
        ),
        (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "b', '{"a": "b'),
        (XML, "<tool_call><function=now><parameter=a>b", "{"),
        (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]{x[TOOL_CALLS]now[ARGS]{}", "{x"),
        (GEMMA_4, "<|tool_call>call:now{a:1]<tool_call|>", '{"a": '),
    ],
)
def test_a_call_that_goes_wrong_after_its_name_keeps_what_was_said(
    form: ToolFormat, text: str, arguments: str
) -> None:
    first = parsed(text, form)[0]
    assert first[:2] == ("call", "now") and first[2].startswith(arguments)


def test_a_call_inside_a_malformed_one_is_found() -> None:
    text = f"First <tool_call> then <tool_call>{PARIS_JSON}</tool_call> end"
    expected = [("text", "First <tool_call> then"), PARIS, ("text", "end")]
    assert values(parsed(text, HERMES)) == expected


def test_arguments_stream_before_they_are_complete() -> None:
    for form, begin in (
        (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "some'),
        (XML, "<tool_call><function=get_weather><parameter=city>some"),
        (MISTRAL_ARGS, '[TOOL_CALLS]now[ARGS]{"a": "some'),
        (GEMMA_4, '<|tool_call>call:now{a:<|"|>some'),
        (LLAMA, '{"name": "now", "parameters": {"a": "some'),
    ):
        found = told(AnswerParser(None, False, form, TOOLS).feed(begin))
        assert found[0][0] == "call" and found[0][2].endswith('"some')


# Reasoning

REASONING: list[tuple[ReasoningFormat, bool, str, Told]] = [
    (
        THINK,
        False,
        "<think>\nHm.\n\nSo\n</think>\n\nYes ",
        [("reasoning", "Hm.\n\nSo"), ("text", "Yes ")],
    ),
    (THINK, True, "Hm.\n</think>\n\nYes", [("reasoning", "Hm."), ("text", "Yes")]),
    (THINK, True, "\n<think>\nHm.</think>Yes", [("reasoning", "Hm."), ("text", "Yes")]),
    (THINK, False, "\n<think>\n\n</think>\n\nYes", [("text", "Yes")]),
    (THINK, False, "<think>on and on \n", [("reasoning", "on and on")]),
    (THINK, False, " Yes <think>no</think>", [("text", " Yes <think>no</think>")]),
    (THINK, False, "<thin", [("text", "<thin")]),
    (THINK, True, "a </thin", [("reasoning", "a </thin")]),
    (THINK, False, "<think>a</think>b</think>", [("reasoning", "a"), ("text", "b</think>")]),
    (BRACKETS, False, "[THINK]Hm.[/THINK]Yes", [("reasoning", "Hm."), ("text", "Yes")]),
    (
        CHANNEL,
        False,
        "<|channel>thought\nHm.\n<channel|>Yes",
        [("reasoning", "Hm."), ("text", "Yes")],
    ),
    (CHANNEL, False, "Yes", [("text", "Yes")]),
]


@pytest.mark.parametrize(("form", "is_reasoning", "text", "expected"), REASONING)
def test_reasoning_is_told_apart(
    form: ReasoningFormat, is_reasoning: bool, text: str, expected: Told
) -> None:
    assert parsed(text, None, form, is_reasoning) == expected


def test_a_call_within_reasoning_counts_where_models_write_it_so() -> None:
    text = f"<think>\nI call {PARIS_XML}"
    assert values(parsed(text, XML, THINK)) == [("reasoning", "I call"), PARIS]
    text = f"<think>I could <tool_call>{PARIS_JSON}</tool_call>\n</think>\n<tool_call>{PARIS_JSON}"
    expected = [("reasoning", f"I could <tool_call>{PARIS_JSON}</tool_call>"), PARIS]
    assert values(parsed(text, HERMES, THINK)) == expected


def test_a_prompt_shows_whether_it_has_opened_the_reasoning() -> None:
    assert ends_in_reasoning("<|im_start|>assistant\n<think>\n", THINK)
    assert not ends_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK)
    assert ends_in_reasoning("<|turn>model\n<|channel>thought\n", CHANNEL)
    assert not ends_in_reasoning("<|turn>model\n<|channel>thought\n<channel|>", CHANNEL)


# However the text is cut


@pytest.mark.parametrize(
    ("form", "reasoning", "text"),
    [
        *((form, None, text) for form, text, _ in GOLDEN),
        *((form, None, text[:600]) for form, text, _ in MALFORMED),
        *((None, form, text) for form, _, text, _ in REASONING),
        (XML, THINK, f"<think>\nI call {PARIS_XML} </think>\n\n {PARIS_XML} done \n"),
        (HERMES, THINK, f"<think>a</think>b <tool_call>{ODD_JSON}</tool_call> c<tool_call> "),
    ],
)
def test_pieces_cut_anywhere_tell_the_same(
    form: ToolFormat | None, reasoning: ReasoningFormat | None, text: str
) -> None:
    whole = parsed(text, form, reasoning)
    assert parsed(text, form, reasoning, cuts=[*range(1, len(text))]) == whole
    chance = random.Random(text)
    for _ in range(20):
        cuts = sorted(chance.sample(range(len(text) + 1), min(len(text), chance.randint(1, 9))))
        assert parsed(text, form, reasoning, cuts=cuts) == whole


PARTS = [
    *"<tool_call> </tool_call> <function=get_weather> </function>".split(),
    *"<parameter=city> </parameter>".split(),
    *"<think> </think> [TOOL_CALLS] now [ARGS] <|python_tag|>".split(),
    *"call: <|tool_call> <tool_call|>".split(),
    *'{ } [ ] " \\ , : ; 1 true x é <|"|>'.split(),
    *(" ", "\n", PARIS_JSON, '{"name": "now", "arguments": '),
]


@pytest.mark.parametrize("form", [HERMES, XML, LLAMA, MISTRAL_ARGS, MISTRAL_LIST, GEMMA_4, None])
def test_no_text_breaks_the_parser_or_depends_on_where_it_is_cut(form: ToolFormat | None) -> None:
    chance = random.Random(7)
    for _ in range(400):
        text = "".join(chance.choices(PARTS, k=chance.randint(1, 12)))
        whole = parsed(text, form, THINK)
        assert parsed(text, form, THINK, cuts=[*range(1, len(text))]) == whole
        if not any(kind == "call" for kind, *_ in whole):
            said = "".join(one[1] for one in whole)
            tags = text.replace("<think>", "").replace("</think>", "") if said != text else text
            assert said.split() == tags.split() or "think>" in text


def test_a_long_malformed_answer_takes_time_in_proportion_to_its_length() -> None:
    text = '<tool_call>{"id": "' * 5000
    assert parsed(text, HERMES) == [("text", text)]


# Formats


def test_a_format_is_seen_in_the_template() -> None:
    assert choose_tool_format('<tool_call>\\n{"name": <function-name>') == HERMES
    assert choose_tool_format("<tool_call>\n<function=example>") == XML
    assert choose_tool_format("<|tool_call>call:") == GEMMA_4
    assert choose_tool_format("[TOOL_CALLS] [") == MISTRAL_LIST
    assert choose_tool_format("'[TOOL_CALLS]' + name + '[ARGS]'") == MISTRAL_ARGS
    assert choose_tool_format('{% if tools %}{"name": function name, "parameters": {}}') == LLAMA
    assert choose_tool_format("<tool_call>name<arg_key>") is None
    assert choose_tool_format("{{ messages }}") is None
    assert choose_reasoning("a <think> b") == THINK and choose_reasoning("a") is None
