"""What a template can render is found by asking it."""

from dataclasses import replace

import pytest
from chat_templates import (
    GEMMA4,
    MISTRAL,
    NO_SYSTEM,
    QWEN3,
    QWEN35,
    QWEN35_NOW,
    family_tokenizer,
)

from subspec.planner.model.hub import DEMO
from subspec.runtime.text.chat_template import TemplateWorker
from subspec.runtime.text.template_caps import TemplateCaps, find_caps

DEMO_TEMPLATE = (DEMO / "chat_template.jinja").read_text("utf-8")
NOTHING = TemplateCaps()
CALLS = TemplateCaps(
    supports_tools=True,
    supports_tool_calls=True,
    supports_parallel_tool_calls=True,
    supports_object_arguments=True,
    supports_user_after_result=True,
)
FULL = replace(CALLS, supports_preserve_reasoning=True, supports_enable_thinking=True)
TEXT_ARGUMENTS = """\
{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}
{{ call.function.name ~ call.function.arguments }}{% endfor %}{% endfor %}{{ tools }}"""
FIRST_CALL_ONLY = """\
{% for m in messages %}{{ m.content }}{% if m.tool_calls %}
{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{% endfor %}"""
PARTS = """\
{% for m in messages %}{% if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}
{{- reasoning_effort }}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (DEMO_TEMPLATE, NOTHING),
        (None, NOTHING),
        (QWEN3, FULL),
        (QWEN35, FULL),
        (QWEN35_NOW, FULL),
        (MISTRAL, replace(CALLS, supports_user_after_result=False)),
        (NO_SYSTEM, TemplateCaps(supports_system_role=False)),
        (TEXT_ARGUMENTS, replace(CALLS, supports_object_arguments=False)),
        (
            FIRST_CALL_ONLY,
            replace(CALLS, supports_tools=False, supports_parallel_tool_calls=False),
        ),
        (PARTS, TemplateCaps(supports_typed_content=True, supports_reasoning_effort=True)),
        ("{{ nothing.at.all }}", TemplateCaps(False, False, False)),
    ],
)
def test_caps_are_what_the_template_renders(template: str | None, expected: TemplateCaps) -> None:
    with TemplateWorker() as worker:
        assert find_caps(family_tokenizer(template), worker) == expected


def test_gemma_renders_tools_calls_and_thinking() -> None:
    with TemplateWorker() as worker:
        caps = find_caps(family_tokenizer(GEMMA4), worker)
    assert caps.supports_tools and caps.supports_tool_calls and caps.supports_enable_thinking
    assert not caps.supports_preserve_reasoning
