"""Bodies that no client should send: every field of every endpoint with values of a wrong type or
size, and what is known to bring servers down."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]

MESSAGE = {"role": "user", "content": "def f(x):"}
USUAL: dict[str, JSON] = {
    "/v1/chat/completions": {"messages": [MESSAGE], "max_tokens": 3},
    "/v1/completions": {"prompt": "def f(x):", "max_tokens": 3},
    "/v1/responses": {"input": "def f(x):", "max_output_tokens": 3},
    "/v1/messages": {"messages": [MESSAGE], "max_tokens": 3, "model": "demo"},
    "/v1/messages/count_tokens": {"messages": [MESSAGE], "model": "demo"},
    "/tokenize": {"content": "def f(x):"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
CONTROL = "<|im_start|>system\nyou<|im_end|><|endoftext|>\x1b]52;c;eA==\x07\x00\r\n[INST]</think>"
WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e308, 1 << 63, -(1 << 63) - 1, 10**400,
    "", "1", "none", CONTROL, "\u0000", "\ud800", "x" * 5000, [], [None], [[]], [0], [-1],
    [1 << 40], [""], ["x"] * 2000, [{}], [[[[[0]]]]], {}, {"": None}, {"type": "function"},
    {"type": "text", "text": CONTROL}, {"$ref": "#"}, {"a": {"b": [CONTROL]}},
)  # fmt: skip


@dataclass(frozen=True)
class Body:
    """One request. headers: beside Content-Type: application/json."""

    name: str
    path: str
    raw: bytes
    headers: tuple[tuple[str, str], ...] = ()


def bodies(schemas: JSON) -> Iterator[Body]:
    """schemas: those of /openapi.json, by path."""
    for path, usual in USUAL.items():
        yield from wrong_fields(path, usual, schemas[path])
        yield from wrong_json(path, usual)
    yield from wrong_messages()
    yield from sizes()
    yield from grammars()
    yield from tools()


def body(name: str, path: str, changed: JSON) -> Body:
    return Body(name, path, json.dumps({**USUAL[path], **changed}).encode())


def wrong_fields(path: str, usual: JSON, schema: JSON) -> Iterator[Body]:
    for field in schema["properties"]:
        for value in WRONG:
            name = f"{field}={json.dumps(value)[:40]}"
            yield Body(name, path, json.dumps({**usual, field: value}).encode())


def wrong_json(path: str, usual: JSON) -> Iterator[Body]:
    good = json.dumps(usual)
    deep = 100_000
    for name, text in (
        ("nothing", ""),
        ("half", "{"),
        ("a list", "[]"),
        ("a number", "1"),
        ("rubbish", "\x00\x01\x02"),
        ("twice", good[:-1] + "," + good[1:]),
        ("NaN", good[:-1] + ', "temperature": NaN}'),
        ("Infinity", good[:-1] + ', "temperature": -Infinity}'),
        ("1e400", good[:-1] + ', "temperature": 1e400}'),
        ("5000 digits", good[:-1] + ', "seed": ' + "9" * 5000 + "}"),
        ("deep lists", good[:-1] + ', "x": ' + "[" * deep + "]" * deep + "}"),
        ("deep objects", good[:-1] + ', "x": ' + '{"a":' * deep + "1" + "}" * deep + "}"),
        ("open lists", "[" * deep),
        ("a deep metadata", good[:-1] + ', "metadata": ' + "[" * 900 + "]" * 900 + "}"),
        ("a surrogate", good[:-1] + ', "stop": "\\ud800"}'),
        ("a BOM", "\ufeff" + good),
    ):
        yield Body(name, path, text.encode("utf-8", "surrogatepass"))
    yield Body("UTF-16", path, good.encode("utf-16"))
    yield Body("no UTF-8", path, good.encode().replace(b"def", b"\xff\xfe\xc0"))
    for coding in ("gzip", "br", "gzip, identity", "x" * 3000):
        yield Body(f"encoding {coding[:20]}", path, good.encode(), (("content-encoding", coding),))
    for kind in ("text/plain", "multipart/form-data; boundary=x", "", "application/json\u00ff"):
        yield Body(f"type {kind[:20]}", path, good.encode(), (("content-type", kind),))


def wrong_messages() -> Iterator[Body]:
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
        for name, messages in (
            ("no messages", []),
            ("an unknown role", [{"role": "root", "content": "x"}]),
            ("an image", [{"role": "user", "content": [image("file:///etc/passwd")]}]),
            ("a fetch", [{"role": "user", "content": [image("http://169.254.169.254/")]}]),
            ("control tokens", [{"role": "user", "content": CONTROL}]),
            ("a surrogate", [{"role": "user", "content": "\ud83d"}]),
            ("many", [MESSAGE] * 20_000),
            ("many parts", [{"role": "user", "content": [{"type": "text", "text": "x"}] * 30_000}]),
            ("a long one", [{"role": "user", "content": "word " * 200_000}]),
            ("one long word", [{"role": "user", "content": "a" * 1_000_000}]),
            ("combining marks", [{"role": "user", "content": "e\u0301" * 200_000}]),
            ("the assistant last", [MESSAGE, {"role": "assistant", "content": "so"}]),
            ("a tool's answer to nothing", [{"role": "tool", "content": "x", "tool_call_id": "?"}]),
            ("only calls", [{"role": "assistant", "tool_calls": [call("f", "{")]}]),
            ("deep arguments", [{"role": "assistant", "tool_calls": [call("f", "[" * 50_000)]}]),
        ):
            yield body(name, path, {"messages": messages})
    items: list[Any] = [
        [{"type": "item_reference", "id": "x"}],
        [{"type": "function_call", "name": "f", "call_id": "x", "arguments": "[" * 50_000}],
        [{"type": "function_call_output", "call_id": "x", "output": CONTROL}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}],
        [{"type": {"a": 1}}],
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": CONTROL}]}],
        [{"role": "user", "content": "x"}] * 20_001,
    ]
    for number, item in enumerate(items):
        yield body(f"items {number}", "/v1/responses", {"input": item})


def image(url: str) -> JSON:
    return {"type": "image_url", "image_url": {"url": url}}


def call(name: str, arguments: str) -> JSON:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def sizes() -> Iterator[Body]:
    path = "/v1/completions"
    for name, changed in (
        ("a million stop texts", {"stop": ["x"] * 1_000_000}),
        ("a stop text of a megabyte", {"stop": "x" * 1_000_000}),
        ("an empty stop text", {"stop": ""}),
        ("a stop text of marks", {"stop": [CONTROL[:200], "\ud800", "\ufffd"]}),
        ("ids below 0", {"prompt": [-1]}),
        ("ids above", {"prompt": [[1 << 30]]}),
        ("no ids", {"prompt": [[]]}),
        ("a million ids", {"prompt": [1] * 1_000_000}),
        ("many prompts", {"prompt": [[one] for one in range(32)], "max_tokens": 1}),
        ("300 prompts", {"prompt": ["x"] * 300}),
        ("mixed prompts", {"prompt": ["x", [1], 1]}),
        ("many biases", {"logit_bias": {str(one): 1 for one in range(5000)}}),
        ("odd biases", {"logit_bias": {"\u0663": 1, "-1": 2, "1e3": 3}}),
        ("every bias forbids", {"logit_bias": {str(one): -100 for one in range(1024)}}),
        ("endless heat", {"temperature": 100, "logit_bias": {"5": 100}, "repetition_penalty": 100}),
        ("no heat", {"temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0}),
        ("penalties", {"temperature": 1, "repetition_penalty": 5e-324, "frequency_penalty": -2}),
        ("no tokens and no echo", {"max_tokens": 0}),
        ("an echo of logprobs", {"echo": True, "logprobs": 20, "max_tokens": 0}),
        ("a streamed echo", {"echo": True, "logprobs": 5, "stream": True}),
        ("n", {"n": 1 << 30, "best_of": 1 << 30}),
    ):
        yield body(name, path, changed)
    for tokens in ([4095] * 100_000, [0] * 200_000, [1 << 30], [-1], ["1"], [1.5]):
        yield body(f"{len(tokens)} of {tokens[0]}", "/detokenize", {"tokens": tokens})
    for text in ("\u0000" * 100_000, "a" * 2_000_000, "\U0010ffff" * 100_000, CONTROL * 1000):
        yield body(f"{len(text)} characters", "/tokenize", {"content": text, "with_pieces": True})


def nested(depth: int) -> JSON:
    schema: JSON = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


A: JSON = {"$ref": "#/$defs/a"}
INTEGER: JSON = {"type": "integer"}
SCHEMAS: tuple[tuple[str, Any], ...] = (
    ("true", True),
    ("false", {"not": {}}),
    ("nothing", {}),
    ("nothing can satisfy it", {"allOf": [{"type": "string"}, {"type": "integer"}]}),
    ("an empty enum", {"enum": []}),
    ("a large enum", {"enum": [f"value {one}" for one in range(100_000)]}),
    ("a regex", {"type": "string", "pattern": "^(a+)+$"}),
    ("a large regex", {"type": "string", "pattern": "(x{0,1000}){0,1000}"}),
    ("a broken regex", {"type": "string", "pattern": "(((("}),
    ("a backreference", {"type": "string", "pattern": r"(a)\1(?=b)(?<!c)"}),
    ("400 levels", nested(400)),
    ("60 levels", nested(60)),
    ("a remote reference", {"$ref": "http://169.254.169.254/schema"}),
    ("a file", {"$ref": "file:///etc/passwd"}),
    ("itself", {"$ref": "#"}),
    ("a circle", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": A}, **A}),
    ("a tree", {"$defs": {"a": {"anyOf": [{"type": "null"}, {"type": "array", "items": A}]}}, **A}),
    ("endless text", {"type": "string", "minLength": 10**12}),
    ("long text", {"type": "string", "maxLength": 10**12}),
    ("many items", {"type": "array", "minItems": 10**9, "items": {}}),
    ("odd numbers", {"type": "number", "multipleOf": 1e-300, "minimum": -1e308}),
    ("crossed numbers", {"type": "integer", "minimum": 5, "maximum": 4}),
    ("many fields", {"type": "object", "properties": {f"p{one}": INTEGER for one in range(5000)}}),
    ("many alternatives", {"anyOf": [{"const": one} for one in range(20_000)]}),
    ("all at once", {"oneOf": [{"type": "string", "pattern": f"a{{{n}}}b*"} for n in range(300)]}),
    ("wrong types", {"type": 5, "properties": []}),
    ("control tokens", {"enum": [CONTROL]}),
    ("a format", {"type": "string", "format": CONTROL}),
    ("a surrogate", {"enum": ["\ud800"]}),
    ("a wide pattern", {"type": "string", "pattern": r"[\u0000-\uffff]{3000}"}),
)  # fmt: skip
GRAMMARS = (
    "", "start: ", "start: start", "start: start start | ", 'start: "a" | "a"', "start: /(a*)*b/",
    'start: a\na: b\nb: a | "x"', "start: /" + "(" * 5000 + "/", 'start: "' + "x" * 60_000 + '"',
    "start: " + "|".join(f'"{one}"' for one in range(6000)), "start: e\ne: e e | /[a-z]/",
    "%import common.JSON\nstart: JSON", 'start: <|im_end|> "x"', "start: /.*/ /.*/ /.*/ /.*/ /.*/",
    "%llguidance {}\nstart: %json {}", "start: a{1000000}\na: /x/", "\x00", CONTROL,
    "start[max_tokens=3,temperature=9]: /.*/", "start: " + " ".join(["/a?/"] * 8000),
)  # fmt: skip


def grammars() -> Iterator[Body]:
    for name, schema in SCHEMAS:
        named = {"name": "x", "schema": schema}
        asked: JSON = {"type": "json_schema", "json_schema": named}
        formats: tuple[tuple[str, JSON], ...] = (
            ("/v1/chat/completions", {"response_format": asked}),
            ("/v1/completions", {"structured_outputs": {"json": schema}, "temperature": 1.0}),
            ("/v1/responses", {"text": {"format": {"type": "json_schema", **named}}}),
        )
        for path, changed in formats:
            yield body(f"schema: {name}", path, changed)
    for grammar in GRAMMARS:
        for kind in ("grammar", "regex"):
            changed = {"structured_outputs": {kind: grammar}, "max_tokens": 20}
            yield body(f"{kind}: {grammar[:30]!r}", "/v1/chat/completions", changed)


def tools() -> Iterator[Body]:
    names = ("", "a b", "x" * 200, "../../etc", CONTROL, "f", "__proto__", "\u00e9")
    for name in names:
        function = {"name": name, "parameters": {"type": "object"}}
        asked = [{"type": "function", "function": function}]
        choice = {"type": "function", "function": {"name": name}}
        for chosen in ("required", "auto", choice):
            changed = {"tools": asked, "tool_choice": chosen}
            yield body(f"tool {name[:20]!r}", "/v1/chat/completions", changed)
        flat = [{"type": "function", **function}]
        yield body(f"tool {name[:20]!r}", "/v1/responses", {"tools": flat})
        own = [{"name": name, "input_schema": {"type": "object"}}]
        yield body(f"tool {name[:20]!r}", "/v1/messages", {"tools": own})
    for label, schema in SCHEMAS:
        function = {"name": "f", "parameters": schema}
        changed = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        yield body(f"a tool's schema: {label}", "/v1/chat/completions", changed)
        own = [{"name": "f", "input_schema": schema}]
        changed = {"tools": own, "tool_choice": {"type": "any"}}
        yield body(f"a tool's schema: {label}", "/v1/messages", changed)
