"""OpenAI's Codex CLI against a running server: `codex_agent.py BASE_URL --program P --python P`.

A real model answers, and gets a prompt that is too long; one that is told to leads Codex through a
command and its result.
"""

import tempfile
from pathlib import Path

from agents import SAID, Agent, events_in, model_at, read_agent, run, told_to_call

CONFIG = """\
model = "{model}"
model_provider = "subspec"
[model_providers.subspec]
name = "subspec"
base_url = "{base_url}/v1"
wire_api = "responses"
"""
SHORT = 'model_instructions_file = "{file}"\n'  # Codex's own have 4,000 tokens
FEW_TOOLS = ("--disable", "multi_agent", "--disable", "goals")


def codex(agent: Agent, base_url: str, *arguments: str, short: bool = False) -> str:
    with tempfile.TemporaryDirectory() as home:
        brief = Path(home) / "brief.md"
        brief.write_text("You are a helpful assistant.")
        config = CONFIG.format(model=model_at(base_url), base_url=base_url)
        if short:
            config = SHORT.format(file=brief) + config
        (Path(home) / "config.toml").write_text(config)
        sandbox = ("--skip-git-repo-check", "--sandbox", "danger-full-access")
        return run([agent.program, "exec", "--json", *sandbox, *arguments], CODEX_HOME=home)


def messages(printed: str) -> list[str]:
    items = [event.get("item") for event in events_in(printed)]
    return [
        str(item["text"])
        for item in items
        if isinstance(item, dict) and item["type"] == "agent_message"
    ]


def main() -> None:
    agent = read_agent(__doc__)
    found = codex(agent, agent.base_url, *FEW_TOOLS, "Say hello.", short=True)
    assert messages(found), found
    assert '"turn.completed"' in found, found

    found = codex(agent, agent.base_url, "Say hello.")
    assert "ran out of room in the model's context window" in found, found

    command = "echo forty-$((40 + 2))"
    with told_to_call(agent, "exec_command", {"cmd": command}) as base_url:
        found = codex(agent, base_url, "What does it say?")
    assert '"aggregated_output":"forty-42\\n"' in found, found
    assert messages(found) == ["I look.", SAID], found


if __name__ == "__main__":
    main()
