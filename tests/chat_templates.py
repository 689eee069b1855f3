"""Small chat templates that render what those of model families do, and a tokenizer for them."""

from tokenizers import AddedToken, Tokenizer

from subspec.planner.model.hub import DEMO
from subspec.runtime.text.tokenizer import ChatTokenizer

CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content -%}
{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ CALL }}{% endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
TOOLS = """\
{%- if tools %}{{ '<|im_start|>system\\n<tools>\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor -%}
{{ '</tools><|im_end|>\\n' }}{% endif -%}
"""
JSON_CALL = """'\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": '
 + call.function.arguments | tojson + '}\\n</tool_call>'"""
QWEN3 = (
    TOOLS
    + CHATML.replace("CALL", JSON_CALL)
    + "{%- if add_generation_prompt and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
QWEN35 = (
    TOOLS
    + "{# <function=name> <parameter=key> #}"
    + CHATML.replace("CALL", JSON_CALL)
    + "{%- if add_generation_prompt %}{{ '<think>\\n' }}"
    "{%- if enable_thinking is false %}{{ '\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
QWEN35_NOW = (  # keeps the thinking of the turn that goes on, and drops that of earlier ones
    "{%- set asked = namespace(last=0) %}"
    "{%- for m in messages if m.role == 'user' %}{% set asked.last = m.content %}{% endfor -%}"
    + QWEN35.replace(
        "{%- for m in messages -%}",
        "{%- set now = namespace(here=false) %}{%- for m in messages -%}"
        "{%- if m.role == 'user' %}{% set now.here = m.content == asked.last %}{% endif -%}",
    ).replace("{%- if m.reasoning_content -%}", "{%- if m.reasoning_content and now.here -%}")
)
MISTRAL = """\
{{- bos_token }}
{%- set turns = namespace(count=0) %}
{%- for m in messages if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}
{%- if (m.role == 'user') != (turns.count % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- set turns.count = turns.count + 1 %}{% endfor %}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif -%}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}{{ '</s>' }}
{%- elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- endfor -%}
{#- [THINK] #}
"""
GEMMA4 = """\
{%- if tools %}{{ '<|turn>system\\n' }}
{%- for tool in tools %}{{ '<|tool>declaration:' + tool.function.name + '<tool|>' }}{% endfor %}
{{- '<turn|>\\n' }}{% endif -%}
{%- for m in messages %}{{ '<|turn>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + '{' }}
{%- for key, value in call.function.arguments.items() %}{{ key + ':<|"|>' + value + '<|"|>' }}
{%- endfor %}{{ '}<tool_call|>' }}{% endfor %}{{ '<turn|>\\n' }}{% endfor -%}
{{ '<|turn>model\\n' }}
{%- if not enable_thinking | default(false) %}{{ '<|channel>thought\\n<channel|>' }}{% endif -%}
"""
FUNCTION_GEMMA = """\
{%- if tools %}{{ '<start_of_turn>developer\\n' + tools | tojson + '<end_of_turn>\\n' }}{% endif -%}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if not m.name %}{{ raise_exception('name must be provided') }}{% endif %}
{{- '<start_function_response>response:' + m.name + '{' + m.content + '}' }}
{%- else %}{{ '<start_of_turn>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<start_function_call>call:' + call.function.name + '{' }}
{%- for key, value in call.function.arguments.items() %}{{ key ~ ':' ~ value }}{% endfor %}
{{- '}<end_function_call>' }}{% endfor %}{{ '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}{{ '<start_of_turn>model\\n' -}}
"""
LLAMA3 = """\
{%- for m in messages %}
{%- if m.tool_calls and m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '{"name": "' + call.function.name + '", "parameters": ' }}
{{- call.function.arguments | tojson + '}' }}{% endfor %}{{ '<|eot_id|>' }}
{%- endfor %}{% if tools %}{{ tools | tojson }}{% endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
"""
NO_SYSTEM = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}{{ '<|im_start|>assistant\\n' -}}
"""
SPECIAL = (
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[INST]", "[/INST]", "[THINK]", "[/THINK]", "</s>"),
    *("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<turn|>", "<|turn>"),
    "<|python_tag|>",
)
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def family_tokenizer(template: str | None) -> ChatTokenizer:
    """The demo's tokenizer with the tokens of several families."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    tokenizer.add_tokens([AddedToken(one, special=False) for one in NOT_SPECIAL])
    special = {"bos_token": None, "eos_token": "<|im_end|>"}
    return ChatTokenizer(tokenizer, template, special, begins_with_bos=False)
