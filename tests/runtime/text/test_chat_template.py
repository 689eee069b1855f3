"""A chat template is foreign code: what transformers makes of it, or an error within seconds."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from subspec.artifacts.common.errors import Exit, SubspecError
from subspec.planner.model.hub import DEMO
from subspec.runtime.text import chat_template
from subspec.runtime.text.chat_template import (
    CPU_SECONDS,
    MAX_TEXT,
    RETIRING_BYTES,
    TemplateWorker,
    render,
    reply_to,
)

# Written here in the manner of the families' own: what they lean on is in them.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set state = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not message.content.startswith('<tool') %}
        {%- set state.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{%- continue %}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- content }}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}

{{ system_message }}<|eot_id|>
{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{{- pad_token }}
"""
TEMPLATES = {
    "demo": (DEMO / "chat_template.jinja").read_text("utf-8"),
    "in the manner of Qwen": QWEN,
    "in the manner of Llama 3": LLAMA,
    "JSON, trimmed blocks": "  {% if true %}\n{{ messages | tojson(indent=2) }}\n  {% endif %}\n",
}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hi <b>\n"}],
    "system, é and 你": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "é 你 🙂 \"'"},
    ],
    "three turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nno\n</think>\n\nb"},
        {"role": "user", "content": ""},
    ],
}


def variables(messages: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "messages": messages,
        "tools": None,
        "documents": None,
        "bos_token": "<|begin_of_text|>",
        "add_generation_prompt": True,
    }


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_as_in_transformers(template: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    theirs: Any = render_jinja_template(
        [messages],
        chat_template=TEMPLATES[template],
        add_generation_prompt=True,
        bos_token="<|begin_of_text|>",
    )
    assert reply_to(TEMPLATES[template], variables(messages)) == {"text": theirs[0][0]}


def test_the_child_renders_what_its_function_does() -> None:
    messages = CONVERSATIONS["system, é and 你"]
    assert {"text": render(LLAMA, variables(messages))} == reply_to(LLAMA, variables(messages))


def test_what_a_template_refuses_is_a_usage_error_in_its_own_words() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(SubspecError, match="roles must alternate") as refused:
        render(LLAMA, variables(twice))
    assert refused.value.exit_code == Exit.USAGE
    assert "--raw" in refused.value.hint


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{% for a in messages %}", "end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) | length }}", "[Rr]ange too big"),
        ("{{ ('a' * 2000000000) | length }}", "more than 512 MiB"),
        ("{{ 'a' | center(2000000000) }}", "more than 512 MiB"),
        ("{{ '%2000000000d' % 1 }}", "more than 512 MiB"),
        ("{{ '{:2000000000d}'.format(1) }}", "more than 512 MiB"),
        ("{{ [1, 2] | tojson(indent=1000000000) }}", "more than 512 MiB"),
        (
            "{% set n = namespace(s='aaaaaaaa') %}"
            "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "more than 512 MiB",
        ),
        ("{% for i in range(90000) %}{{ 'a' * 100 }}{% endfor %}", "more than 4194304 characters"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "computed for more than 2 s",
        ),
    ],
)
def test_a_hostile_template_ends_as_an_error(template: str, word: str) -> None:
    started = time.process_time()
    with pytest.raises(SubspecError, match=word) as failed:
        render(template, variables([{"role": "user", "content": "a"}]))
    assert failed.value.exit_code == Exit.CORRUPT
    assert len(failed.value.message) < 700
    assert time.process_time() - started < 1  # of this process: the child paid


def test_a_message_without_content_fails_as_a_sentence() -> None:
    nothing: Any = [{"role": "user", "content": None}]
    with pytest.raises(SubspecError, match="chat template failed: can only concatenate str"):
        render(TEMPLATES["demo"], variables(nothing))


def test_a_long_but_honest_prompt_renders() -> None:
    content = "x" * (MAX_TEXT - 100)
    assert content in render(TEMPLATES["demo"], variables([{"role": "user", "content": content}]))


