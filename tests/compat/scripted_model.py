"""`subspec-serve` with a model that says what it is told to: `scripted_model.py ANSWERS`.

ANSWERS: a JSON list of texts, of which each request gets the next one, and the last one all that
follow. All but the engine is the real server, with a chat template, a tokenizer and tool calls in
Hermes' form. So an agent can be led through calls of its tools, which small models do not make.
"""

import json
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the parts of the tests

from served import ScriptedEngine, model_of  # noqa: E402

from subspec.artifacts.common.command import leave, reported  # noqa: E402
from subspec.artifacts.common.errors import Exit  # noqa: E402
from subspec.artifacts.common.signals import end_at_once  # noqa: E402
from subspec.planner.model.hub import DEMO  # noqa: E402
from subspec.runtime.server.assembly import Settings, notify_listening, serve_engine  # noqa: E402
from subspec.runtime.server.chat import chat, count_tokens, open_chat_model  # noqa: E402
from subspec.runtime.text.tokenizer import load_tokenizer  # noqa: E402

CONTEXT = 200_000  # coding agents' first prompts have 10,000 to 50,000 tokens of this tokenizer


@reported
def main(answers: list[str]) -> None:
    template = (HERE / "tools_template.jinja").read_text()
    tokenizer = replace(load_tokenizer(DEMO), template=template)
    model = replace(model_of(tokenizer), context=CONTEXT)
    chat_model = open_chat_model(tokenizer, CONTEXT, model.vocab_size, frozenset({2}))
    engine = ScriptedEngine(tokenizer, answers)
    engine.context = CONTEXT
    settings = Settings(log_format="json")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        notify_listening(settings, listening)
        code = serve_engine(
            settings,
            model,
            tokenizer,
            engine,
            lambda generator: partial(chat, model=chat_model, generator=generator),
            partial(count_tokens, model=chat_model),
            {},
            listening,
            lambda stage, share: None,
        )
    chat_model.close()
    if code != Exit.OK:
        leave(code)


if __name__ == "__main__":
    end_at_once()
    main(answers=json.loads(sys.argv[1]))