def test_the_reply_is_ascii_so_that_any_locale_carries_it() -> None:
    assert json.dumps(reply_to("{{ '你' }}", {})).isascii()


# A worker that renders many

BUSY = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ONE: list[dict[str, str]] = [{"role": "user", "content": "a"}]


def child_of(worker: TemplateWorker) -> int:
    assert worker._child is not None
    return worker._child.pid


@pytest.mark.slow
def test_a_worker_renders_many_in_one_child_and_more_than_the_seconds_of_one() -> None:
    """Each render has CPU seconds of its own: together they take more."""
    half = "{% for i in range(99999) %}{% for j in range(15) %}{% endfor %}{% endfor %}done"
    with TemplateWorker() as worker:
        expected = reply_to(LLAMA, variables(ONE))["text"]
        assert worker.render(LLAMA, variables(ONE)) == expected
        pid, used = child_of(worker), 0.0
        while used < CPU_SECONDS + 0.5:
            assert worker.render(half, {}) == "done"
            times = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
            used = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        assert child_of(worker) == pid


def test_a_child_that_was_stopped_is_replaced() -> None:
    with TemplateWorker() as worker:
        for template, word in ((BUSY, "computed for more"), ("{{ 'a' * 2000000000 }}", "512 MiB")):
            with pytest.raises(SubspecError, match=word):
                worker.render(template, variables(ONE))
            assert worker.render("{{ messages[0].content }}", variables(ONE)) == "a"
        os.kill(child_of(worker), signal.SIGKILL)
        try:
            worker.render("a", {})  # it may have been noticed in time
        except SubspecError as error:  # that was no fault of the template
            assert error.exit_code == Exit.RESOURCES
        assert worker.render("a", {}) == "a"


def test_a_child_that_took_much_memory_retires() -> None:
    with TemplateWorker() as worker:
        worker.render("a", {})
        before = child_of(worker)
        assert worker.render("{{ ('a' * 300000000) | length }}", {}) == "300000000"
        assert worker.render("a", {}) == "a" and child_of(worker) != before


def test_a_child_of_a_large_process_serves_on() -> None:
    """A server holds gigabytes, and the peak that getrusage tells is handed on to children."""
    large = b"x" * (RETIRING_BYTES + (64 << 20))
    with TemplateWorker() as worker:
        worker.render("a", {})
        before = child_of(worker)
        worker.render("a", {})
        assert child_of(worker) == before and len(large) > RETIRING_BYTES


def test_a_render_that_waits_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.2)
    with TemplateWorker() as worker, pytest.raises(SubspecError, match="ran for more than 0.2 s"):
        worker.render(BUSY, {})


def test_threads_share_a_worker() -> None:
    with TemplateWorker() as worker, ThreadPoolExecutor(8) as pool:
        texts = [*pool.map(lambda n: worker.render("{{ n }}", {"n": n}), range(50))]
    assert texts == [str(n) for n in range(50)]


def test_a_closed_worker_leaves_no_process() -> None:
    worker = TemplateWorker()
    worker.render("a", {})
    pid = child_of(worker)
    worker.close()
    worker.close()
    assert not Path(f"/proc/{pid}").exists()


def test_one_render_sees_nothing_of_another() -> None:
    counting = "{% set n = namespace(i=i or 0) %}{% set n.i = n.i + 1 %}{{ n.i }}{{ x }}"
    with TemplateWorker() as worker:
        assert worker.render(counting, {"x": "secret"}) == "1secret"
        assert worker.render(counting, {}) == "1"


def test_variables_nested_too_deeply_are_a_usage_error() -> None:
    deep: Any = []
    for _ in range(100000):
        deep = [deep]
    with TemplateWorker() as worker, pytest.raises(SubspecError, match="nested too deeply") as one:
        worker.render("a", {"tools": deep})
    assert one.value.exit_code == Exit.USAGE
